"""Matrices that are ternary already come through bit-exact, others are not taken for such."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tvm_ternary.formats import Granularity, PerChannel, PerGroup, PerTensor, granularity
from tvm_ternary.quantize import recognise

KINDS: list[Granularity] = [PerGroup(7), PerChannel(), PerTensor()]


def ternary_matrix(n: int, k: int, kind: Granularity, seed: int) -> np.ndarray:
    """Make s * {-1, 0, 1} with a scale of its own, over many orders of magnitude, in each unit."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-80, 80, kind.scale_shape(n, k))).astype(np.float32)
    return rng.integers(-1, 2, (n, k)).astype(np.float32) * np.broadcast_to(kind.spread(scale, k), (n, k))


@pytest.fixture(params=[1, 30, granularity.BLOCK_ELEMENTS], ids=["rows", "blocks", "whole"])
def _elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granularity, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(n=st.integers(0, 12), k=st.integers(0, 30), seed=st.integers(0, 2**32 - 1))
def test_a_ternary_matrix_comes_through(kind: Granularity, n: int, k: int, seed: int) -> None:
    w = ternary_matrix(n, k, kind, seed)
    found = recognise(w, KINDS)
    assert found is not None
    assert found.num_planes == 1
    assert found.granularity in KINDS[KINDS.index(kind) :], "not finer than what it was made with"
    np.testing.assert_array_equal(found.dequantize(), w)
    np.testing.assert_array_equal(found.trits()[0], np.sign(w))


@pytest.mark.usefixtures("_elements")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_coarsest_granularity_is_found_in_any_order(kind: Granularity) -> None:
    w = ternary_matrix(10, 30, kind, 0)
    for order in (KINDS, KINDS[::-1], [*KINDS, PerGroup(14), PerGroup(1)]):
        found = recognise(w, order)
        assert found is not None
        assert found.granularity == kind
        np.testing.assert_array_equal(found.dequantize(), w)


def test_wide_groups_are_tried_before_narrow_ones() -> None:
    w = ternary_matrix(10, 56, PerGroup(14), 0)
    found = recognise(w, [PerGroup(7), PerGroup(14), PerGroup(28)])
    assert found is not None
    assert found.granularity == PerGroup(14)


@pytest.mark.usefixtures("_elements")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("row", [0, 4, 9])
def test_one_other_value_is_enough_to_refuse(kind: Granularity, row: int) -> None:
    w = np.full((10, 30), 0.5, dtype=np.float32)
    assert recognise(w, [kind]) is not None
    for value in (np.nextafter(np.float32(0.5), np.float32(1)), np.nextafter(np.float32(0.5), np.float32(0)), 1e-45):
        w[row, 8] = -value
        assert recognise(w, [kind]) is None
    for value in (np.nan, np.inf, -np.inf):
        w[row, 8] = value
        assert recognise(w, [kind, PerGroup(1)]) is None


@pytest.mark.usefixtures("_elements")
@pytest.mark.parametrize("magnitudes", [[0, 1, 1, 2], [0, 2, 2, 1], [1, 2, 0, 0]])
def test_rows_of_two_magnitudes_are_not_ternary_per_tensor(magnitudes: list[float]) -> None:
    w = np.repeat(np.array(magnitudes, dtype=np.float32)[:, None], 30, axis=1)
    assert recognise(w, [PerTensor()]) is None
    assert recognise(w, [PerChannel()]) is not None


@given(st.integers(1, 6), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_normal_weights_are_not_ternary(n: int, k: int, seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    assume(len(np.unique(np.abs(w[0]))) > 1)
    assert recognise(w, [PerTensor(), PerChannel()]) is None


def test_negative_zero_counts_as_zero() -> None:
    w = np.array([[-0.0, 2.0, -2.0]], dtype=np.float32)
    found = recognise(w, [PerChannel()])
    assert found is not None
    np.testing.assert_array_equal(found.dequantize(), w)
    assert not np.signbit(found.dequantize()[0, 0])


def test_zeros_have_scale_zero() -> None:
    found = recognise(np.zeros((3, 5), np.float32), [PerChannel(), PerTensor()])
    assert found is not None
    assert found.granularity == PerTensor()
    np.testing.assert_array_equal(found.scale, np.zeros((1, 1, 1)))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int64"])
def test_other_dtypes_with_float32_values(dtype: str) -> None:
    w = np.array([[3, -3, 0], [0, 0, 7]], dtype=dtype)
    found = recognise(w, [PerTensor(), PerChannel()])
    assert found is not None
    assert found.granularity == PerChannel()
    np.testing.assert_array_equal(found.dequantize(), w)


@pytest.mark.parametrize("value", [0.1, 1e300, 1e-50, 2.0**24 + 1])
def test_float64_values_that_float32_lacks_are_refused(value: float) -> None:
    w = np.array([[value, -value, 0]])
    assert recognise(w, [PerChannel()]) is None
    if value < float(np.finfo(np.float32).max):
        assert recognise(w.astype(np.float32), [PerChannel()]) is not None
