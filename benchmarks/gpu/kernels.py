"""The library of kernels, called with numpy arrays, with TVM's runtime alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats import BITS_BLOCK, CODES_BLOCK, Scheme, group_segments, padded_k
from tvm_ternary.tuning.batch.gpu import Gpu

_HELD = {"float16": np.uint16, "bfloat16": np.uint16}
_POISON = {"float32": np.nan, "float16": 0x7E00, "bfloat16": 0x7FC0}


def activation_arrays(scheme: Scheme, m: int, k: int) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of what a kernel reads of M rows, in order."""
    block = BITS_BLOCK if scheme.activation_bits == 1 else CODES_BLOCK
    groups, width = padded_k(k, scheme.granularity, block)
    if scheme.activation_bits == 16:
        return [((m, groups * width), "bfloat16" if scheme.bfloat else "float16")]
    if scheme.activation_bits == 1:
        return [((m, groups * width // 32, 2), "uint32"), ((m,), "float32")]
    segments = groups * group_segments(scheme.granularity.group_size(k), block)[0]
    return [((m, groups * width), "int8"), ((m, segments), "int32"), ((m, groups), "float32")]


class Kernels:
    """The library on a GPU."""

    def __init__(self, folder: Path) -> None:
        self.gpu, self.path = Gpu(folder), folder / "kernels.so"

    def _poisoned(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.gpu.array(np.full(shape, _POISON.get(dtype, 0x55), _HELD.get(dtype, dtype)), dtype)

    def matmul(
        self, name: str, scheme: Scheme, n: int, k: int, packed: Sequence[npt.NDArray[Any]]
    ) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
        """y = x w^T by the library's two functions; what they write is poisoned before."""
        constants = [self.gpu.array(array, array.dtype.name) for array in packed]
        rows, multiply = (self.gpu.function(self.path, f"{kind}_{name}") for kind in ("rows", "matmul"))

        def call(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            held = [self._poisoned(*array) for array in activation_arrays(scheme, len(x), k)]
            y = self._poisoned((len(x), n), "float32")
            rows(self.gpu.array(x, "float32"), *held)
            multiply(*held, *constants, y)
            return self.gpu.read(y)

        return call
