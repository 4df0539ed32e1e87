"""`A8`: int8 activations times interleaved planes, decoded in registers or, for many rows, once into a panel of bytes.

The planes of a stack share a scale and have whole factors (`formats.share_scales`), so that

    y[m, n] = sum over groups g of scale[g, n] * x_scale[m, g] * (sum over k in g of w[n, k] * x_q[m, k])

with w = sum over planes p of factor[p, g, n] * t[p, n, k] a signed byte. A panel holds these bytes, and costs the same
for any number of planes. Codes and panel bytes are unsigned, as byte dot-product instructions want one operand, and so
stand for w + zero: dot(w, x) = dot(w + zero, x) - zero * sum(x).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES, TernaryTensor
from tvm_ternary.kernels.codes import BLOCK, WEIGHT, code
from tvm_ternary.kernels.matmul import Expr, MatmulKernel, Operand, Panel, Place
from tvm_ternary.kernels.shape import MatmulShape

MIDDLE = 64
"""What a panel byte of a zero weight is, where planes are summed."""


def int8_activations(block: int) -> tuple[Operand, ...]:
    """What `activations.int8_rows` makes for weights in blocks of ``block`` k's."""
    return (
        Operand("x_q", "int8", lambda shape, m: (m, shape.padded_k(block))),
        Operand("x_sum", "int32", lambda shape, m: (m, shape.segments(block))),
        Operand("x_scale", "float32", lambda shape, m: (m, shape.groups)),
    )


def shared_scales(shape: MatmulShape) -> tuple[Operand, ...]:
    """One scale for all planes; where there are several, a factor for each."""
    factor = Operand("factor", "int8", lambda shape, m: (shape.planes, shape.groups, shape.blocks * LANES))
    scale = Operand("scale", "float32", lambda shape, m: (shape.groups, shape.blocks * LANES))
    return (factor, scale) if shape.planes > 1 else (scale,)


def _scaled(b: dict[str, Expr], dot: Expr, at: Place) -> Expr:
    """The sum of a segment is at most 127 * 127 * 512 < 2^24, so that float32 holds it."""
    return b["scale"][at.group, at.column] * (T.Cast("float32", dot) * b["x_scale"][at.row, at.group])


def scaled_plane(b: dict[str, Expr], acc: Expr, at: Place) -> Expr:
    """One plane's share: its codes stand for t + 1."""
    dot = acc - b["x_sum"][at.row, at.segment]
    if "factor" in b:
        dot = dot * T.Cast("int32", b["factor"][at.plane, at.group, at.column])
    return _scaled(b, dot, at)


def _panel_term(b: dict[str, Expr], acc: Expr, at: Place, zero: int) -> Expr:
    return _scaled(b, acc - b["x_sum"][at.row, at.segment] * zero, at)


def _decode(b: dict[str, Expr], shape: MatmulShape, nb: Expr, kb: Expr, g: Expr, lane: Expr, s: Expr, j: Expr) -> Expr:
    """The byte of one weight: with one plane its code; else 64 + the planes' sum of factor * t, 1 to 127."""
    codes = [T.Cast("int32", code(b, p, nb, kb, lane, s, j)) for p in range(shape.planes)]
    if shape.planes == 1:
        return T.Cast("uint8", codes[0])
    value = T.int32(MIDDLE)
    for p in range(shape.planes):
        value = value + T.Cast("int32", b["factor"][p, g, nb * LANES + lane]) * (codes[p] - 1)
    return T.Cast("uint8", value)


def _panel_matmul(shape: MatmulShape) -> MatmulKernel:
    """Multiply by the panel of a weight of ``shape``."""
    blocks = shape.segment_blocks(BLOCK)
    return replace(
        A8,
        name="matmul_a8_panel",
        layout="panel",
        weight=_PANEL_WEIGHT,
        multiply_add=lambda b, row, p, nb, kb, lane, s, j: (
            T.Cast("int32", b["panel"][nb, kb // blocks, kb % blocks, s, lane, j])
            * T.Cast("int32", b["x_q"][row, kb * BLOCK + s * 4 + j])
        ),
        term=partial(_panel_term, zero=1 if shape.planes == 1 else MIDDLE),
        panel=None,
    )


_PANEL_WEIGHT = Operand(
    "panel", "uint8", lambda shape, m: (shape.blocks, shape.segments(BLOCK), shape.segment_blocks(BLOCK), 4, LANES, 4)
)

A8 = MatmulKernel(
    name="matmul_a8",
    layout="codes",
    block=BLOCK,
    activations=int8_activations(BLOCK),
    weight=WEIGHT,
    scales=shared_scales,
    accumulator="int32",
    steps=(4, 4),
    multiply_add=lambda b, row, p, nb, kb, lane, s, j: (
        T.Cast("int32", code(b, p, nb, kb, lane, s, j)) * T.Cast("int32", b["x_q"][row, kb * BLOCK + s * 4 + j])
    ),
    term=scaled_plane,
    row_scale=None,
    panel=Panel(_PANEL_WEIGHT, _decode, _panel_matmul),
)


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
