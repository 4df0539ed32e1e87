"""Tensors of a checkpoint as the float32 numbers that the graph computes with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.tensor_files import Tensors

_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"})


def floats(tensors: Tensors, name: str) -> npt.NDArray[np.float32]:
    """Read a tensor as float32; float64 is rounded, everything smaller is exact.

    Raises
    ------
    ModelError
        If it holds no floats, or some of them are NaN or infinite, also after rounding.
    """
    where = tensors.where(name)
    if tensors.dtype(name) not in _FLOATS:
        known = ", ".join(sorted(_FLOATS))
        raise ModelError(
            where, f"has dtype {tensors.dtype(name)}", f"expected one of {known}; use the float checkpoint"
        )
    with np.errstate(over="ignore"):  # what overflows is told in one line
        array = tensors.load(name).astype(np.float32, copy=False)
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        problem = f"{int(bad.sum())} of {array.size} elements are NaN or infinite, the first at {first}"
        raise ModelError(where, problem, "repair the checkpoint")
    return array
