"""Decoders with a past, whose samples have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.graph.passes.test_cache_attention import grouped
from tests.graph.passes.test_unstack_pasts import WIDTH, model, one_operator
from tests.models import gpt2
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.convert.samples import given_names
from tvm_ternary.convert.whole_texts import model_for
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.source import import_model


@pytest.mark.parametrize(
    ("spelled", "left"),
    [
        (gpt2(cache="both"), ["input_ids"]),
        (grouped(), ["q", "k", "v", "mask"]),
        (model(one_operator()), ["x"]),
    ],
    ids=["gpt2", "grouped-query", "stacked"],
)
def test_the_past_is_left_out(spelled: onnx.ModelProto, left: list[str]) -> None:
    imported = import_onnx(spelled)
    whole = model_for(imported, left)
    assert [spec.name for spec in whole.inputs] == left
    assert len(whole.outputs) == 1
    assert whole.shapes == imported.shapes


def test_models_that_stay_as_they_are() -> None:
    decoder = import_onnx(gpt2(cache="both"))
    assert model_for(decoder, {"input_ids", "past.0.key"}) is decoder
    fixed = import_onnx(gpt2(cache="both"), {"past": 8})
    assert model_for(fixed, set()) is fixed
    without = import_onnx(gpt2())
    assert model_for(without, set()) is without


def test_names_that_samples_have() -> None:
    assert given_names(["a text", {"text": "another"}]) == set()
    assert given_names([{"ids": [1], "mask": [1]}, {"past": [0]}]) == {"ids", "mask", "past"}


def test_a_decoder_is_calibrated_on_whole_texts(tmp_path: Path) -> None:
    """What its matrix is fitted to is what it multiplies: the samples, which are its only other input."""
    onnx.save(model(one_operator()), tmp_path / "m.onnx")
    samples = [np.random.default_rng(n).standard_normal((1, 9, WIDTH), np.float32) for n in range(2)]
    options: dict[str, Any] = {"edges": "same", "output_layer": "same", "recipe": {"method": "absmean"}}
    options["dims"] = {"batch": 1, "new": 9}
    given = ({"x": x} for x in samples)
    done = quantize_model(tmp_path / "m.onnx", tmp_path / "out", calibration=given, scheme="t1a8", **options)
    before, after = (import_model(path).params["w"] for path in (tmp_path / "m.onnx", tmp_path / "out"))
    products = [np.concatenate(samples).astype(np.float64).reshape(-1, WIDTH) @ w for w in (before, after)]
    moved = np.linalg.norm(products[1] - products[0]) / np.linalg.norm(products[0])
    assert done.layers[0].output_error == pytest.approx(moved, rel=1e-4)
