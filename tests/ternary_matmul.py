"""Build a ternary matmul for a target of this host and call it with numpy arrays."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm
import tvm_ffi

from tvm_ternary.formats import Granularity, group_segments, pad_groups
from tvm_ternary.kernels.matmul import Epilogue
from tvm_ternary.kernels.shape import MatmulShape, Variant
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.schedule.tasks import choose_variants
from tvm_ternary.schedule.ternary import matmul_function
from tvm_ternary.target import Target, host_features, resolve
from tvm_ternary.target.cpu import cpu_names

TARGETS = (
    # The portable tier has no name of its own.
    '{"kind": "llvm"}',
    *(name for name in cpu_names() if resolve(name).architecture == platform.machine()),
)
NATIVE = resolve("native")
UNIT = 2.0**-24
"""Unit roundoff of float32: the largest relative error of one rounding."""

_ALIGNMENT = 64
_GUARD = 64
_SENTINEL = np.float32(-12345.678)


def gamma(roundings: int) -> float:
    """gamma_n = n u / (1 - n u), the largest relative error after n roundings (Higham 2002, lemma 3.1)."""
    return roundings * UNIT / (1 - roundings * UNIT)


def unrunnable(target: Target) -> str | None:
    """Why this host's CPU cannot run code for ``target``, None if it can."""
    if target.kind != "cpu":
        return f"{target.name} is for a GPU"
    if target.architecture != platform.machine():
        return f"{target.name} is for {target.architecture}; this host is {platform.machine()}"
    missing = sorted(target.features - host_features())
    return f"{target.name} needs {', '.join(missing)}, which this CPU lacks" if missing else None


def runnable(name: str) -> Target:
    """The target of that name; skips the test, with the reason, where this host cannot run it."""
    target = resolve(name)
    reason = unrunnable(target)
    if reason is not None:
        pytest.skip(reason)
    return target


def build(functions: Mapping[str, tvm.tirx.PrimFunc], target: Target) -> Any:
    """Compile functions under these names."""
    module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})
    return tvm.compile(module, tvm.target.Target(target.tvm))


class Matmul:
    """A compiled ternary matmul.

    Parameters
    ----------
    bits : int
        Key of the kernel table.
    shape : MatmulShape
    target : Target
    variants : sequence of Variant, optional
        None: what ``schedules/`` holds for the target.
    rows : int, optional
        M where it is to be known when compiling.
    packing : str
        How the weights are packed.
    """

    def __init__(
        self,
        bits: int,
        shape: MatmulShape,
        target: Target,
        *,
        variants: Sequence[Variant] | None = None,
        rows: int | None = None,
        epilogue: Epilogue = Epilogue(),  # noqa: B008  frozen
        packing: str = "fast",
    ) -> None:
        kernel = kernel_for(bits, packing).matmul
        chosen = tuple(variants or choose_variants(bits, shape, target.tier, packing=packing).variants)
        function = matmul_function(kernel, shape, chosen, target.tier, rows=rows, epilogue=epilogue)
        self.shape, self.variants, self.library = shape, chosen, build({"matmul": function}, target)
        self._function = self.library["matmul"]

    def __call__(self, rows: int, *operands: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Run on ``rows`` rows; checks that nothing beside the result is written."""
        size, n = rows * self.shape.n, self.shape.n
        memory = aligned(2 * _GUARD + size)
        memory[:] = _SENTINEL
        y = memory[_GUARD : _GUARD + size].reshape(rows, n)
        y[:] = np.nan
        result = tvm_ffi.from_dlpack(y) if size else tvm.runtime.empty((rows, n), "float32")
        self._function(*map(tvm.runtime.tensor, operands), result)
        outside = np.delete(memory, slice(_GUARD, _GUARD + size))
        assert (outside == _SENTINEL).all()
        assert not np.isnan(y).any()
        return y


def aligned(count: int) -> npt.NDArray[np.float32]:
    """``count`` floats that start where compiled code expects arrays to start."""
    memory = np.empty(count + _ALIGNMENT // 4, np.float32)
    start = -memory.ctypes.data % _ALIGNMENT // 4
    return memory[start : start + count]


def rows_of(
    bits: int, x: npt.NDArray[Any], x_scale: npt.NDArray[np.float32], granularity: Granularity, block: int = 16
) -> list[npt.NDArray[Any]]:
    """The activations that a matmul takes, from (M, K) of them and their scales, packed by numpy alone.

    x is float32 (32 bits, no scales), int8 (8 bits, x_scale (M, G), for weights in blocks of ``block``) or trits
    (1 bit, x_scale (M,)).
    """
    if bits == 32:
        return [pad_groups(x, granularity, 16)]
    if bits == 8:
        padded = pad_groups(x, granularity, block)
        return [padded, segment_sums(padded, granularity, x.shape[1], block), x_scale]
    return [pack_trits(x, granularity), x_scale]


def segment_sums(
    padded: npt.NDArray[np.int8], granularity: Granularity, k: int, block: int = 16
) -> npt.NDArray[np.int32]:
    """The sum of each segment of padded rows: (M, S)."""
    splits, _ = group_segments(granularity.group_size(k), block)
    segments = splits * granularity.groups(k)
    return padded.reshape(len(padded), segments, padded.shape[1] // segments).sum(axis=2, dtype=np.int32)


def pack_trits(x: npt.NDArray[np.int8], granularity: Granularity) -> npt.NDArray[np.uint32]:
    """Nonzero and minus bits of trits (M, K), 32 to a word, each group padded to whole words: (M, words, 2)."""
    padded = pad_groups(x, granularity, 32)
    planes = [np.packbits(bits, axis=1, bitorder="little").view("<u4") for bits in (padded != 0, padded < 0)]
    return np.ascontiguousarray(np.stack(planes, axis=-1))
