"""The joint least-squares fit of scales."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.quantize import refit_scales


def errors(groups: np.ndarray, trits: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Squared error of each group, the plain way."""
    fitted = np.einsum("pr,prl->rl", scale.astype(np.float64), trits.astype(np.float64))
    return ((groups.astype(np.float64) - fitted) ** 2).sum(axis=1)


@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_the_fit_is_the_least_squares_solution(planes: int, rows: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.standard_normal((rows, length), dtype=np.float32)
    trits = rng.integers(-1, 2, (planes, rows, length), dtype=np.int8)
    start = rng.standard_normal((planes, rows), dtype=np.float32)
    got = refit_scales(groups, trits, start)
    assert got.dtype == np.float32
    assert got.shape == start.shape
    best = np.empty((planes, rows))
    for row in range(rows):
        best[:, row] = np.linalg.lstsq(trits[:, row].T.astype(np.float64), groups[row].astype(np.float64), rcond=None)[
            0
        ]
    # Rounding scales to float32 costs |T|^2 * (2^-24 |s|)^2 at most, far below this share of the weights' square.
    allowed = errors(groups, trits, best) + 1e-9 * (groups.astype(np.float64) ** 2).sum(axis=1)
    assert (errors(groups, trits, got) <= allowed).all()


def test_a_fit_by_hand() -> None:
    groups = np.array([[3, 1, -1, 0]], dtype=np.float32)
    trits = np.array([[[1, 1, 0, 0]], [[1, 0, -1, 0]]], dtype=np.int8)
    # Normal equations: 2a + b = 4, a + 2b = 4.
    np.testing.assert_allclose(refit_scales(groups, trits, np.zeros((2, 1), np.float32)), [[4 / 3], [4 / 3]], rtol=1e-7)


def test_a_solution_that_is_no_better_is_not_taken() -> None:
    groups = np.array([[1, 1], [3, 3]], dtype=np.float32)
    trits = np.ones((2, 2, 2), dtype=np.int8)
    start = np.array([[0.75, 0.0], [0.25, 0.0]], dtype=np.float32)
    got = refit_scales(groups, trits, start)
    # The first group was exact with unequal scales and keeps them; the second is improved. Equal planes do not matter.
    np.testing.assert_array_equal(got[:, 0], start[:, 0])
    np.testing.assert_allclose(got[:, 1], [1.5, 1.5], rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-45, 3.4028235e38])
def test_the_ends_of_float32(size: float) -> None:
    groups = np.full((2, 64), size, dtype=np.float32)
    groups[1, ::2] *= -1
    trits = np.zeros((3, 2, 64), dtype=np.int8)
    trits[0] = np.sign(groups) if size else 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = refit_scales(groups, trits, np.zeros((3, 2), np.float32))
    np.testing.assert_allclose(got[0], np.full(2, np.float32(size)), rtol=1e-6)
    np.testing.assert_array_equal(got[1:], np.zeros((2, 2)))


def test_a_solution_beyond_float32_is_not_taken() -> None:
    largest = np.finfo(np.float32).max
    # Only a = 2 * largest, b = -largest solves this.
    groups = np.array([[largest, 0, -largest]], dtype=np.float32)
    trits = np.array([[[1, 0, 0]], [[1, 0, 1]]], dtype=np.int8)
    start = np.full((2, 1), 0.25 * largest, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(refit_scales(groups, trits, start), start)
