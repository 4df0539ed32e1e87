"""The scheduled functions of a ternary layer, whatever the target: what graph and operators ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from tvm_ternary.kernels.matmul import PLAIN, Epilogue
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import TernaryKernel, kernel_for, require_device
from tvm_ternary.schedule import ternary as cpu
from tvm_ternary.schedule.cuda import matmul as cuda
from tvm_ternary.schedule.cuda.rows import rows_function
from tvm_ternary.schedule.cuda.tasks import choose_cuda_variants
from tvm_ternary.schedule.records import TuningLog
from tvm_ternary.schedule.tasks import choose_variants
from tvm_ternary.target import Target


@dataclass(frozen=True)
class Layer:
    """What of a ternary layer decides its code.

    Attributes
    ----------
    shape : MatmulShape
    activation_bits : int
    packing : str
        A key of `formats.PACKINGS`.
    bfloat : bool
        Whether 16 bits are bfloat16.
    """

    shape: MatmulShape
    activation_bits: int
    packing: str = "fast"
    bfloat: bool = False

    @property
    def kernel(self) -> TernaryKernel:
        """Its row of the kernel table."""
        return kernel_for(self.activation_bits, self.packing, self.bfloat)


def matmul_of(
    layer: Layer,
    target: Target,
    logs: Sequence[TuningLog] = (),
    *,
    rows: int | None = None,
    epilogue: Epilogue = PLAIN,
) -> tuple[tirx.PrimFunc, str]:
    """The scheduled matmul of a layer and where its schedule comes from.

    Parameters
    ----------
    layer : Layer
    target : Target
    logs : sequence of TuningLog
        Where to look for tuned schedules, in order of precedence.
    rows : int, optional
        M where it is known.
    epilogue : Epilogue

    Raises
    ------
    OptionError
        If the target has no kernel for these activations or this packing.
    """
    require_device(layer.activation_bits, target.kind, layer.packing)
    kernel, shape = layer.kernel.matmul, layer.shape
    if target.kind == "cuda":
        chosen = choose_cuda_variants(layer.activation_bits, shape, target.tier, logs, rows, layer.bfloat)
        return cuda.matmul_function(kernel, shape, chosen.variants, rows=rows, epilogue=epilogue), chosen.source
    choice = choose_variants(layer.activation_bits, shape, target.tier, logs, rows, layer.packing)
    return cpu.matmul_function(kernel, shape, choice.variants, target.tier, rows=rows, epilogue=epilogue), choice.source


def rows_of(layer: Layer, target: Target) -> tirx.PrimFunc | None:
    """The scheduled function that prepares a layer's activations; None where the matmul reads x as it is."""
    if target.kind == "cuda":
        return rows_function(layer.kernel.matmul, layer.shape)
    return None if layer.kernel.reads_rows_directly(layer.shape) else layer.kernel.rows(layer.shape)
