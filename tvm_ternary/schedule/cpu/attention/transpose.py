"""Transposition of a square of elements in registers."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr


def transposed(rows: Sequence[Expr]) -> list[Expr]:
    """The columns of as many vectors as each of them has lanes, a power of two.

    Each step swaps one bit of an element's row with that of its lane: two vectors become two others, which LLVM finds
    to be the same in all columns that name them.
    """
    vectors, lanes = list(rows), len(rows)
    half = lanes // 2
    while half:
        upper = [bool(lane & half) for lane in range(lanes)]
        low = [lane - half + lanes if up else lane for lane, up in enumerate(upper)]
        high = [lane + lanes if up else lane + half for lane, up in enumerate(upper)]
        for n in range(lanes):
            if not n & half:
                pair = [vectors[n], vectors[n + half]]
                vectors[n], vectors[n + half] = (
                    tirx.Shuffle(pair, [tirx.const(lane, "int32") for lane in picked]) for picked in (low, high)
                )
        half //= 2
    return vectors
