"""Activation-aware scaling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import LayoutError
from tvm_ternary.quantize.compensate import row_errors
from tvm_ternary.quantize.observers import Observer, Statistics
from tvm_ternary.quantize.quantizer import quantize
from tvm_ternary.quantize.scaling import search_scaling


def ternary(w: np.ndarray) -> np.ndarray:
    return quantize(w, "t1a32g16", "optimal").dequantize()


def observed(rng: np.random.Generator, k: int, outliers: int) -> Statistics:
    x = rng.standard_normal((200, k)).astype(np.float32)
    x[:, :outliers] *= 30
    observer = Observer(k)
    observer.update(x)
    return observer.statistics()


@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.booleans())
def test_it_never_loses_and_says_what_it_gains(seed: int, outliers: int, dead: bool) -> None:
    rng = np.random.default_rng(seed)
    statistics = observed(rng, 32, outliers)
    weights = [rng.standard_normal((n, 32)).astype(np.float32) for n in (5, 9)]
    for w in weights:
        w[:, -1] *= not dead
    got = search_scaling(weights, statistics, ternary)
    assert got.input_scale.dtype == np.float32
    assert (got.input_scale > 0).all()
    assert got.error <= got.plain_error
    # The same once more, by hand.
    w, h = np.concatenate(weights), statistics.hessian
    assert h is not None
    size = row_errors(w, h).sum()
    assert row_errors(ternary(w) - w, h).sum() / size == pytest.approx(got.plain_error, rel=1e-6)
    fitted = ternary((w / got.input_scale).astype(np.float32)) * got.input_scale
    assert row_errors(fitted - w, h).sum() / size == pytest.approx(got.error, rel=1e-2)


def test_large_inputs_are_made_smaller_and_the_error_with_them() -> None:
    rng = np.random.default_rng(0)
    statistics = observed(rng, 64, 2)
    got = search_scaling([rng.standard_normal((100, 64)).astype(np.float32)], statistics, ternary)
    assert got.exponents[0] > 0
    assert got.input_scale[:2].max() < 0.5 * got.input_scale[2:].min()
    assert got.error < 0.5 * got.plain_error


def test_what_cannot_gain_stays_as_it_is() -> None:
    statistics = observed(np.random.default_rng(0), 8, 1)
    got = search_scaling([np.ones((3, 8), np.float32)], statistics, lambda w: w)
    np.testing.assert_array_equal(got.input_scale, np.ones(8))
    assert got.exponents == (0, 0)
    zero = search_scaling([np.zeros((3, 8), np.float32)], statistics, ternary)
    np.testing.assert_array_equal(zero.input_scale, np.ones(8))


def test_another_width_is_refused() -> None:
    statistics = observed(np.random.default_rng(0), 8, 0)
    with pytest.raises(LayoutError, match=r"weights: shape \(3, 9\), expected 8 columns"):
        search_scaling([np.zeros((3, 9), np.float32)], statistics, ternary)
