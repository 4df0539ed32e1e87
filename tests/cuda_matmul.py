"""Scheduled CUDA functions of a ternary layer, as generated code in the emulator, called with numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tests import cuda_emulator as emulator
from tests.cuda_emulator.source import kernels_of
from tvm_ternary.build.executable import kernels_as_source
from tvm_ternary.formats import TernaryTensor
from tvm_ternary.kernels.matmul import PLAIN, Epilogue
from tvm_ternary.kernels.shape import MatmulShape, ceil_div
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.schedule.cuda.cut import Cut
from tvm_ternary.schedule.cuda.matmul import matmul_function
from tvm_ternary.schedule.cuda.rows import LONG, rows_function
from tvm_ternary.schedule.cuda.variant import CudaVariant
from tvm_ternary.target import resolve

TARGET = resolve("cuda-sm_80")
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": np.uint16}
"""How numpy holds what it has no name for: bfloat16 as its bits."""


def source_of(functions: Mapping[str, tvm.tirx.PrimFunc]) -> str:
    """The CUDA source that TVM generates for functions of these names."""
    module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})
    with kernels_as_source():
        library = tvm.compile(module, tvm.target.Target(TARGET.tvm))
    return str(library.mod.imports[0].inspect_source())


def launch(
    source: str,
    kernel: str,
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    arrays: Mapping[str, Any],
    *,
    checked: bool,
    seed: int = 0,
) -> None:
    """Run a kernel whose parameters are arrays by name, in whichever order TVM gave them."""
    (signature,) = (found for found in kernels_of(source) if found.name == kernel)
    arguments = [arrays[name.removesuffix("_ptr")] for name in signature.parameters]
    emulator.compile(source, checked=checked).launch(kernel, grid, threads, shared, arguments, seed=seed)


class Layer:
    """A weight on the emulated GPU, for M known when compiling.

    Parameters
    ----------
    weight : TernaryTensor
    bits : int
    rows : int
        M.
    variant : CudaVariant
    """

    def __init__(
        self,
        weight: TernaryTensor,
        bits: int,
        rows: int,
        variant: CudaVariant,
        *,
        bfloat: bool = False,
        epilogue: Epilogue = PLAIN,
        checked: bool = True,
    ) -> None:
        self.row, self.shape = kernel_for(bits, bfloat=bfloat), MatmulShape.of(weight)
        self.kernel, self.rows, self.variant, self.checked = self.row.matmul, rows, variant, checked
        self.constants = self.row.pack(weight)
        self.source = source_of(
            {
                "matmul": matmul_function(self.kernel, self.shape, [variant], rows=rows, epilogue=epilogue),
            }
        )

    def multiply(self, activations: Mapping[str, npt.NDArray[Any]], seed: int = 0, **others: Any) -> npt.NDArray[Any]:
        """The matmul of prepared activations; poisoned before."""
        y = np.full((self.rows, self.shape.n), np.nan, np.float32)
        v, cut = self.variant, Cut(self.kernel, self.shape, self.variant)
        grid = ceil_div(self.rows, v.rows), ceil_div(self.shape.n, v.columns * v.warps_n)
        arrays = {**self.constants, **activations, **others, "y": emulator.Out(y)}
        shared = max(16, cut.shared_bytes)
        launch(self.source, "matmul_kernel", grid, v.threads, shared, arrays, checked=self.checked, seed=seed)
        return y


def prepare(kernel: Any, shape: MatmulShape, x: npt.NDArray[np.float32], *, checked: bool = True) -> dict[str, Any]:
    """What the scheduled function makes of rows x (M, K): a kernel's activations by name; bfloat16 as its bits."""
    m = len(x)
    source = source_of({"rows": rows_function(kernel, shape, m)})
    made = {o.name: np.zeros(o.shape(shape, m), DTYPES.get(o.dtype, o.dtype)) for o in kernel.activations}
    arrays = {"x": x, **{name: emulator.Out(array) for name, array in made.items()}}
    launch(source, "rows_kernel", (_rows_blocks(kernel, shape, m),), 256, 256, arrays, checked=checked)
    return made


def _rows_blocks(kernel: Any, shape: MatmulShape, m: int) -> int:
    """Blocks of threads: four values a thread of 16 bits, a team a group of int8, a block a row of trits."""
    width = shape.padded_k(kernel.block) // shape.groups
    if kernel.name == "matmul_a1":
        return m
    if kernel.name == "matmul_a8":
        return ceil_div(m * shape.groups, 1 if width >= LONG else 8)
    return ceil_div(m * shape.groups * (width // 4), 256)
