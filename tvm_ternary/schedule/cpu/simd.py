"""What a CPU target offers to a schedule: the width of its vectors and how many of them it can hold."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import DataType
from tvm.target import Target
from tvm.target.codegen import target_has_features


@dataclass(frozen=True)
class Simd:
    """The vector unit of a CPU.

    Parameters
    ----------
    bits : int
        Width of one vector register in bits.
    registers : int
        Architectural vector registers.
    """

    bits: int
    registers: int

    def lanes(self, dtype: str) -> int:
        """Elements of `dtype` that fit in one vector; booleans take a byte.

        Parameters
        ----------
        dtype : str
            A TVM scalar type, such as ``"float32"``.
        """
        bits = max(int(DataType(dtype).bits), 8)
        return max(self.bits // bits, 1)


# First feature the target has wins. Without any of them LLVM still has 128-bit vectors on every CPU that matters.
UNITS: tuple[tuple[str, Simd], ...] = (
    ("avx512f", Simd(512, 32)),
    ("avx", Simd(256, 16)),
    ("neon", Simd(128, 32)),
)
BASELINE = Simd(128, 16)


def simd_of(target: Target) -> Simd:
    """Read the vector unit off the features of an LLVM target.

    TVM's own ``llvm_get_vector_width`` answers 512 for plain x86-64, so features are asked one by one.

    Parameters
    ----------
    target : tvm.target.Target
        A target of kind ``llvm``.

    Returns
    -------
    Simd
    """
    for feature, unit in UNITS:
        if target_has_features(feature, target):
            return unit
    return BASELINE
