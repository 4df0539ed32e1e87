"""LLaMA and its relatives against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.errors import ModelError
from tvm_ternary.graph.passes.fuse_epilogues import fuse_epilogues
from tvm_ternary.graph.source import import_model

from .checkpoints import feeds, write_checkpoint
from .decoders import BITNET, LLAMA, MISTRAL, QWEN2, QWEN3, decoder, run_all

TOLERANCE = 3e-6
ONE_LAYER = {"num_hidden_layers": 1}


def error(folder: Path, config: dict[str, Any], length: int = 7, prefix: str = "model.") -> float:
    """Of the module compiled for one length against the reference, relative to the largest logit."""
    write_checkpoint(folder, config, decoder(config, prefix))
    (logits,) = Compiled(import_model(folder, {"batch": 2, "sequence": length}))(feeds(length))
    return relative_error(logits, run_all(decoder(config), config, feeds(length)))


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2, QWEN3, BITNET], ids=lambda c: str(c["model_type"]))
def test_every_family_is_the_reference(tmp_path: Path, config: dict[str, Any]) -> None:
    assert error(tmp_path, config) < TOLERANCE


def test_one_import_serves_several_lengths(tmp_path: Path) -> None:
    compiled = Compiled(import_model(write_checkpoint(tmp_path, LLAMA, decoder())))
    for length in (1, 2, 33, 64):
        (logits,) = compiled(feeds(length))
        assert relative_error(logits, run_all(decoder(), LLAMA, feeds(length))) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 8},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_settings_of_llama(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert error(tmp_path, {**LLAMA, **ONE_LAYER, **changes}) < TOLERANCE


def test_names_without_the_model_in_front(tmp_path: Path) -> None:
    assert error(tmp_path, {**LLAMA, **ONE_LAYER, "tie_word_embeddings": True}, prefix="") < TOLERANCE


class TestWindow:
    def test_mistral(self, tmp_path: Path) -> None:
        config = {**MISTRAL, "sliding_window": 3}
        assert error(tmp_path, config, length=9) < TOLERANCE
        (logits,) = Compiled(import_model(tmp_path))(feeds(9))
        assert relative_error(logits, run_all(decoder(MISTRAL), MISTRAL, feeds(9))) > 0.01

    def test_qwen_from_a_layer_on(self, tmp_path: Path) -> None:
        config = {**QWEN2, "use_sliding_window": True, "max_window_layers": 1}
        assert error(tmp_path, config, length=9) < TOLERANCE

    def test_layer_types(self, tmp_path: Path) -> None:
        types = ["full_attention", "sliding_attention"]
        config = {**QWEN3, "use_sliding_window": True, "sliding_window": 2, "layer_types": types}
        write_checkpoint(tmp_path, config, decoder(config))
        (logits,) = Compiled(import_model(tmp_path))(feeds())
        counted = {**config, "max_window_layers": 1}
        assert relative_error(logits, run_all(decoder(config), counted, feeds())) < TOLERANCE
        write_checkpoint(tmp_path, {**config, "layer_types": ["full_attention", "linear_attention"]}, decoder(config))
        with pytest.raises(ModelError, match=r"layer_types is .*linear_attention.* expected 2 of full_attention or"):
            import_model(tmp_path)


class TestMatrices:
    """The matrices, whatever they became, are what the passes behind the import look for."""

    def test_names_and_shapes(self, tmp_path: Path) -> None:
        imported = import_model(write_checkpoint(tmp_path, QWEN2, decoder(QWEN2)))
        names = [name.removeprefix("model.layers.0.") for name in imported.shapes if ".0." in name]
        parts = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
        assert names == [*parts, *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))]
        assert list(imported.shapes)[-1] == "model.embed_tokens.weight"
        assert imported.shapes["model.layers.1.self_attn.k_proj.weight"] == (12, 24)
        assert imported.bounds == {"sequence": 64}
        assert not imported.ternary

    def test_biases_activations_and_residuals_are_found(self, tmp_path: Path) -> None:
        imported = import_model(write_checkpoint(tmp_path, QWEN2, decoder(QWEN2)))
        found = fuse_epilogues(imported.module["main"], imported.params)
        names = {p.matrix.split(".")[-2]: str(p.epilogue) for p in found if ".0." in p.matrix}
        assert names == {
            "q_proj": "bias",
            "k_proj": "bias",
            "v_proj": "bias",
            "o_proj": "residual",
            "gate_proj": "silu",
            "up_proj": "",
            "down_proj": "residual",
        }


def test_tensors_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, {**decoder(), "model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)})
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.bias.*is not used by this architecture"):
        import_model(tmp_path)
    write_checkpoint(tmp_path, {**LLAMA, "num_key_value_heads": 4}, decoder())
    with pytest.raises(ModelError, match=r"k_proj\.weight.*has shape \[12, 24\]; config\.json says \[24, 24\]"):
        import_model(tmp_path)
    write_checkpoint(tmp_path, {**LLAMA, "num_key_value_heads": 3}, decoder({**LLAMA, "num_key_value_heads": 3}))
    with pytest.raises(ModelError, match="says 4 heads for 3 of keys, expected a multiple"):
        import_model(tmp_path)
