"""Arrays that start where compiled code expects them to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError

_ALIGNMENT = 64
_MOST_COPIES = 4096


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike, fill: float = 0) -> npt.NDArray[Any]:
    """An array whose first byte lies at a multiple of 64, filled: pages never written to would all be one page."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    array = memory[start : start + size].view(dtype).reshape(shape)
    array[...] = fill
    return array


def aligned_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that is aligned."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def copies_beyond(cache: int, size: int) -> int:
    """How many copies of ``size`` bytes exceed ``cache`` bytes; 1 for no cache.

    Raises
    ------
    OptionError
        If they are too many to make: each may be a session of another engine.
    """
    count = cache // size + 1
    if count > _MOST_COPIES:
        raise OptionError(
            "cold",
            f"a weight of {size} bytes needs {count} copies; at most {_MOST_COPIES} are made",
            "measure larger shapes",
        )
    return count
