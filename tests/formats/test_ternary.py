"""The canonical form: bit planes and scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats import PerChannel, PerGroup, PerTensor, TernaryTensor

from .strategies import assert_same, block_elements, blocks, grid, tensors


def slow_trit(tensor: TernaryTensor, p: int, n: int, k: int) -> int:
    """Read one trit as the format's description says."""
    plus, minus = ((int(tensor.planes[p, half, n, k // 64]) >> (k % 64)) & 1 for half in (0, 1))
    return plus - minus


def check_bits(tensor: TernaryTensor) -> None:
    """Compare trits with the description, and pack them again."""
    trits = tensor.trits()
    assert trits.dtype == np.int8
    assert trits.shape == (tensor.num_planes, *tensor.shape)
    for (p, n, k), trit in np.ndenumerate(trits):
        assert trit == slow_trit(tensor, p, n, k)
    assert_same(TernaryTensor.from_trits(trits, tensor.scale, tensor.granularity), tensor)


@given(tensors())
def test_trits_stand_at_the_documented_bits(tensor: TernaryTensor) -> None:
    check_bits(tensor)


def test_trits_stand_at_the_documented_bits_at_every_boundary() -> None:
    for tensor in grid():
        check_bits(tensor)


@given(tensors(), st.slices(40))
def test_rows_are_rows_of_the_whole(tensor: TernaryTensor, rows: slice) -> None:
    np.testing.assert_array_equal(tensor.trits(rows), tensor.trits()[:, rows])
    np.testing.assert_array_equal(tensor.dequantize(rows), tensor.dequantize()[rows])


@given(tensors(), blocks)
def test_dequantize_sums_planes_in_float32_in_order(tensor: TernaryTensor, elements: int) -> None:
    with block_elements(elements):
        got = tensor.dequantize()
    assert got.dtype == np.float32
    assert got.shape == tensor.shape
    trits, size = tensor.trits(), tensor.granularity.group_size(tensor.shape[1])
    for (n, k), value in np.ndenumerate(got):
        expected = np.float32(0)
        for p in range(tensor.num_planes):
            row = min(n, tensor.scale.shape[1] - 1)
            expected = expected + np.float32(trits[p, n, k]) * tensor.scale[p, row, k // size]
        assert value == expected


@given(tensors())
def test_sparsity_counts_zero_trits(tensor: TernaryTensor) -> None:
    trits = tensor.trits()
    expected = [float(np.mean(plane == 0)) if plane.size else 0.0 for plane in trits]
    assert tensor.sparsity == pytest.approx(expected, abs=1e-12)


def make(planes: int, n: int, k: int, granularity: Any) -> dict[str, Any]:
    """Arguments of a valid tensor of zeros, to be spoilt one at a time."""
    return {
        "planes": np.zeros((planes, 2, n, -(-k // 64)), dtype=np.uint64),
        "scale": np.zeros((planes, *granularity.scale_shape(n, k)), dtype=np.float32),
        "shape": (n, k),
        "granularity": granularity,
    }


def test_sizes_of_a_hand_counted_tensor() -> None:
    tensor = TernaryTensor(**make(2, 3, 100, PerGroup(40)))
    assert tensor.num_planes == 2
    assert tensor.nbytes == 2 * 2 * 3 * 2 * 8 + 2 * 3 * 3 * 4
    assert tensor.bits_per_weight == 2 * 2 + 32 * (2 * 3 * 3) / 300
    assert tensor.sparsity == (1.0, 1.0)
    assert TernaryTensor(**make(1, 128, 128, PerTensor())).bits_per_weight == 2 + 32 / 128**2


@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0)])
def test_an_empty_matrix_has_no_bits(n: int, k: int) -> None:
    tensor = TernaryTensor(**make(2, n, k, PerGroup(4)))
    assert tensor.bits_per_weight == 0.0
    assert tensor.sparsity == (0.0, 0.0)
    assert tensor.trits().shape == (2, n, k)
    assert tensor.dequantize().shape == (n, k)


def test_the_slots_cannot_be_changed() -> None:
    tensor = TernaryTensor(**make(1, 2, 3, PerChannel()))
    with pytest.raises(AttributeError):
        tensor.shape = (3, 2)  # type: ignore[misc]


def set_bits(array: np.ndarray, index: tuple[int, ...], value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def test_a_weight_that_is_plus_and_minus_is_refused() -> None:
    arguments = make(2, 3, 100, PerChannel())
    for half in (0, 1):
        arguments["planes"] = set_bits(arguments["planes"], (1, half, 2, 1), 1 << 35)
    with pytest.raises(LayoutError, match="marked both plus and minus"):
        TernaryTensor(**arguments)


@pytest.mark.parametrize("half", [0, 1])
def test_bits_past_k_are_refused(half: int) -> None:
    arguments = make(1, 3, 100, PerChannel())
    TernaryTensor(**{**arguments, "planes": set_bits(arguments["planes"], (0, half, 2, 1), 1 << 35)})
    with pytest.raises(LayoutError, match="wider than K: bits past k=100 are set"):
        TernaryTensor(**{**arguments, "planes": set_bits(arguments["planes"], (0, half, 2, 1), 1 << 36)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"planes": np.zeros((2, 2, 3, 2), np.int64)},
            r"planes: int64 .* expected uint64 of shape \(1 to 4, 2, 3, 2\)",
        ),
        ({"planes": np.zeros((2, 2, 3, 3), np.uint64)}, r"planes: .*\(2, 2, 3, 3\), expected"),
        ({"planes": np.zeros((2, 3, 2), np.uint64)}, "planes: "),
        ({"planes": np.zeros((), np.uint64)}, "planes: "),
        ({"planes": np.zeros((0, 2, 3, 2), np.uint64), "scale": np.zeros((0, 3, 1), np.float32)}, "planes: "),
        ({"planes": np.zeros((5, 2, 3, 2), np.uint64), "scale": np.zeros((5, 3, 1), np.float32)}, "planes: "),
        ({"scale": np.zeros((2, 3, 1))}, r"scale: float64 .* expected float32 of shape \(2, 3, 1\) for PerChannel\(\)"),
        ({"scale": np.zeros((2, 3, 2), np.float32)}, r"scale: float32 of shape \(2, 3, 2\), expected"),
        ({"scale": np.full((2, 3, 1), np.nan, np.float32)}, "scale: holds NaN or infinity"),
        ({"scale": np.full((2, 3, 1), np.inf, np.float32)}, "scale: holds NaN or infinity"),
        ({"granularity": PerTensor()}, "scale: "),
        ({"shape": (3, 129)}, "planes: "),
        ({"shape": (-3, 100)}, r"shape \(-3, 100\), expected \(N, K\)"),
        ({"shape": (3, 100, 1)}, r"shape \(3, 100, 1\), expected \(N, K\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], problem: str) -> None:
    arguments = make(2, 3, 100, PerChannel())
    TernaryTensor(**arguments)
    with pytest.raises(LayoutError, match=problem):
        TernaryTensor(**{**arguments, **change})


@pytest.mark.parametrize(
    ("trits", "problem"),
    [
        (np.zeros((1, 2, 3)), r"float64 of shape \(1, 2, 3\), expected int8"),
        (np.zeros((2, 3), np.int8), r"shape \(2, 3\), expected int8 of shape \(planes, N, K\)"),
        (np.full((1, 2, 3), 2, np.int8), "values from 2 to 2, expected -1, 0 or 1"),
        (np.full((1, 2, 3), -128, np.int8), "values from -128"),
    ],
)
def test_other_trits_are_refused(trits: np.ndarray, problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        TernaryTensor.from_trits(trits, np.zeros((1, 2, 1), np.float32), PerChannel())
