"""Ternary weights about a mean, and what the format carries of them."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.formats import PerGroup
from tvm_ternary.formats.ternary import TernaryTensor
from tvm_ternary.quantize.asymmetric import as_bias, as_planes, fit_asymmetric, solve_grid
from tvm_ternary.quantize.methods import METHODS
from tvm_ternary.quantize.trit_planes import fit_planes


def errors(groups: np.ndarray, trits: np.ndarray, scale: np.ndarray) -> np.ndarray:
    fitted = np.einsum("pr,prl->rl", scale.astype(np.float64), trits)
    return np.asarray(((groups - fitted) ** 2).sum(axis=1))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(-3, 3))
def test_it_is_never_worse_than_the_symmetric_fit_nor_better_than_two_planes(
    seed: int, length: int, mean: float
) -> None:
    groups = (np.random.default_rng(seed).standard_normal((5, length)) + mean).astype(np.float32)
    got = errors(groups, *as_planes(fit_asymmetric(groups)))
    allowed = 1e-6 * (groups.astype(np.float64) ** 2).sum(axis=1)
    symmetric = errors(groups, *(each[None] for each in METHODS["optimal"](groups)))
    assert (got <= symmetric + allowed).all()
    fit = fit_planes(groups, 2)
    assert (errors(groups, fit.trits, fit.scale) <= got + allowed).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_the_grid_is_the_least_squares_solution(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((1, length))
    trits = rng.integers(-1, 2, (1, length), dtype=np.int8)
    scale, mean = solve_grid(w, trits, np.array([7.0]), np.array([8.0]))
    if np.ptp(trits) == 0:
        assert (scale[0], mean[0]) == (7, 8)
        return
    basis = np.stack([trits[0], np.ones(length)], axis=1)
    np.testing.assert_allclose([scale[0], mean[0]], np.linalg.lstsq(basis, w[0], rcond=None)[0], atol=1e-10)


def test_it_comes_close_to_the_best_there_is() -> None:
    groups = (np.random.default_rng(0).standard_normal((60, 5)) + 1).astype(np.float32)
    best = np.full(len(groups), np.inf)
    for trits in itertools.product((-1, 0, 1), repeat=5):
        basis = np.stack([trits, np.ones(5)], axis=1).astype(np.float64)
        residual = groups.T - basis @ np.linalg.lstsq(basis, groups.T.astype(np.float64), rcond=None)[0]
        best = np.minimum(best, (residual**2).sum(axis=0))
    got = errors(groups, *as_planes(fit_asymmetric(groups)))
    assert (got >= best - 1e-9).all()
    assert np.mean(got < best + 1e-6) > 0.5
    symmetric = errors(groups, *(each[None] for each in METHODS["optimal"](groups)))
    assert (got - best).sum() < 0.2 * (symmetric - best).sum()


def test_three_levels_about_a_mean_are_found() -> None:
    rng = np.random.default_rng(1)
    trits = rng.integers(-1, 2, (20, 64))
    groups = (0.7 + 0.3 * trits).astype(np.float32)
    fit = fit_asymmetric(groups)
    np.testing.assert_allclose(fit.mean, np.full(20, 0.7), rtol=1e-5)
    np.testing.assert_array_equal(fit.trits, trits)


def test_the_format_carries_a_mean_as_a_plane() -> None:
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((3, 64)) + 0.5).astype(np.float32)
    fit = fit_asymmetric(w.reshape(-1, 32))
    trits, scale = as_planes(fit)
    tensor = TernaryTensor.from_trits(trits.reshape(2, 3, 64), scale.reshape(2, 3, 2), PerGroup(32))
    expected = fit.mean[:, None] + fit.scale[:, None] * fit.trits
    np.testing.assert_allclose(tensor.dequantize(), expected.reshape(3, 64), rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_a_bias_keeps_what_the_means_add_on_average(seed: int, k: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, k)).astype(np.float32)
    mean = rng.standard_normal((3, -(-k // size))).astype(np.float32)
    added = x @ np.repeat(mean, size, axis=1)[:, :k].T
    np.testing.assert_allclose(as_bias(mean, size, x.mean(axis=0)), added.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-45, 3.4028235e38])
def test_the_ends_of_float32(size: float) -> None:
    groups = np.full((2, 6), size, dtype=np.float32)
    groups[1, ::2] *= -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_asymmetric(groups)
        empty = fit_asymmetric(groups[:, :0])
    np.testing.assert_allclose(fit.mean[:, None] + fit.scale[:, None] * fit.trits, groups, rtol=1e-6)
    assert empty.trits.shape == (2, 0)
    assert fit_asymmetric(groups[:0]).scale.shape == (0,)
