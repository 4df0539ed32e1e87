"""Kernels on interleaved planes: 2-bit codes, sixteen k's of a row in a 32-bit word, sixteen rows in a block.

`A8` multiplies int8 activations, `A32` float32 ones. Both read the ``codes`` layout.
"""

from __future__ import annotations

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES, TernaryTensor
from tvm_ternary.kernels.matmul import Expr, MatmulKernel, Operand
from tvm_ternary.kernels.shape import MatmulShape

BLOCK = 16
"""k's in one 32-bit word of codes."""


def _code(buffers: dict[str, Expr], p: Expr, nb: Expr, kb: Expr, lane: Expr, s: Expr, j: Expr) -> Expr:
    """t + 1 for k = 16 * kb + 4 * s + j: the 2-bit field at bit 8 * j + 2 * s."""
    word = buffers["codes"][p, nb, kb, lane]
    return T.bitwise_and(T.shift_right(word, T.Cast("uint32", j * 8 + s * 2)), T.uint32(3))


def _weight_shape(shape: MatmulShape, m: Expr) -> tuple[Expr, ...]:
    return (shape.planes, shape.blocks, shape.groups * shape.group_blocks(BLOCK), LANES)


def _padded(shape: MatmulShape, m: Expr) -> tuple[Expr, ...]:
    return (m, shape.padded_k(BLOCK))


WEIGHT = Operand("codes", "uint32", _weight_shape)

A8 = MatmulKernel(
    name="matmul_a8",
    layout="codes",
    block=BLOCK,
    activations=(
        Operand("x_q", "int8", _padded),
        Operand("x_sum", "int32", lambda shape, m: (m, shape.groups)),
        Operand("x_scale", "float32", lambda shape, m: (m, shape.groups)),
    ),
    weight=WEIGHT,
    accumulator="int32",
    steps=(4, 4),
    # dot(code, x) - sum(x): the codes stay unsigned, as byte dot-product instructions want them.
    multiply_add=lambda b, row, p, nb, kb, lane, s, j: (
        T.Cast("int32", _code(b, p, nb, kb, lane, s, j)) * T.Cast("int32", b["x_q"][row, kb * BLOCK + s * 4 + j])
    ),
    group_value=lambda b, acc, row, g: T.Cast("float32", acc - b["x_sum"][row, g]) * b["x_scale"][row, g],
    row_scale=None,
)

A32 = MatmulKernel(
    name="matmul_a32",
    layout="codes",
    block=BLOCK,
    activations=(Operand("x", "float32", _padded),),
    weight=WEIGHT,
    accumulator="float32",
    steps=(4, 4),
    # -2 t x summed, then halved once: a code becomes the float -2 t by its bits alone (see schedule.intrinsics), and
    # doubling and halving change no rounding.
    multiply_add=lambda b, row, p, nb, kb, lane, s, j: (
        T.Cast("float32", 2 - T.Cast("int32", _code(b, p, nb, kb, lane, s, j)) * 2)
        * b["x"][row, kb * BLOCK + s * 4 + j]
    ),
    group_value=lambda b, acc, row, g: acc * T.float32(-0.5),
    row_scale=None,
)


def reference_a32(x: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None = None) -> np.ndarray:
    """y = x w^T + bias in float64, from the dequantized definition w = sum of s_p t_p; x (M, K), y (M, N)."""
    scale = _per_weight_scale(weight)
    dense = (weight.trits().astype(np.float64) * scale).sum(axis=0)
    y = x.astype(np.float64) @ dense.T
    return np.asarray(y if bias is None else y + bias)


def reference_a8_accumulators(x_q: np.ndarray, weight: TernaryTensor) -> np.ndarray:
    """The integers inside `A8`: dot(t[p, n, g], x_q[m, g]), exact, (M, N, P, G) int64; x_q (M, K) int8, not padded."""
    n, k = weight.shape
    groups, size = weight.granularity.groups(k), weight.granularity.group_size(k)
    trits = weight.trits().astype(np.int64)
    out = np.zeros((x_q.shape[0], n, weight.num_planes, groups), np.int64)
    for p in range(weight.num_planes):
        for g in range(groups):
            part = slice(g * size, min((g + 1) * size, k))
            out[:, :, p, g] = x_q[:, part].astype(np.int64) @ trits[p, :, part].T
    return out


def _per_weight_scale(weight: TernaryTensor) -> np.ndarray:
    """The scale of every weight: (P, N, K) float64."""
    n, k = weight.shape
    scale = np.repeat(weight.scale.astype(np.float64), weight.granularity.group_size(k), axis=2)[:, :, :k]
    return np.broadcast_to(scale, (weight.num_planes, n, k))
