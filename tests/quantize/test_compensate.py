"""Compensation: each step against a slow one, and never upwards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_ternary.formats import PerGroup
from tvm_ternary.quantize.compensate import Metric, first_trits, refit, round_to, row_errors, sweep, with_shift
from tvm_ternary.quantize.levels import Levels
from tvm_ternary.quantize.start import start_levels

N, K = 9, 50


def matrices(seed: int, k: int = K, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, K), and the second moment of correlated inputs."""
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((rank or k, k)) * np.exp(generator.standard_normal(k))
    x = generator.standard_normal((4 * k, rank or k)) @ mix
    w = generator.standard_normal((N, k))
    return w.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def levels_of(w: np.ndarray, planes: int, size: int = 16, *, shared: bool = True) -> Levels:
    levels = start_levels(w, planes, PerGroup(size))
    return levels if shared else levels.apart()


def error(w: np.ndarray, levels: Levels, chosen: np.ndarray, metric: Metric) -> float:
    return float(row_errors(levels.values(chosen) - w, metric.hessian).sum())


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_is_of_the_inverse(act_order: bool) -> None:
    _, h = matrices(0)
    metric = Metric.of(h, damping=0.01, act_order=act_order)
    damped = h.astype(np.float64) + 0.01 * np.diag(h).mean() * np.eye(K)
    np.testing.assert_allclose(metric.hessian, damped, rtol=1e-5, atol=1e-6 * np.abs(h).max())
    u = metric.inverse.astype(np.float64)
    assert not np.tril(u, -1).any()
    ordered = damped[np.ix_(metric.order, metric.order)]
    np.testing.assert_allclose(u.T @ u @ ordered, np.eye(K), atol=1e-3)
    assert sorted(metric.order) == list(range(K))
    if act_order:
        assert (np.diff(np.diag(h)[metric.order]) <= 0).all()


def slow_gptq(w: np.ndarray, levels: Levels, h: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Column by column, the inverse of what is left computed anew each time (Frantar et al., eq. (2) and (3))."""
    rest = w.astype(np.float64).copy()
    chosen = np.empty(w.shape, dtype=np.uint8)
    for i, column in enumerate(order):
        left = order[i:]
        inverse = np.linalg.inv(h[np.ix_(left, left)].astype(np.float64))
        chosen[:, column], value = levels.nearest(rest[:, column].astype(np.float32), column)
        wrong = (rest[:, column] - value) / inverse[0, 0]
        rest[:, left] -= wrong[:, None] * inverse[0]
    return chosen


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_first_trits_are_gptq(planes: int, block: int) -> None:
    w, h = matrices(planes)
    metric, levels = Metric.of(h, damping=0.01), levels_of(w, planes)
    got = first_trits(w, levels, metric, block)
    expected = slow_gptq(w, levels, metric.hessian, metric.order)
    # A tie that float32 rounds otherwise changes all behind it in its row; that is one row at most here.
    assert (got != expected).any(axis=1).sum() <= 1


def test_without_correlation_first_trits_are_rounded() -> None:
    w, _ = matrices(3)
    h = np.diag(np.arange(1, K + 1)).astype(np.float32)
    levels = levels_of(w, 2)
    np.testing.assert_array_equal(first_trits(w, levels, Metric.of(h)), round_to(levels, w))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_every_step_lowers_the_error(planes: int, shared: bool) -> None:
    w, h = matrices(10 + planes)
    metric, levels = Metric.of(h), levels_of(w, planes, shared=shared)
    chosen = first_trits(w, levels, metric)
    errors = [error(w, levels, chosen, metric)]
    for _ in range(3):
        levels = refit(w, levels, chosen, metric)
        errors.append(error(w, levels, chosen, metric))
        sweep(w, levels, chosen, metric)
        errors.append(error(w, levels, chosen, metric))
    # Rounding of float32 sums: 2^-24 for each of K terms, of the weights' own products.
    slack = K * 2.0**-24 * float(row_errors(w, metric.hessian).sum())
    assert (np.diff(errors) <= slack).all(), errors
    assert errors[-1] < 0.9 * errors[0]


def test_after_enough_sweeps_no_single_weight_can_be_bettered() -> None:
    w, h = matrices(20)
    metric, levels = Metric.of(h), levels_of(w, 1)
    chosen = round_to(levels, w)
    while sweep(w, levels, chosen, metric, block=16):
        pass
    least = row_errors(levels.values(chosen) - w, metric.hessian)
    for column in range(K):
        for combination in range(3):
            other = chosen.copy()
            other[:, column] = combination
            assert (row_errors(levels.values(other) - w, metric.hessian) >= least * (1 - 1e-4)).all()


@pytest.mark.parametrize("block", [1, 16, 128])
def test_blocks_do_not_change_a_sweep(block: int) -> None:
    w, h = matrices(21)
    metric, levels = Metric.of(h), levels_of(w, 2)
    one, other = round_to(levels, w), round_to(levels, w)
    sweep(w, levels, one, metric, block=K)
    sweep(w, levels, other, metric, block=block)
    assert (one != other).any(axis=1).sum() <= 1


@pytest.mark.parametrize(("planes", "shared"), [(1, True), (2, True), (2, False), (3, False)])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_refit_is_least_squares(planes: int, shared: bool, seed: int) -> None:
    w, h = matrices(seed)
    metric, levels = Metric.of(h), levels_of(w, planes, shared=shared)
    chosen = round_to(levels, w)
    fitted = refit(w, levels, chosen, metric)
    root = np.linalg.cholesky(metric.hessian.astype(np.float64)).T
    basis = levels.basis(chosen)
    for row in range(N):
        columns = []
        for unit in basis[:, row]:
            for g in range(levels.groups):
                part = np.zeros(K)
                part[g * 16 : (g + 1) * 16] = unit[g * 16 : (g + 1) * 16]
                columns.append(root @ part)
        solved, *_ = np.linalg.lstsq(np.array(columns).T, root @ w[row].astype(np.float64), rcond=1e-6)
        best = np.linalg.norm(np.array(columns).T @ solved - root @ w[row]) ** 2
        got = row_errors((fitted.values(chosen) - w)[row : row + 1], metric.hessian)[0]
        assert got <= best * (1 + 1e-3) + 1e-5


def test_singular_moments_are_damped_until_they_factor() -> None:
    _, h = matrices(30, rank=5)
    metric = Metric.of(h, damping=0.0)
    assert metric.damping > 0
    assert np.isfinite(metric.inverse).all()


def test_inputs_that_are_always_zero_round_to_the_nearest() -> None:
    w, h = matrices(31)
    h[:, 7] = h[7] = 0
    metric, levels = Metric.of(h), levels_of(w, 2)
    chosen = first_trits(w, levels, metric)
    np.testing.assert_array_equal(chosen[:, 7], levels.nearest(np.ascontiguousarray(w[:, 7]), 7)[0])


def test_no_inputs_at_all() -> None:
    w, _ = matrices(32)
    metric, levels = Metric.of(np.zeros((K, K), np.float32)), levels_of(w, 2)
    np.testing.assert_array_equal(first_trits(w, levels, metric), round_to(levels, w))


@pytest.mark.parametrize("act_order", [False, True])
def test_shift_makes_up_for_moved_inputs(act_order: bool) -> None:
    generator = np.random.default_rng(0)
    f = generator.standard_normal((400, K))
    x = f @ (np.eye(K) + 0.1 * generator.standard_normal((K, K)))
    w, _ = matrices(0)
    metric = Metric.of((x.T @ x / 400).astype(np.float32), damping=1e-6, act_order=act_order)
    drift = ((f - x).T @ x / 400).astype(np.float32)
    solved = np.linalg.lstsq(x, f @ w.T, rcond=None)[0].T
    for share in (0.0, 0.5, 1.0):
        shift = with_shift(metric, drift, share).shift
        assert shift is not None
        np.testing.assert_allclose(w + w @ shift, w + share * (solved - w), atol=2e-3)
