"""What activations become on a GPU, as generated code in the emulator: equal to numpy's to the bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from tests.cuda_matmul import prepare
from tests.ternary_matmul import pack_trits, rows_of
from tvm_ternary.formats import Granularity, PerChannel, PerGroup
from tvm_ternary.kernels.activations import reference_int8_rows, reference_ternary_rows
from tvm_ternary.kernels.half import packed_half, reference_half_rows
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import kernel_for

# Short and long groups, whole and ragged, with several segments in one, a K that is no multiple of four.
SHAPES = [(100, None), (100, 24), (99, None), (1500, None), (512, 128), (1000, 600), (7, 3)]


def shape_of(k: int, size: int | None) -> tuple[MatmulShape, Granularity]:
    granularity = PerChannel() if size is None else PerGroup(size)
    return MatmulShape(16, k, 1, granularity.groups(k), granularity.group_size(k)), granularity


def rows(k: int) -> npt.NDArray[np.float32]:
    """Rows of different sizes, one of zeros, one that is tiny, one with a tie to round."""
    x = np.random.default_rng(k).standard_normal((6, k)).astype(np.float32) * 10
    x[2], x[3, : k // 2] = 0, 0
    x[4] *= np.float32(1e-38)
    x[5] = np.arange(k) % 5 + np.float32(0.5)
    return x


@pytest.mark.parametrize(("k", "size"), SHAPES)
def test_int8_rows(k: int, size: int | None) -> None:
    (shape, granularity), x = shape_of(k, size), rows(k)
    q, scale = reference_int8_rows(x, shape)
    want = dict(zip(("x_q", "x_sum", "x_scale"), rows_of(8, q, scale, granularity), strict=True))
    got = prepare(kernel_for(8).matmul, shape, x)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("k", "size"), SHAPES[1:5])
def test_half_rows(dtype: str, k: int, size: int | None) -> None:
    (shape, _), x = shape_of(k, size), rows(k)
    # Beyond float16's range, and a value that is not a number.
    x[0, 0], x[0, 1], x[1, 2] = 1e6, -np.inf, np.nan
    got = prepare(kernel_for(16, bfloat=dtype == "bfloat16").matmul, shape, x)["x_half"]
    want = packed_half(reference_half_rows(x, dtype), shape)
    values = got.astype(np.float32) if dtype == "float16" else (got.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(values, want)


@pytest.mark.parametrize(("k", "size"), SHAPES[:4])
def test_ternary_rows(k: int, size: int | None) -> None:
    (shape, granularity), x = shape_of(k, size), rows(k)[:4]
    trits, scale = reference_ternary_rows(x)
    got = prepare(kernel_for(1).matmul, shape, x)
    np.testing.assert_array_equal(got["x_bits"], pack_trits(trits, granularity))
    np.testing.assert_allclose(got["x_scale"], scale, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    """Its group's scale is not finite, so that all of its results are not; others stay as they are."""
    (shape, _), x = shape_of(100, 24), rows(100)
    x[1, 30] = value
    scale = prepare(kernel_for(8).matmul, shape, x, checked=False)["x_scale"]
    assert not np.isfinite(scale[1, 1])
    assert np.isfinite(np.delete(scale.ravel(), shape.groups + 1)).all()
    assert np.isnan(prepare(kernel_for(1).matmul, shape, x, checked=False)["x_scale"][1])
