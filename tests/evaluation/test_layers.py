"""Errors of matrices from second moments, against outputs computed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_ternary.analysis import accuracy
from tvm_ternary.evaluation.layers import matrix_errors
from tvm_ternary.quantize import quantize

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("scheme", ["t1a8", "t3a8g32"])
def test_second_moments_give_what_outputs_give(scheme: str) -> None:
    weight = RANDOM.standard_normal((24, 64)).astype(np.float32)
    x = (RANDOM.standard_normal((500, 64)) * RANDOM.uniform(0, 3, 64)).astype(np.float32)
    ternary = quantize(weight, scheme)
    errors = matrix_errors(weight, ternary, (x.T @ x / len(x)).astype(np.float32))
    given = ternary.dequantize()
    assert errors.weight_error == pytest.approx(accuracy.relative_error(weight, given))
    assert errors.weight_cosine == pytest.approx(accuracy.cosine(weight, given))
    assert errors.output_error == pytest.approx(accuracy.relative_error(x @ weight.T, x @ given.T), rel=1e-4)
    assert errors.output_cosine == pytest.approx(accuracy.cosine(x @ weight.T, x @ given.T), rel=1e-5)


def test_a_matrix_that_is_ternary_already_has_no_error() -> None:
    weight = RANDOM.integers(-1, 2, (8, 16)).astype(np.float32)
    errors = matrix_errors(weight, quantize(weight, "t1a8"), np.eye(16, dtype=np.float32))
    assert (errors.weight_error, errors.output_error, errors.output_cosine) == (0.0, 0.0, 1.0)


def test_inputs_that_were_not_observed_or_are_zero() -> None:
    weight = RANDOM.standard_normal((8, 16)).astype(np.float32)
    ternary = quantize(weight, "t1a8")
    assert matrix_errors(weight, ternary, None).output_error is None
    # No input, no output, no error.
    assert matrix_errors(weight, ternary, np.zeros((16, 16), np.float32)).output_error == 0
    # What the float matrix maps to zero and the ternary one does not.
    null = np.linalg.svd(weight.astype(np.float64))[2][-1]
    errors = matrix_errors(weight, ternary, np.outer(null, null))
    assert errors.output_error is not None
    assert errors.output_error > 1e3 or math.isinf(errors.output_error)
