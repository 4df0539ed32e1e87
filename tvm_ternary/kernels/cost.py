"""What a ternary matmul cannot do without: the bytes it must move and the operations it must do.

Beside them a measured time says how much of a machine it uses; under them no schedule can go.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.target.cuda import CudaArch

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int32": 4, "uint32": 4}


@dataclass(frozen=True)
class Cost:
    """The least that a product of M rows costs.

    Attributes
    ----------
    weight_bytes : int
        Packed weights and their scales, once.
    row_bytes : int
        Prepared activations, once, and the float32 results.
    operations : int
        Multiplications and additions: 2 M N K, for each plane where planes cannot be summed before.
    """

    weight_bytes: int
    row_bytes: int
    operations: int

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.row_bytes

    def floor(self, arch: CudaArch, activation_bits: int) -> float:
        """Seconds below which a GPU cannot be: the longer one of moving and of computing.

        Parameters
        ----------
        arch : CudaArch
        activation_bits : int
            Its tensor cores' peak is halved for 16 bits; for 1 bit int8's is taken, since makers state no other.
        """
        peak = arch.int8_peak / 2 if activation_bits == 16 else arch.int8_peak
        return max(self.bytes / arch.bandwidth, self.operations / peak)


def matmul_cost(kernel: MatmulKernel, shape: MatmulShape, rows: int) -> Cost:
    """Count what ``kernel`` costs for weights of ``shape`` and M = ``rows``."""

    def size(dtype: str, extents: tuple[int, ...]) -> int:
        return _ITEM_BYTES[dtype] * prod(extents)

    operands = [kernel.weight, *kernel.scales(shape)]
    weights = sum(size(operand.dtype, operand.shape(shape, rows)) for operand in operands)
    activations = sum(size(operand.dtype, operand.shape(shape, rows)) for operand in kernel.activations)
    products = shape.planes if kernel.layout == "bits" else 1
    return Cost(weights, activations + 4 * rows * shape.n, 2 * rows * shape.n * shape.k * products)
