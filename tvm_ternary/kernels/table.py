"""The kernel table: one row for each kind of activation that a scheme can name, and for each packing of its weights.

The importer's passes, the benchmark and the equivalence test read this table; a new kernel is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt
from tvm import tirx

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import (
    TernaryTensor,
    pack_bits,
    pack_codes,
    pack_dense,
    pack_scale,
    pack_shared,
    require_packing,
)
from tvm_ternary.kernels.activations import int8_rows, padded_rows, ternary_rows
from tvm_ternary.kernels.bits import A1
from tvm_ternary.kernels.dense import A8_DENSE
from tvm_ternary.kernels.float32 import A32
from tvm_ternary.kernels.half import A16, ABF16
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
        MatmulShape -> the function that makes the matmul's activations of x (M, K) float32, on a CPU.
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
    return {"codes": pack_codes(weight), **_shared_scales(weight)}


def _pack_a8_dense(weight: TernaryTensor) -> dict[str, npt.NDArray[Any]]:
    return {"dense": pack_dense(weight), **_shared_scales(weight)}


def _shared_scales(weight: TernaryTensor) -> dict[str, npt.NDArray[Any]]:
    factor, scale = pack_shared(weight)
    return {"factor": factor, "scale": scale} if weight.num_planes > 1 else {"scale": scale}


def _pack_a1(weight: TernaryTensor) -> dict[str, npt.NDArray[Any]]:
    return {"bits": pack_bits(weight), "scale": pack_scale(weight)}


def _no_cpu_rows(shape: MatmulShape) -> tirx.PrimFunc:
    require_device(16, "cpu")
    raise AssertionError


KERNELS: dict[int, TernaryKernel] = {
    32: TernaryKernel(A32, _pack_a32, padded_rows, lambda shape: shape.padded_k(A32.block) == shape.k),
    8: TernaryKernel(A8, _pack_a8, int8_rows, lambda shape: False),
    1: TernaryKernel(A1, _pack_a1, ternary_rows, lambda shape: False),
}
"""Bits of an activation to kernel, weights packed for speed."""

DENSE: dict[int, TernaryKernel] = {
    8: TernaryKernel(A8_DENSE, _pack_a8_dense, partial(int8_rows, block=A8_DENSE.block), lambda shape: False),
}
"""The same, weights packed for size."""

HALF: dict[bool, TernaryKernel] = {
    bfloat: TernaryKernel(matmul, _pack_a8, _no_cpu_rows, lambda shape: False)
    for bfloat, matmul in ((False, A16), (True, ABF16))
}
"""Activations of 16 bits, for GPUs: whether they are bfloat16 to kernel."""

EVERY_KERNEL = (*((bits, "fast") for bits in KERNELS), *((bits, "dense") for bits in DENSE))
"""What `kernel_for` takes for a CPU: bits of an activation and packing."""

DEVICES: dict[str, tuple[int, ...]] = {"cpu": (32, 8, 1), "cuda": (16, 8, 1)}
"""Bits of an activation that there is a kernel for, by the device."""


def require_device(activation_bits: int, device: str, packing: str = "fast") -> None:
    """Refuse activations, or a packing, that there is no kernel for on ``device``, ``cpu`` or ``cuda``.

    Raises
    ------
    OptionError
        The message lists those that there are.
    """
    if activation_bits not in DEVICES[device]:
        kinds = ", ".join(f"a{bits}" for bits in DEVICES[device])
        problem = f"have no kernel for {'CUDA' if device == 'cuda' else 'a CPU'}; expected one of {kinds}"
        raise OptionError(f"a{activation_bits} activations", problem, "choose another scheme")
    if device == "cuda" and packing != "fast":
        raise OptionError(f"packing {packing!r}", "has no kernel for CUDA; expected 'fast'", "leave packing out")


def kernel_for(activation_bits: int, packing: str = "fast", bfloat: bool = False) -> TernaryKernel:
    """A row of the table.

    Parameters
    ----------
    activation_bits : int
        A key of `KERNELS`.
    packing : str
        A key of `formats.PACKINGS`.
    bfloat : bool
        Whether 16 bits are bfloat16.

    Raises
    ------
    OptionError
        If there is no such packing, or not for these activations.
    """
    require_packing(packing, activation_bits)
    if activation_bits == 16:
        return HALF[bfloat]
    return (DENSE if packing == "dense" else KERNELS)[activation_bits]
