"""The popcount kernel: ternary activations and weights as bit planes, 32 k's of a row in a word, 16 rows in a block.

With the nonzero planes (a, b) and the minus planes (a-, b-), both nonzero is z = a & b and the product is -1 where
(a- ^ b-) & z, so dot = pop(z) - 2 pop(z & (a- ^ b-)): two population counts instead of the four of the plus/minus form.
"""

from __future__ import annotations

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES, TernaryTensor
from tvm_ternary.kernels.matmul import Expr, MatmulKernel, Operand
from tvm_ternary.kernels.shape import MatmulShape

BLOCK = 32
"""k's in one word of a plane."""


def _product(b: dict[str, Expr], row: Expr, p: Expr, nb: Expr, kw: Expr, lane: Expr) -> Expr:
    weight, x = b["bits"], b["x_bits"]
    both = T.bitwise_and(weight[p, nb, kw, 0, lane], x[row, kw, 0])
    minus = T.bitwise_and(both, T.bitwise_xor(weight[p, nb, kw, 1, lane], x[row, kw, 1]))
    return T.Cast("int32", T.popcount(both)) - T.Cast("int32", T.popcount(minus)) * 2


def _words(shape: MatmulShape) -> int:
    return shape.padded_k(BLOCK) // BLOCK


A1 = MatmulKernel(
    name="matmul_a1",
    layout="bits",
    block=BLOCK,
    activations=(
        Operand("x_bits", "uint32", lambda shape, m: (m, _words(shape), 2)),
        Operand("x_scale", "float32", lambda shape, m: (m,)),
    ),
    weight=Operand("bits", "uint32", lambda shape, m: (shape.planes, shape.blocks, _words(shape), 2, LANES)),
    scales=lambda shape: (
        Operand("scale", "float32", lambda shape, m: (shape.planes, shape.groups, shape.blocks * LANES)),
    ),
    accumulator="int32",
    steps=(),
    multiply_add=_product,
    term=lambda b, acc, at: b["scale"][at.plane, at.group, at.column] * T.Cast("float32", acc),
    row_scale=lambda b, row: b["x_scale"][row],
)


def reference_a1_dot(x_trits: np.ndarray, weight: TernaryTensor) -> np.ndarray:
    """The integers inside `A1`: dot(t[p, n, g], x[m, g]), exact, (M, N, P, G) int64; x_trits (M, K) in {-1, 0, 1}."""
    k = weight.shape[1]
    size = weight.granularity.group_size(k)
    trits = weight.trits()
    groups = [slice(g, min(g + size, k)) for g in range(0, max(k, 1), size)]
    dots = [np.einsum("mk,pnk->mnp", x_trits[:, s].astype(np.int64), trits[:, :, s].astype(np.int64)) for s in groups]
    return np.stack(dots, axis=-1)
