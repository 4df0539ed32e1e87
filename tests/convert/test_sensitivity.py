"""Sensitivity: where the way to the outputs is known, the ratio is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from tests.graph.passes.small_graphs import make_module, random
from tests.models import mlp
from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.convert.sensitivity import sensitivities
from tvm_ternary.errors import InputError
from tvm_ternary.graph.importer import ImportedModel, import_onnx

RUNNER = SegmentRunner()
SAMPLES = [{"x": random(5, 8, seed=i)} for i in range(3)]


def rotation(n: int) -> np.ndarray:
    return np.linalg.qr(random(n, n))[0].astype(np.float32)


def model_of(params: dict[str, np.ndarray], build) -> ImportedModel:  # type: ignore[no-untyped-def]
    base = import_onnx(mlp((8, 4)))
    return replace(base, module=make_module({"x": ("batch", 8)}, params, build), params=params)


def test_rotations_leave_errors_as_they_are_and_outputs_count_by_their_numbers() -> None:
    def build(emit, x, a, q, b):  # type: ignore[no-untyped-def]
        return [emit(R.matmul(emit(R.matmul(x, a)), q)), emit(R.matmul(x, b))]

    model = model_of({"a": random(8, 6), "q": rotation(6), "b": random(8, 2)}, build)
    found = sensitivities(model, SAMPLES, ["a", "q", "b"], runner=RUNNER)
    assert found == pytest.approx({"a": 6 / 8, "q": 6 / 8, "b": 2 / 8}, rel=1e-4)
    assert found == sensitivities(model, SAMPLES, ["b", "q", "a"]), "the noise is of the matrix, not of the order"


def test_what_is_small_beside_a_residual_counts_little() -> None:
    def build(emit, x, a, b):  # type: ignore[no-untyped-def]
        much = emit(R.multiply(x, relax.const(np.float32(3.0))))
        return [
            emit(R.add(much, emit(R.matmul(x, a)))),
            emit(R.multiply(emit(R.matmul(x, b)), relax.const(np.float32(0)))),
        ]

    model = model_of({"a": rotation(8), "b": random(8, 3)}, build)
    found = sensitivities(model, SAMPLES, ["a", "b"], runner=RUNNER)
    x = np.concatenate([sample["x"] for sample in SAMPLES])
    share = np.square(x).sum() / np.square(3 * x + x @ rotation(8)).sum()
    assert found == pytest.approx({"a": share * 8 / 11, "b": 0.0}, rel=1e-3)


def test_a_matrix_used_twice_is_disturbed_twice() -> None:
    def build(emit, x, w):  # type: ignore[no-untyped-def]
        return [emit(R.matmul(emit(R.matmul(x, w)), w))]

    found = sensitivities(model_of({"w": rotation(8)}, build), SAMPLES, ["w"], runner=RUNNER)
    # Two independent errors, and the same size of products at both uses.
    assert found["w"] == pytest.approx(2, rel=0.3)


def test_only_what_is_wanted_is_disturbed_and_progress_ends() -> None:
    seen: list[tuple[str, int, int]] = []
    model = import_onnx(mlp((8, 6, 4)))
    found = sensitivities(model, SAMPLES, ["layers.1.weight"], progress=lambda *step: seen.append(step))
    assert list(found) == ["layers.1.weight"]
    assert seen[-1][1] == seen[-1][2]
    with pytest.raises(InputError, match="no sample"):
        sensitivities(model, [], ["layers.1.weight"])
