"""Arrays that compiled code reads where they lie."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import HostError

BFLOAT16 = "bfloat16"
ALIGNMENT = 64
"""Bytes, of all tensors, as TVM's compiled code takes it for granted; numpy aligns to 16."""


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of a name of a manifest; numpy knows bfloat16 once the package ml_dtypes is imported.

    Raises
    ------
    HostError
        If that package is missing.
    """
    if name == BFLOAT16:
        try:
            importlib.import_module("ml_dtypes")
        except ImportError as error:
            hint = "pip install ml_dtypes"
            raise HostError("bfloat16", "numpy has no such type without the package ml_dtypes", hint) from error
    return np.dtype(name)


def can_be_read_in_place(array: npt.NDArray[Any]) -> bool:
    """Whether an array may be an input as it is: aligned, contiguous, and exported by numpy."""
    flags = array.flags
    exported = array.dtype.kind in "biuf" and array.dtype.isnative
    # Numpy exports no array that is read-only.
    return bool(array.nbytes and flags.c_contiguous and flags.writeable and exported and not _misplaced(array))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An array that is not filled yet and can be read in place."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -_misplaced(memory) % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that can be read in place."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def span(array: npt.NDArray[Any]) -> tuple[int, int]:
    """The addresses of a contiguous array: its first byte, and the one behind its last."""
    return array.ctypes.data, array.ctypes.data + array.nbytes


def _misplaced(array: npt.NDArray[Any]) -> int:
    """How many bytes behind a multiple of the alignment it begins."""
    return int(array.ctypes.data % ALIGNMENT)
