"""Clipping weights and activations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.quantize.clip import SHARES, clip_activations, clip_weights, round_rows
from tvm_ternary.quantize.quantizer import quantize


def rounded(w: np.ndarray) -> np.ndarray:
    """Evenly spaced levels up to each group's largest magnitude: what clipping is for."""
    n, k = w.shape
    padded = np.pad(w, ((0, 0), (0, -k % 8))).reshape(n, -1, 8)
    step = np.abs(padded).max(axis=2, keepdims=True) / 4
    step = np.where(step > 0, step, 1)
    return (np.rint(padded / step) * step).reshape(n, -1)[:, :k].astype(np.float32)


def error(d: np.ndarray, h: np.ndarray) -> float:
    return float(d.astype(np.float64) @ h @ d)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 20))
def test_each_group_has_its_best_clip(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, (n, k)).astype(np.float32)
    x = rng.standard_normal((30, k)).astype(np.float32)
    hessian = x.T @ x / 30
    got = clip_weights(w, 8, hessian, rounded)
    groups = -(-k // 8)
    assert got.share.shape == (n, groups)
    fitted = rounded(got.weight)
    for row in range(n):
        for g in range(groups):
            part = slice(8 * g, min(8 * g + 8, k))
            own, h = w[row : row + 1, part], hessian[part, part]
            largest = np.abs(own).max()
            tried = [
                error((rounded(np.clip(own, -np.float32(s) * largest, np.float32(s) * largest)) - own)[0], h)
                for s in SHARES
            ]
            mine = error(fitted[row, part] - own[0], h)
            assert mine == pytest.approx(min(tried), rel=1e-4, abs=1e-6 * float(largest) ** 2)
            np.testing.assert_array_equal(
                got.weight[row, part], np.clip(own[0], *(np.float32([-1, 1]) * got.share[row, g] * largest))
            )


def test_outliers_are_clipped_and_the_error_falls() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((50, 64)).astype(np.float32)
    w[:, 5] = 5
    hessian = np.eye(64, dtype=np.float32)
    hessian[5, 5] = 1e-4
    got = clip_weights(w, 8, hessian, rounded)
    assert got.share[:, 0].mean() < 0.6
    scale = np.sqrt(np.diag(hessian))
    assert np.linalg.norm((rounded(got.weight) - w) * scale) < 0.9 * np.linalg.norm((rounded(w) - w) * scale)


def test_the_optimal_fit_needs_no_clip_where_all_inputs_are_alike() -> None:
    w = np.random.default_rng(0).standard_normal((60, 64)).astype(np.float32)

    def ternary(w: np.ndarray) -> np.ndarray:
        return quantize(w, "t1a32g32", "optimal").dequantize()

    got = clip_weights(w, 32, np.eye(64, dtype=np.float32), ternary)
    # The optimal fit of the clipped weights is one fit of the weights, and theirs is the best there is.
    np.testing.assert_array_equal(got.weight, w)


def test_rows_are_rounded_as_the_kernels_do() -> None:
    x = np.array([[127, 1.4, -3.5, 0, 0, 2]], np.float32)
    np.testing.assert_allclose(round_rows(x, 3), [[127, 1, -4, 0, 0, 2]])
    np.testing.assert_allclose(round_rows(x, 6), [[127, 1, -4, 0, 0, 2]])
    np.testing.assert_array_equal(round_rows(np.zeros((2, 3), np.float32), 2), np.zeros((2, 3)))


def test_a_rare_large_activation_is_clipped_only_where_it_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 32)).astype(np.float32)
    x[::2, 0] = 300
    w = rng.standard_normal((16, 32)).astype(np.float32)
    kept = clip_activations(x, w, 32)
    assert kept.percent == 100
    assert kept.error == kept.plain_error
    w[:, 0] = 0
    got = clip_activations(x, w, 32)
    assert got.percent < 99
    assert got.bound < 10
    assert got.error < 0.02 * got.plain_error
    assert clip_activations(x, w, 32) == got
    # By hand.
    exact = x @ w.T
    clipped = round_rows(np.clip(x, -np.float32(got.bound), np.float32(got.bound)), 32) @ w.T
    assert got.error == pytest.approx(((clipped - exact) ** 2).mean() / (exact**2).mean(), rel=1e-4)


def test_nothing_to_clip() -> None:
    empty = clip_activations(np.zeros((3, 4), np.float32), np.ones((2, 4), np.float32), 4)
    assert (empty.percent, empty.bound, empty.error) == (100, 0, 0)
    got = clip_weights(np.zeros((2, 5), np.float32), 3, np.eye(5, dtype=np.float32), lambda w: w)
    np.testing.assert_array_equal(got.share, np.ones((2, 2)))
