"""Which arrays are read where they lie."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_ternary.runtime.arrays import ALIGNMENT, aligned, aligned_empty, can_be_read_in_place, span


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (7, 64)])
@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "float16", "float64"])
def test_aligned(shape: tuple[int, ...], dtype: str) -> None:
    empty = aligned_empty(shape, np.dtype(dtype))
    assert (empty.shape, empty.dtype) == (shape, np.dtype(dtype))
    assert not empty.size or empty.ctypes.data % ALIGNMENT == 0
    array = np.ones(shape, dtype)
    copy = aligned(array)
    np.testing.assert_array_equal(copy, array)
    assert can_be_read_in_place(copy) == (array.size > 0)
    assert span(copy)[1] - span(copy)[0] == array.nbytes


def test_what_has_to_be_copied() -> None:
    array = aligned(np.zeros((8, 16), np.float32))
    assert can_be_read_in_place(array[2:])
    assert not can_be_read_in_place(array.T)
    assert not can_be_read_in_place(array[:, 1:])
    assert not can_be_read_in_place(array.ravel()[1:])
    assert not can_be_read_in_place(aligned(np.zeros(4, ">i4")))
    array.flags.writeable = False
    assert not can_be_read_in_place(array)
