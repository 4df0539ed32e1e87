"""A mask of booleans becomes words of bits, as attention reads it (`kernels.attention.pack_mask` says which)."""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

from tvm_ternary.kernels.attention import WORD

NAME = "pack_mask"
"""Of a function that does it, and of its block, by which a schedule knows it."""


def mask_words(seen: te.Tensor) -> te.Tensor:
    """The definition.

    Parameters
    ----------
    seen : (..., S) bool

    Returns
    -------
    (..., ceil(S / 64)) int64
    """
    *outer, keys = seen.shape
    count = tirx.floordiv(keys + (WORD - 1), tirx.IntImm("int64", WORD))
    bit = te.reduce_axis((tirx.IntImm("int64", 0), tirx.IntImm("int64", WORD)), "bit")
    either = te.comm_reducer(lambda a, b: tirx.bitwise_or(a, b), lambda dtype: tirx.const(0, dtype), name="either")

    def word(*at: Expr) -> Expr:
        key = at[-1] * WORD + bit
        # What is behind the last key is 0.
        is_set = tirx.if_then_else(key < keys, seen[(*at[:-1], key)].astype("int64"), tirx.const(0, "int64"))
        return either(tirx.shift_left(is_set, bit.var), axis=bit)

    return te.compute([*outer, count], word, NAME)
