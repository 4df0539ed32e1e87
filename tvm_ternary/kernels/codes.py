"""What the kernels on interleaved planes share: 2-bit codes, sixteen k's of a row in a word, sixteen rows in a block.

`formats.pack_codes` makes the layout.
"""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.matmul import Expr, Operand
from tvm_ternary.kernels.shape import MatmulShape

BLOCK = 16
"""k's in one 32-bit word of codes."""


def code(buffers: dict[str, Expr], p: Expr, nb: Expr, kb: Expr, lane: Expr, s: Expr, j: Expr) -> Expr:
    """t + 1 for k = 16 * kb + 4 * s + j: the 2-bit field at bit 8 * j + 2 * s."""
    word = buffers["codes"][p, nb, kb, lane]
    return T.bitwise_and(T.shift_right(word, T.Cast("uint32", j * 8 + s * 2)), T.uint32(3))


def padded_row(shape: MatmulShape, m: Expr) -> tuple[Expr, ...]:
    """The shape of M rows of activations, each group padded as the weights are."""
    return (m, shape.padded_k(BLOCK))


def scale_each_plane(shape: MatmulShape) -> tuple[Operand, ...]:
    """A scale for each plane, group and output."""
    return (Operand("scale", "float32", lambda shape, m: (shape.planes, shape.groups, shape.blocks * LANES)),)


def _weight_shape(shape: MatmulShape, m: Expr) -> tuple[Expr, ...]:
    return (shape.planes, shape.blocks, shape.padded_k(BLOCK) // BLOCK, LANES)


WEIGHT = Operand("codes", "uint32", _weight_shape)
