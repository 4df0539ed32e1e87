"""`A8_DENSE`: `A8` for weights of five trits a byte, 1.6 bits each, where memory is the limit.

`formats.pack_dense` makes the layout: a word holds twenty k's of a row, five in each of its bytes. Taking them off
costs about twice the operations of 2-bit codes, so there is a gain only where weights come from memory. There is no
panel.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import DENSE_BLOCK, LANES
from tvm_ternary.formats.dense import DIGITS
from tvm_ternary.kernels.int8 import A8, int8_activations, scaled_plane
from tvm_ternary.kernels.matmul import Expr, Operand

ONE = -256
"""What a code of 1 times an activation of 1 adds to an accumulator: see `schedule.intrinsics.dense`."""


def _code(word: Expr, s: Expr, j: Expr) -> Expr:
    """t + 1 for k = 20 * kb + 4 * s + j.

    Digits 0 to s of byte q are floor(3^(s + 1) q / 256) in base 3, and so digit s is the last of them.
    """
    power = reduce(lambda value, i: T.Select(s == i, T.int32(3 ** (i + 1)), value), range(1, DIGITS), T.int32(3))
    q = T.Cast("int32", T.bitwise_and(T.shift_right(word, T.Cast("uint32", j * 8)), T.uint32(255)))
    return T.truncmod(T.shift_right(q * power, T.int32(8)), T.int32(3))


A8_DENSE = replace(
    A8,
    name="matmul_a8_dense",
    layout="dense",
    block=DENSE_BLOCK,
    activations=int8_activations(DENSE_BLOCK),
    weight=Operand(
        "dense",
        "uint32",
        lambda shape, m: (shape.planes, shape.blocks, shape.padded_k(DENSE_BLOCK) // DENSE_BLOCK, LANES),
    ),
    steps=(DIGITS, 4),
    multiply_add=lambda b, row, p, nb, kb, lane, s, j: (
        _code(b["dense"][p, nb, kb, lane], s, j)
        * T.Cast("int32", b["x_q"][row, kb * DENSE_BLOCK + s * 4 + j])
        * T.int32(ONE)
    ),
    # Not a division: a whole number of 256ths, whatever its sign.
    term=lambda b, acc, at: scaled_plane(b, T.shift_right(T.int32(0) - acc, T.int32(8)), at),
    panel=None,
)
