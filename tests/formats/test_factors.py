"""Scales with whole ratios: how near they are, and that nothing else changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.strategies import granularities, make_tensor
from tvm_ternary.formats import Granularity, share_scales, with_shared_scales
from tvm_ternary.formats.factors import LARGEST_SUM


def random_scales(planes: int, groups: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1, 1], (planes, groups))
    return (signs * np.exp(rng.normal(0, 2, (planes, groups)))).astype(np.float32)


@given(planes=st.integers(2, 4), groups=st.integers(1, 50), seed=st.integers(0, 100))
def test_no_scale_moves_beyond_the_bound(planes: int, groups: int, seed: int) -> None:
    """max |s| / (2 floor(63 / r)), r the sum of the sizes over the largest, in the root of the sum of squares: rounding
    by the q of the bound is one of the choices, and the chosen one has the smallest squared error."""
    scale = random_scales(planes, groups, seed)
    shared, factors = share_scales(scale)
    size = np.abs(scale.astype(np.float64))
    largest = size.max(axis=0)
    step = largest / (2 * np.floor(LARGEST_SUM / (size.sum(axis=0) / largest)))
    error = np.linalg.norm(shared.astype(np.float64) * factors - scale, axis=0)
    assert (error <= step * np.sqrt(planes) + largest * 2**-23).all()
    assert (np.abs(factors.astype(int)).sum(axis=0) <= LARGEST_SUM).all()
    assert (shared >= 0).all()


def test_the_nearest_of_all_is_found() -> None:
    """Against every pair of factors, each with its best common scale."""
    scale = random_scales(2, 20, seed=1)
    shared, factors = share_scales(scale)
    pairs = [(a, b) for a, b in itertools.product(range(-63, 64), repeat=2) if 0 < abs(a) + abs(b) <= LARGEST_SUM]
    whole = np.array(pairs, np.float64)
    for column in range(scale.shape[1]):
        wanted = scale[:, column].astype(np.float64)
        best = whole @ wanted / (whole**2).sum(axis=1)
        errors = np.linalg.norm(whole * best[:, None] - wanted, axis=1)
        found = np.linalg.norm(shared[column] * factors[:, column].astype(np.float64) - wanted)
        # The largest plane's factor runs through all values here and there, its sign being the scale's.
        assert found <= errors.min() + 1e-6 * np.abs(wanted).max()


def test_whole_ratios_are_kept() -> None:
    scale = np.float32([[9, 0, -4], [3, 0, 2], [1, 0, 1]]) * np.float32(0.125)
    shared, factors = share_scales(scale)
    np.testing.assert_array_equal(shared * factors, scale)
    assert shared[1] == 0


def test_one_plane_keeps_its_scale() -> None:
    scale = random_scales(1, 7, seed=0)
    shared, factors = share_scales(scale)
    np.testing.assert_array_equal(shared, scale[0])
    assert (factors == 1).all()


@pytest.mark.parametrize("planes", [1, 2, 4])
@given(kind=granularities)
def test_a_weight_changes_in_its_scales_alone_and_only_once(planes: int, kind: Granularity) -> None:
    weight = make_tensor(9, 40, kind, planes, seed=3)
    once = with_shared_scales(weight)
    np.testing.assert_array_equal(once.planes, weight.planes)
    assert (once.shape, once.granularity, once.scale.shape) == (weight.shape, weight.granularity, weight.scale.shape)
    again = with_shared_scales(once)
    np.testing.assert_allclose(again.scale, once.scale, rtol=0, atol=np.abs(weight.scale).max() * 2**-21)
