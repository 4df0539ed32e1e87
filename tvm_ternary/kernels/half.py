"""`A16` and `ABF16`: activations of 16 bits times interleaved planes, summed in float32; for GPUs.

Planes share a scale and have whole factors, as for int8 activations, so that a weight of any number of planes is a
whole number of at most 63, which both formats hold exactly. A product of it with an activation is exact in float32;
what rounds is the activation itself and the sum.

Of every four activations the middle two change places, since a tensor core wants k's 0 and 2 of a word in one register
and 1 and 3 in the next (see `schedule.cuda.device`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.codes import BLOCK, WEIGHT, code, padded_row
from tvm_ternary.kernels.int8 import shared_scales
from tvm_ternary.kernels.matmul import Expr, MatmulKernel, Operand, Place
from tvm_ternary.kernels.shape import MatmulShape

SWAPPED = (0, 2, 1, 3)
"""Where each of four activations stands; its own inverse."""


def _product(b: dict[str, Expr], row: Expr, p: Expr, nb: Expr, kb: Expr, lane: Expr, s: Expr, j: Expr) -> Expr:
    trit = T.Cast("int32", code(b, p, nb, kb, lane, s, j)) - 1
    # j of 0, 1, 2, 3 stands at 0, 2, 1, 3.
    place = (j % 2) * 2 + j // 2
    return T.Cast("float32", trit) * T.Cast("float32", b["x_half"][row, kb * BLOCK + s * 4 + place])


def _term(b: dict[str, Expr], acc: Expr, at: Place) -> Expr:
    scale = b["scale"][at.group, at.column]
    if "factor" in b:
        return scale * (T.Cast("float32", b["factor"][at.plane, at.group, at.column]) * acc)
    return scale * acc


def _kernel(name: str, dtype: str) -> MatmulKernel:
    return MatmulKernel(
        name=name,
        layout="codes",
        block=BLOCK,
        activations=(Operand("x_half", dtype, padded_row),),
        weight=WEIGHT,
        scales=shared_scales,
        accumulator="float32",
        steps=(4, 4),
        multiply_add=_product,
        term=_term,
        row_scale=None,
    )


A16 = _kernel("matmul_a16", "float16")
ABF16 = _kernel("matmul_abf16", "bfloat16")


def reference_half_rows(x: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """The values that activations x (M, K) are rounded to, to nearest even, as float32, not padded and in order."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)).astype(np.uint32)
    return np.where(np.isnan(x), x, rounded.view(np.float32)).astype(np.float32)


def packed_half(x: npt.NDArray[np.float32], shape: MatmulShape) -> npt.NDArray[np.float32]:
    """Rounded activations (M, K) as the kernels read them: (M, Kp), groups padded, the middle two of four exchanged."""
    width = shape.padded_k(BLOCK) // shape.groups
    out = np.zeros((len(x), shape.groups, width), np.float32)
    for g in range(shape.groups):
        part = x[:, g * shape.group_size : (g + 1) * shape.group_size]
        out[:, g, : part.shape[1]] = part
    return out.reshape(-1, 4)[:, list(SWAPPED)].reshape(len(x), shape.groups * width)
