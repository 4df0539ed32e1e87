"""From a float matrix to planes and scales."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import LayoutError, ModelError, OptionError
from tvm_ternary.formats import PerChannel, PerGroup, PerTensor, Scheme, TernaryTensor, granularity, with_shared_scales
from tvm_ternary.quantize import METHODS, quantization_error, quantize

shapes = st.tuples(st.integers(0, 12), st.integers(0, 50))
seeds = st.integers(0, 2**32 - 1)
suffixes = st.sampled_from(["", "pt", "g1", "g7", "g16", "g64"])


def normal(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def slow_groups(w: np.ndarray, kind: Any) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Cut a matrix into its quantization groups: index into the scale, and a mask."""
    n, k = w.shape
    rows, groups = kind.scale_shape(n, k)
    out = []
    for row in range(rows):
        for group in range(groups):
            mask = np.zeros((n, k), dtype=bool)
            chosen = slice(None) if rows == 1 and isinstance(kind, PerTensor) else slice(row, row + 1)
            size = kind.group_size(k)
            mask[chosen, group * size : (group + 1) * size] = True
            out.append(((row, group), mask))
    return out


@pytest.mark.parametrize("method", METHODS)
@given(shape=shapes, suffix=suffixes, seed=seeds)
def test_one_plane_is_the_method_on_each_group_alone(
    method: str, shape: tuple[int, int], suffix: str, seed: int
) -> None:
    w = normal(*shape, seed)
    scheme = Scheme.parse(f"t1a8{suffix}")
    got = quantize(w, scheme, method)
    assert got.shape == shape
    assert got.granularity == scheme.granularity
    assert got.num_planes == 1
    if quantization_error(w, got) == 0:
        return  # ternary as it was, or empty
    trits = got.trits()[0]
    for index, mask in slow_groups(w, scheme.granularity):
        expected_trits, expected_scale = METHODS[method](w[mask][None])
        np.testing.assert_array_equal(trits[mask], expected_trits[0])
        # The same sum over another memory layout may round differently in float64, and then in float32.
        assert got.scale[0][index] == pytest.approx(expected_scale[0], rel=2**-23)


@pytest.mark.parametrize("method", METHODS)
@given(shape=shapes, suffix=suffixes, seed=seeds)
def test_more_planes_never_raise_the_error(method: str, shape: tuple[int, int], suffix: str, seed: int) -> None:
    w = normal(*shape, seed)
    errors = [quantization_error(w, quantize(w, f"t{planes}a32{suffix}", method)) for planes in (1, 2, 3, 4)]
    for fewer, more in itertools.pairwise(errors):
        # Exact but for the ridge (1e-10) and the rounding of scales to float32 (2^-24), relative to the weights.
        assert more <= fewer + 2**-22


def test_every_plane_pays_on_normal_weights() -> None:
    w = normal(64, 256)
    errors = [quantization_error(w, quantize(w, f"t{planes}a8g64")) for planes in (1, 2, 3, 4)]
    assert all(more < fewer for fewer, more in itertools.pairwise(errors))


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_the_scales_of_several_planes_are_fitted_together(planes: int) -> None:
    w = normal(10, 200)
    got = quantize(w, f"t{planes}a32", "absmean")
    shared = with_shared_scales(got)
    np.testing.assert_array_equal(quantize(w, f"t{planes}a8", "absmean").scale, shared.scale)
    for row in range(10):
        trits = got.trits()[:, row].astype(np.float64)
        best = np.linalg.lstsq(trits.T, w[row].astype(np.float64), rcond=None)[0]
        np.testing.assert_allclose(got.scale[:, row, 0], best, rtol=1e-6)
    # A single plane keeps the scale that its method defines, here not the least-squares one.
    single = quantize(w, "t1a8", "absmean").scale[0, :, 0]
    np.testing.assert_allclose(single, np.abs(w).mean(axis=1, dtype=np.float64), rtol=1e-6)


@given(shape=shapes, suffix=suffixes, planes=st.integers(1, 4), seed=seeds)
def test_blocks_of_rows_do_not_show(shape: tuple[int, int], suffix: str, planes: int, seed: int) -> None:
    w = normal(*shape, seed)
    whole = quantize(w, f"t{planes}a8{suffix}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(granularity, "BLOCK_ELEMENTS", 60)
        blocks = quantize(w, f"t{planes}a8{suffix}")
        error = quantization_error(w, whole)
    np.testing.assert_array_equal(blocks.planes, whole.planes)
    np.testing.assert_array_equal(blocks.scale, whole.scale)
    assert error == pytest.approx(quantization_error(w, whole), rel=1e-12)


def test_a_short_last_group_is_not_diluted() -> None:
    w = np.array([[1, -2, 3, -4, 0.5, 2, 100, 90]], dtype=np.float32)
    got = quantize(w, "t1a8g3")
    assert got.scale.shape == (1, 1, 3)
    # mean 95, threshold 66.5: both kept. With a padding zero the mean would be 63.3, with the neighbours less.
    assert got.scale[0, 0, 2] == 95
    np.testing.assert_array_equal(got.trits()[0, 0, 6:], [1, 1])


@given(
    shape=shapes,
    made=st.sampled_from([PerTensor(), PerChannel(), PerGroup(14)]),
    planes=st.integers(1, 4),
    method=st.sampled_from(sorted(METHODS)),
    seed=seeds,
)
def test_ternary_matrices_come_through_with_one_plane(
    shape: tuple[int, int], made: Any, planes: int, method: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 2, made.scale_shape(*shape)).astype(np.float32)
    w = rng.integers(-1, 2, shape).astype(np.float32) * made.spread(scale, shape[1])
    got = quantize(w, Scheme(planes, 8, PerGroup(7)), method)
    assert got.num_planes == 1
    assert got.granularity == PerGroup(7)
    assert got.scale.shape[1:] == PerGroup(7).scale_shape(*shape)
    np.testing.assert_array_equal(got.dequantize(), w)


def test_a_matrix_ternary_at_a_finer_granularity_is_quantized() -> None:
    w = np.array([[1, -1, 3, 3]], dtype=np.float32)
    assert quantization_error(w, quantize(w, "t1a8g2")) == 0
    assert quantization_error(w, quantize(w, "t1a8")) > 0


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_other_dtypes_are_rounded_to_float32(dtype: str) -> None:
    w = (10 * np.random.default_rng(0).standard_normal((9, 33))).astype(dtype)
    got, expected = quantize(w, "t2a8g16"), quantize(w.astype(np.float32), "t2a8g16")
    np.testing.assert_array_equal(got.planes, expected.planes)
    np.testing.assert_array_equal(got.scale, expected.scale)


def test_lists_and_strided_arrays_are_taken() -> None:
    w = normal(12, 40)
    expected = quantize(np.ascontiguousarray(w.T), "t2a8g7")
    for got in (quantize(w.T, "t2a8g7"), quantize(w.T.tolist(), "t2a8g7")):
        np.testing.assert_array_equal(got.planes, expected.planes)
        np.testing.assert_array_equal(got.scale, expected.scale)


def test_the_input_is_not_changed() -> None:
    w = normal(8, 40)
    before = w.copy()
    w.flags.writeable = False
    for suffix in ("", "pt", "g16"):
        quantize(w, f"t3a8{suffix}")
    np.testing.assert_array_equal(w, before)


def test_options_reach_the_method() -> None:
    w = normal(4, 100)
    sparse = quantize(w, "t1a8", "absmax", fraction=1.0)
    np.testing.assert_array_equal(np.count_nonzero(sparse.trits()[0], axis=1), np.ones(4))
    np.testing.assert_array_equal(sparse.scale[0, :, 0], np.abs(w).max(axis=1))


@pytest.mark.parametrize("size", [1e-44, 1e37])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("error")
def test_tiny_and_huge_weights(method: str, size: float) -> None:
    w = (size * normal(6, 50)).astype(np.float32)
    for planes in (1, 4):
        got = quantize(w, f"t{planes}a8g16", method)
        assert np.isfinite(got.dequantize()).all()
        assert quantization_error(w, got) < 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_the_first_value_that_is_not_finite_is_named(
    value: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(granularity, "BLOCK_ELEMENTS", elements)
    w = normal(5, 7)
    w[3, 2] = w[3, 5] = w[4, 0] = value
    with pytest.raises(ModelError, match=rf"layers\.3\.up: value {value} at \[3, 2\], expected finite"):
        quantize(w, "t1a8", name="layers.3.up")


def test_float64_beyond_float32_is_named() -> None:
    w = np.array([[1.0, 2.0], [3.0, -1e39]])
    with pytest.raises(ModelError, match=r"array: value -1e\+39 at \[1, 1\], expected finite float32 values"):
        quantize(w, "t1a8")


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros(5, np.float32), r"shape \(5,\), expected a matrix"),
        (np.zeros((2, 3, 4), np.float32), r"shape \(2, 3, 4\), expected a matrix"),
        (np.zeros((2, 3), np.complex64), "dtype complex64, expected floats or integers; convert it to float32"),
        (np.array([["a"]]), "dtype <U1"),
        (np.array([[None]]), "dtype object"),
        (np.zeros((2, 3), bool), "dtype bool"),
    ],
)
def test_arrays_that_are_no_matrix_are_refused(array: np.ndarray, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        quantize(array, "t1a8")


@pytest.mark.parametrize(
    ("scheme", "method", "options", "problem"),
    [
        ("t9a8", "twn", {}, "scheme 't9a8': unknown"),
        ("t1a8", "best", {}, "method 'best': unknown, expected one of absmean, twn, absmax, percentile, meanstd"),
        ("t1a8", "twn", {"fraction": 0.5}, "option 'fraction': unknown to method twn, it has none"),
        ("t1a8", "absmax", {"percent": 0.5}, "option 'percent': unknown to method absmax, expected fraction"),
        ("t1a8", "absmax", {"groups": 0.5}, "option 'groups': unknown to method absmax"),
        ("t1a8", "absmax", {"fraction": 2}, "option fraction: 2, expected a number from 0 to 1"),
    ],
)
def test_unknown_names_are_refused(scheme: str, method: str, options: dict[str, float], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        quantize(normal(3, 4), scheme, method, **options)


def tensor_of(values: list[list[float]]) -> TernaryTensor:
    return quantize(np.array(values, dtype=np.float32), "t1a8g1")


def test_quantization_error_by_hand() -> None:
    w = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert quantization_error(w, tensor_of([[3, 0], [0, 4]])) == 0.0
    assert quantization_error(w, tensor_of([[3, 0], [0, 0]])) == pytest.approx(4 / 5)
    assert quantization_error(w, tensor_of([[0, 0], [0, 0]])) == 1.0
    zeros = np.zeros((2, 2))
    assert quantization_error(zeros, tensor_of([[0, 0], [0, 0]])) == 0.0
    assert quantization_error(zeros, tensor_of([[1, 0], [0, 0]])) == math.inf
    assert quantization_error(np.zeros((0, 3)), quantize(np.zeros((0, 3)), "t1a8")) == 0.0
    with pytest.raises(LayoutError, match=r"w: shape \(2, 3\), expected \(2, 2\)"):
        quantization_error(np.zeros((2, 3)), tensor_of([[1, 0], [0, 0]]))
