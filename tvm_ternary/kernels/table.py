"""The kernel table: one row for each kind of activation that a scheme can name.

The importer's passes, the benchmark and the equivalence test read this table; a new kernel is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from tvm import tirx

from tvm_ternary.formats import TernaryTensor, pack_bits, pack_codes
from tvm_ternary.kernels.activations import int8_rows, padded_rows, ternary_rows
from tvm_ternary.kernels.bits import A1
from tvm_ternary.kernels.codes import A8, A32
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape


@dataclass(frozen=True)
class TernaryKernel:
    """A matmul, how its weight is packed, and what prepares its activations.

    Attributes
    ----------
    matmul : MatmulKernel
    pack : callable
        TernaryTensor -> the packed weight.
    rows : callable
        MatmulShape -> the function that makes the matmul's activations of x (M, K) float32.
    reads_rows_directly : callable
        MatmulShape -> whether the matmul can read x as it is, so that ``rows`` is not needed.
    """

    matmul: MatmulKernel
    pack: Callable[[TernaryTensor], npt.NDArray[Any]]
    rows: Callable[[MatmulShape], tirx.PrimFunc]
    reads_rows_directly: Callable[[MatmulShape], bool]


KERNELS: dict[int, TernaryKernel] = {
    32: TernaryKernel(A32, pack_codes, padded_rows, lambda shape: shape.padded_k(A32.block) == shape.k),
    8: TernaryKernel(A8, pack_codes, int8_rows, lambda shape: False),
    1: TernaryKernel(A1, pack_bits, ternary_rows, lambda shape: False),
}
"""Bits of an activation to kernel."""
