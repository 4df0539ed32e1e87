"""Decoders of checkpoints with keys and values of the past among their inputs: the same model in steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.graph.models.checkpoints import BERT, GPT2, bert, gpt2, write_checkpoint
from tests.graph.models.decoders import LLAMA, MISTRAL, decoder
from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.graph.models.checkpoint import import_checkpoint

FAMILIES = {
    "llama": (LLAMA, decoder(LLAMA)),
    "mistral": (MISTRAL | {"sliding_window": 4}, decoder(MISTRAL)),
    "gpt2": (GPT2, gpt2()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_are_one(family: str, tmp_path: Path) -> None:
    config, arrays = FAMILIES[family]
    model = Compiled(import_checkpoint(write_checkpoint(tmp_path, config, arrays), past=True))
    random = np.random.default_rng(0)
    past, length, split = 3, 6, 2
    names = [spec.name for spec in model.imported.inputs]
    given = {
        spec.name: random.standard_normal((2, past, *spec.shape[2:])).astype(np.float32)
        for spec in model.imported.inputs[2:]
    }
    ids = random.integers(0, 50, (2, length))
    mask = np.ones((2, past + length), np.int64)
    mask[0, 0] = 0
    whole, *present = model({"input_ids": ids, "attention_mask": mask, **given})
    first, *middle = model({"input_ids": ids[:, :split], "attention_mask": mask[:, : past + split], **given})
    states = dict(zip(names[2:], middle, strict=True))
    second, *end = model({"input_ids": ids[:, split:], "attention_mask": mask, **states})
    assert relative_error(np.concatenate([first, second], axis=1), whole) <= 1e-5
    for got, want in zip(end, present, strict=True):
        assert relative_error(got, want) <= 1e-5


def test_positions_go_on_behind_the_past(tmp_path: Path) -> None:
    """The mask hides a past of another content: what is left is a text whose first position is not 0."""
    config, arrays = FAMILIES["gpt2"]
    model = Compiled(import_checkpoint(write_checkpoint(tmp_path, config, arrays), past=True))
    ids, past = np.array([[5, 9]]), 2
    states: dict[str, Any] = {
        spec.name: np.zeros((1, past, *spec.shape[2:]), np.float32) for spec in model.imported.inputs[2:]
    }
    mask = np.array([[0, 0, 1, 1]])
    moved, *_ = model({"input_ids": ids, "attention_mask": mask, **states})
    shifted = dict(arrays)
    table = "transformer.wpe.weight"
    shifted[table] = np.roll(arrays[table], -past, axis=0)
    other = Compiled(import_checkpoint(write_checkpoint(tmp_path / "shifted", config, shifted)))
    (wanted,) = other({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert relative_error(moved, wanted) <= 1e-5


def test_an_encoder_has_none(tmp_path: Path) -> None:
    model = import_checkpoint(write_checkpoint(tmp_path, BERT, bert()), past=True)
    assert [spec.shape for spec in model.inputs] == [("batch", "sequence")] * 3
