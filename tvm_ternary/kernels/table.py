"""The kernel table: one row for each kind of activation that a scheme can name.

The importer's passes, the benchmark and the equivalence test read this table; a new kernel is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from tvm import tirx

from tvm_ternary.formats import TernaryTensor, pack_bits, pack_codes, pack_scale, pack_shared
from tvm_ternary.kernels.activations import int8_rows, padded_rows, ternary_rows
from tvm_ternary.kernels.bits import A1
from tvm_ternary.kernels.float32 import A32
from tvm_ternary.kernels.int8 import A8
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape


@dataclass(frozen=True)
class TernaryKernel:
    """A matmul, how its weight is packed, and what prepares its activations.

    Attributes
    ----------
    matmul : MatmulKernel
    pack : callable
        TernaryTensor -> the packed weight and its scales by name: what the matmul reads between its activations and
        the epilogue's operands, in order.
    rows : callable
        MatmulShape -> the function that makes the matmul's activations of x (M, K) float32.
    reads_rows_directly : callable
        MatmulShape -> whether the matmul can read x as it is, so that ``rows`` is not needed.
    """

    matmul: MatmulKernel
    pack: Callable[[TernaryTensor], dict[str, npt.NDArray[Any]]]
    rows: Callable[[MatmulShape], tirx.PrimFunc]
    reads_rows_directly: Callable[[MatmulShape], bool]


def _pack_a32(weight: TernaryTensor) -> dict[str, npt.NDArray[Any]]:
    return {"codes": pack_codes(weight), "scale": pack_scale(weight)}


def _pack_a8(weight: TernaryTensor) -> dict[str, npt.NDArray[Any]]:
    factor, scale = pack_shared(weight)
    factors = {"factor": factor} if weight.num_planes > 1 else {}
    return {"codes": pack_codes(weight), **factors, "scale": scale}


def _pack_a1(weight: TernaryTensor) -> dict[str, npt.NDArray[Any]]:
    return {"bits": pack_bits(weight), "scale": pack_scale(weight)}


KERNELS: dict[int, TernaryKernel] = {
    32: TernaryKernel(A32, _pack_a32, padded_rows, lambda shape: shape.padded_k(A32.block) == shape.k),
    8: TernaryKernel(A8, _pack_a8, int8_rows, lambda shape: False),
    1: TernaryKernel(A1, _pack_a1, ternary_rows, lambda shape: False),
}
"""Bits of an activation to kernel."""
