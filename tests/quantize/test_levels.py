"""Levels, and the search that finds those to start from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_ternary.formats import PerChannel, PerGroup, PerTensor, Scheme
from tvm_ternary.formats.factors import LARGEST_SUM, share_scales
from tvm_ternary.quantize import quantization_error, quantize
from tvm_ternary.quantize.compensate import round_to
from tvm_ternary.quantize.fit import fit_matrix
from tvm_ternary.quantize.levels import Levels, combinations
from tvm_ternary.quantize.recipe import Recipe
from tvm_ternary.quantize.start import FACTORS, start_levels


def random_levels(seed: int, planes: int, shared: bool) -> Levels:
    generator = np.random.default_rng(seed)
    units = 1 if shared else planes
    scale = generator.standard_normal((units, 5, 3)).astype(np.float32)
    factors = generator.integers(-9, 10, (planes, 5, 3)).astype(np.int8) if shared else None
    return Levels(scale, factors, planes, 8)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [False, True])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_nearest_is_the_nearest(planes: int, shared: bool, seed: int) -> None:
    levels = random_levels(seed, planes, shared)
    x = np.random.default_rng(seed).standard_normal(5).astype(np.float32) * 5
    for column in (0, 7, 8, 20):
        chosen, value = levels.nearest(x, column)
        all_values = combinations(planes).astype(np.float32) @ levels.plane_scales[:, :, column // 8]
        np.testing.assert_allclose(np.abs(x - value), np.abs(x - all_values).min(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(value, all_values[chosen, range(5)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_values_are_scales_times_their_basis(planes: int, shared: bool) -> None:
    levels = random_levels(3, planes, shared)
    chosen = np.random.default_rng(0).integers(0, 3**planes, (5, 20)).astype(np.uint8)
    basis = levels.basis(chosen)
    spread = np.repeat(levels.scale, 8, axis=2)[:, :, :20]
    np.testing.assert_allclose(levels.values(chosen), (spread * basis).sum(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(levels.trits(chosen), np.moveaxis(combinations(planes)[chosen], 2, 0))
    np.testing.assert_array_equal(levels.apart().values(chosen), levels.values(chosen))


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_factors_are_what_the_format_holds(planes: int) -> None:
    for factors in FACTORS[planes]:
        assert sum(factors) <= LARGEST_SUM
        shared, found = share_scales(np.array(factors, np.float32)[:, None, None])
        np.testing.assert_allclose(shared * found, np.array(factors)[:, None, None], rtol=1e-6)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["", "pt", "g7", "g16", "g64"])
@given(shape=st.tuples(st.integers(1, 8), st.integers(1, 70)), seed=st.integers(0, 1000))
@settings(max_examples=8)
def test_search_is_near_the_greedy_split_or_better(planes: int, suffix: str, shape: tuple[int, int], seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    scheme = Scheme.parse(f"t{planes}a8{suffix}")
    levels = start_levels(w, planes, scheme.granularity)
    ours = np.linalg.norm(levels.values(round_to(levels, w)) - w) / np.linalg.norm(w)
    # The search has steps, and groups of a few weights can be met exactly by scales it does not try.
    assert ours <= quantization_error(w, quantize(w, scheme)) + (0.2 if shape[1] < 16 else 0.02)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_search_does_not_mind_units(size: float) -> None:
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    one, other = (start_levels(m, 2, PerGroup(32)) for m in (w, w * np.float32(size)))
    np.testing.assert_array_equal(one.factors, other.factors)
    np.testing.assert_allclose(one.scale * size, other.scale, rtol=1e-5)


def test_importance_decides() -> None:
    w = np.array([[1.0, 1.0, 0.3, 0.3]], np.float32)
    for weight, scale in (([1, 1, 0, 0], 1.0), ([0, 0, 1, 1], 0.3)):
        levels = start_levels(w, 1, PerChannel(), np.array(weight, np.float32))
        value = levels.values(round_to(levels, w))
        assert value[0, 0 if weight[0] else 2] == pytest.approx(scale)


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor(), PerGroup(4)])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty_and_single(granularity: object, shape: tuple[int, int]) -> None:
    suffix = granularity.suffix  # type: ignore[attr-defined]
    fit = fit_matrix(np.full(shape, 2.0, np.float32), Scheme.parse(f"t2a8{suffix}"), Recipe())
    assert fit.weight.shape == shape
    assert fit.error == 0
