"""GPT-2 against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.errors import ModelError
from tvm_ternary.graph.passes.fuse_epilogues import fuse_epilogues
from tvm_ternary.graph.source import import_model

from .checkpoints import GPT2, feeds, gpt2, run_gpt2, write_checkpoint


def expected(given: dict[str, np.ndarray]) -> np.ndarray:
    rows = zip(given["input_ids"], given["attention_mask"], strict=True)
    return np.stack([run_gpt2(gpt2(prefix=""), GPT2, *row) for row in rows])


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_is_the_reference_at_several_lengths(tmp_path: Path, prefix: str) -> None:
    compiled = Compiled(import_model(write_checkpoint(tmp_path, GPT2, gpt2(prefix=prefix))))
    for length in (1, 7, 16):
        (logits,) = compiled(feeds(length))
        assert relative_error(logits, expected(feeds(length))) < 2e-6


def test_padding_before_a_sequence_is_masked(tmp_path: Path) -> None:
    given = feeds()
    given["attention_mask"][1] = [0, 0, 1, 1, 1, 1, 1]
    (logits,) = Compiled(import_model(write_checkpoint(tmp_path, GPT2, gpt2())))(given)
    assert relative_error(logits, expected(given)) < 2e-6


def test_matrices_stored_by_rows_of_inputs_keep_their_name(tmp_path: Path) -> None:
    arrays = gpt2()
    imported = import_model(write_checkpoint(tmp_path, GPT2, arrays))
    name = "transformer.h.0.attn.c_attn.weight"
    assert imported.shapes[name] == (72, 24)
    np.testing.assert_array_equal(imported.params[name], arrays[name])
    assert list(imported.params)[-1] == "transformer.wte.weight"


def test_biases_activations_and_residuals_are_found(tmp_path: Path) -> None:
    imported = import_model(write_checkpoint(tmp_path, GPT2, gpt2()))
    found = fuse_epilogues(imported.module["main"], imported.params)
    first = {p.matrix.removeprefix("transformer.h.0."): str(p.epilogue) for p in found if ".h.0." in p.matrix}
    assert first == {
        "attn.c_attn.weight": "bias",
        "attn.c_proj.weight": "bias + residual",
        "mlp.c_fc.weight": "bias + gelu_tanh",
        "mlp.c_proj.weight": "bias + residual",
    }


class TestOutputLayer:
    def write(self, folder: Path, change: float, **settings: Any) -> Path:
        arrays = gpt2()
        arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + np.float32(change)
        return write_checkpoint(folder, {**GPT2, **settings}, arrays)

    def test_given_twice_is_one(self, tmp_path: Path) -> None:
        imported = import_model(self.write(tmp_path, 0))
        assert "lm_head.weight" not in imported.params
        (logits,) = Compiled(imported)(feeds())
        assert relative_error(logits, expected(feeds())) < 2e-6

    def test_given_twice_and_different_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"lm_head.weight: differs from transformer.wte.weight.*tie_word_emb"):
            import_model(self.write(tmp_path, 0.5))

    def test_not_tied_is_its_own(self, tmp_path: Path) -> None:
        imported = import_model(self.write(tmp_path, 0.5, tie_word_embeddings=False))
        (logits,) = Compiled(imported)(feeds())
        own, shared = imported.params["lm_head.weight"], gpt2()["transformer.wte.weight"].T
        np.testing.assert_array_equal(own, shared + np.float32(0.5))
        assert relative_error(logits, expected(feeds())) > 0.1

    def test_old_checkpoints_hold_their_masks(self, tmp_path: Path) -> None:
        mask = np.tril(np.ones((1, 1, 16, 16), np.uint8))
        buffers = {f"transformer.h.{i}.attn.{name}": mask for i in range(2) for name in ("bias", "masked_bias")}
        import_model(write_checkpoint(tmp_path, GPT2, {**gpt2(), **buffers}))
