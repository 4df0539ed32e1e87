"""`A32`: float32 activations times interleaved planes."""

from __future__ import annotations

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import TernaryTensor
from tvm_ternary.kernels.codes import BLOCK, WEIGHT, code, padded_row, scale_each_plane
from tvm_ternary.kernels.matmul import MatmulKernel, Operand

A32 = MatmulKernel(
    name="matmul_a32",
    layout="codes",
    block=BLOCK,
    activations=(Operand("x", "float32", padded_row),),
    weight=WEIGHT,
    scales=scale_each_plane,
    accumulator="float32",
    steps=(4, 4),
    # -2 t x summed, then halved once: a code becomes the float -2 t by its bits alone (see schedule.intrinsics), and
    # doubling and halving change no rounding.
    multiply_add=lambda b, row, p, nb, kb, lane, s, j: (
        T.Cast("float32", 2 - T.Cast("int32", code(b, p, nb, kb, lane, s, j)) * 2) * b["x"][row, kb * BLOCK + s * 4 + j]
    ),
    term=lambda b, acc, at: b["scale"][at.plane, at.group, at.column] * (acc * T.float32(-0.5)),
    row_scale=None,
)


def reference_a32(x: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None = None) -> np.ndarray:
    """y = x w^T + bias in float64, from the dequantized definition w = sum of s_p t_p; x (M, K), y (M, N)."""
    scale = _per_weight_scale(weight)
    dense = (weight.trits().astype(np.float64) * scale).sum(axis=0)
    y = x.astype(np.float64) @ dense.T
    return np.asarray(y if bias is None else y + bias)


def _per_weight_scale(weight: TernaryTensor) -> np.ndarray:
    """The scale of every weight: (P, N, K) float64."""
    n, k = weight.shape
    scale = np.repeat(weight.scale.astype(np.float64), weight.granularity.group_size(k), axis=2)[:, :, :k]
    return np.broadcast_to(scale, (weight.num_planes, n, k))
