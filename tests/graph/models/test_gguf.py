"""GGUF files of every family: the checkpoint they were made from, its trits bit by bit, and the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.formats.i2_s import i2_s_bytes, write_gguf
from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.errors import ModelError
from tvm_ternary.formats import PerGroup, PerTensor
from tvm_ternary.graph.models.gguf import import_gguf, open_gguf
from tvm_ternary.graph.source import import_model

from .checkpoints import Arrays, feeds
from .decoders import BITNET, LINEAR, LLAMA, QWEN2, QWEN3, decoder, run_all, ternary

Q = gguf.GGMLQuantizationType
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_sub_norm": "attn_sub_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "ffn_sub_norm": "ffn_sub_norm",
}


def stored_name(name: str) -> str:
    """What GGUF calls a tensor of transformers."""
    parts = name.split(".")
    if parts[1] != "layers":
        return f"{PARTS[name.rpartition('.')[0]]}.{parts[-1]}"
    return f"blk.{parts[2]}.{PARTS[parts[-2]]}.{parts[-1]}"


def paired(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to LLaMA's queries and keys: rows i and i + d / 2 of a head become neighbours."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def metadata(config: dict[str, Any], **extra: Any) -> dict[str, Any]:
    keys = {
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "context_length": "max_position_embeddings",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
    }
    return {key: config[name] for key, name in keys.items() if name in config} | extra


def write(
    path: Path,
    config: dict[str, Any],
    arrays: Arrays,
    *,
    architecture: str = "llama",
    linear: Any = Q.F32,
    trits: dict[str, np.ndarray] | None = None,
    scales: dict[str, float] | None = None,
    more: dict[str, tuple[Any, np.ndarray]] | None = None,
    **extra: Any,
) -> Path:
    """Write a checkpoint as a GGUF file, its linear layers in a type of their own."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors: dict[str, tuple[Any, np.ndarray]] = {}
    shapes = {}
    for name, array in arrays.items():
        part = name.split(".")[-2]
        turns = architecture == "llama" and part in heads
        kind = linear if part in LINEAR and array.ndim == 2 else Q.F32
        if kind == "I2_S":
            assert trits is not None and scales is not None  # noqa: PT018
            stored = paired(trits[name], heads[part]) if turns else trits[name]
            tensors[stored_name(name)] = (kind, i2_s_bytes(stored, scales[name]))
            shapes[stored_name(name)] = array.shape
        else:
            values = paired(array, heads[part]) if turns else array
            tensors[stored_name(name)] = (kind, gguf.quants.quantize(values, kind))
    write_gguf(
        path,
        tensors | (more or {}),
        shapes=shapes,
        architecture=architecture,
        block_count=config["num_hidden_layers"],
        metadata=metadata(config, **extra),
    )
    return path


def logits_error(path: Path, config: dict[str, Any], arrays: Arrays) -> float:
    (logits,) = Compiled(import_model(path))(feeds())
    return relative_error(logits, run_all(arrays, config, feeds()))


FAMILIES = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "bitnet-b1.58": BITNET,
    "bitnet": {**BITNET, "hidden_act": "silu"},
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_the_reference(tmp_path: Path, architecture: str) -> None:
    config = FAMILIES[architecture]
    path = write(tmp_path / "tiny.gguf", config, decoder(config), architecture=architecture)
    assert logits_error(path, config, decoder(config)) < 3e-6
    imported = import_gguf(path)
    assert imported.name == "tiny"
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(imported.params[name], decoder(config)[name].T)


@pytest.mark.parametrize("kind", [Q.TQ1_0, Q.TQ2_0, "I2_S"], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "bitnet-b1.58"])
def test_ternary_matrices_come_through_bit_by_bit(tmp_path: Path, kind: Any, architecture: str) -> None:
    config = {**FAMILIES[architecture], **WIDE}
    arrays, trits, scales = ternary(decoder(config))
    path = write(
        tmp_path / "m.gguf", config, arrays, architecture=architecture, linear=kind, trits=trits, scales=scales
    )
    imported = import_gguf(path)
    assert set(imported.ternary) == set(trits)
    for name, expected in trits.items():
        tensor = imported.ternary[name]
        assert tensor.granularity == (PerTensor() if kind == "I2_S" else PerGroup(256))
        np.testing.assert_array_equal(tensor.trits()[0], expected)
        assert (tensor.scale == np.float32(scales[name])).all()
        np.testing.assert_array_equal(imported.params[name], arrays[name].T)


def test_a_ternary_file_is_the_reference(tmp_path: Path) -> None:
    config = {**LLAMA, **WIDE}
    arrays, trits, scales = ternary(decoder(config))
    path = write(tmp_path / "m.gguf", config, arrays, linear="I2_S", trits=trits, scales=scales)
    assert logits_error(path, config, arrays) < 3e-6


def test_quantized_floats_are_what_the_package_reads(tmp_path: Path) -> None:
    config = {**QWEN2, **WIDE}
    arrays = decoder(config)
    path = write(tmp_path / "m.gguf", config, arrays, architecture="qwen2", linear=Q.Q8_0)
    imported = import_gguf(path)
    assert not imported.ternary
    name = "model.layers.0.mlp.up_proj.weight"
    expected = gguf.quants.dequantize(gguf.quants.quantize(arrays[name], Q.Q8_0), Q.Q8_0)
    np.testing.assert_array_equal(imported.params[name], expected.T)


class TestScaling:
    def test_factors_of_llama3(self, tmp_path: Path) -> None:
        factors = np.array([1, 3, 8], np.float32)
        path = write(tmp_path / "m.gguf", LLAMA, decoder(), more={"rope_freqs.weight": (Q.F32, factors)})
        config, tensors = open_gguf(path)
        assert config["rope_scaling"]["short_factor"] == [1, 3, 8]
        assert "rope_freqs.weight" not in tensors.names()
        assert logits_error(path, {**LLAMA, "rope_scaling": config["rope_scaling"]}, decoder()) < 3e-6

    def test_linear(self, tmp_path: Path) -> None:
        scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
        path = write(tmp_path / "m.gguf", LLAMA, decoder(), **scaling)
        scaled = {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
        assert logits_error(path, scaled, decoder()) < 3e-6

    def test_a_linear_factor_of_one_is_none(self, tmp_path: Path) -> None:
        scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
        config, _ = open_gguf(write(tmp_path / "m.gguf", LLAMA, decoder(), **scaling))
        assert "rope_scaling" not in config

    def test_yarn(self, tmp_path: Path) -> None:
        scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
        path = write(tmp_path / "m.gguf", LLAMA, decoder(), **{f"rope.scaling.{k}": v for k, v in scaling.items()})
        config, _ = open_gguf(path)
        assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


class TestRefused:
    def test_unknown_architectures(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.gguf", LLAMA, decoder(), architecture="mamba")
        with pytest.raises(ModelError, match=r"architecture 'mamba' is not known, expected one of llama, qwen2"):
            import_gguf(path)

    def test_experts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.gguf", LLAMA, decoder(), expert_count=8)
        with pytest.raises(ModelError, match="has 8 experts"):
            import_gguf(path)

    def test_a_rotation_of_a_part_of_a_head(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.gguf", LLAMA, decoder(), **{"rope.dimension_count": 4})
        with pytest.raises(ModelError, match=r"rope\.dimension_count is 4, expected 6"):
            import_gguf(path)

    def test_tensors_that_no_one_uses_are_called_as_in_the_file(self, tmp_path: Path) -> None:
        more = {"blk.0.attn_q.scale": (Q.F32, np.ones(1, np.float32))}
        path = write(tmp_path / "m.gguf", LLAMA, decoder(), more=more)
        with pytest.raises(ModelError, match=r"m\.gguf: blk\.0\.attn_q\.scale: is not used by this architecture"):
            import_gguf(path)

    def test_missing_settings_and_tensors(self, tmp_path: Path) -> None:
        config = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
        with pytest.raises(ModelError, match="lacks max_position_embeddings"):
            import_gguf(write(tmp_path / "m.gguf", config, decoder()))
        arrays = decoder()
        del arrays["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight: is missing from the checkpoint"):
            import_gguf(write(tmp_path / "m.gguf", LLAMA, arrays))
