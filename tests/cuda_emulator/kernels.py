"""Compiled kernels, and their launch on arrays."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import toolchain
from .errors import EmulatorError
from .source import kernels_of

Dimensions = int | Sequence[int]

_NUMBERS = {
    "i1": ctypes.c_int8,
    "i2": ctypes.c_int16,
    "i4": ctypes.c_int32,
    "i8": ctypes.c_int64,
    "u1": ctypes.c_uint8,
    "u2": ctypes.c_uint16,
    "u4": ctypes.c_uint32,
    "u8": ctypes.c_uint64,
    "f4": ctypes.c_float,
    "f8": ctypes.c_double,
}
_ALIGNMENT = 16
_READ_ONLY = 1


class _Row(ctypes.Structure):
    """struct tt_kernel of native/emulator.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("invoke", ctypes.c_void_p),
        ("signature", ctypes.c_char_p),
        ("parameters", ctypes.c_char_p),
        ("shared_begin", ctypes.c_void_p),
        ("shared_end", ctypes.c_void_p),
        ("max_threads", ctypes.c_uint),
        ("checked", ctypes.c_int),
    )


@dataclass(frozen=True)
class Out:
    """An array that a kernel must write wholly; what was in it is not seen by the kernel."""

    array: np.ndarray


@dataclass(frozen=True)
class InOut:
    """An array that a kernel reads and writes."""

    array: np.ndarray


@functools.cache
def _emulator() -> ctypes.CDLL:
    library = ctypes.CDLL(str(toolchain.emulator_library()), mode=ctypes.RTLD_GLOBAL)
    library.tt_emu_alloc.restype = ctypes.c_void_p
    library.tt_emu_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    library.tt_emu_free.argtypes = [ctypes.c_void_p]
    library.tt_emu_protect.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.tt_emu_mark_written.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.tt_emu_first_unwritten.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.tt_emu_first_unwritten.restype = ctypes.c_int64
    library.tt_emu_set_seed.argtypes = [ctypes.c_uint64]
    library.tt_emu_error.restype = ctypes.c_char_p
    library.tt_emu_launch.argtypes = [
        ctypes.POINTER(_Row),
        ctypes.c_uint * 3,
        ctypes.c_uint * 3,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    return library


class _Buffer:
    """A copy of an array in the emulator's global memory, with a guard page behind its last byte."""

    def __init__(self, argument: object) -> None:
        self.argument = argument
        array = argument.array if isinstance(argument, Out | InOut) else argument
        assert isinstance(array, np.ndarray)
        if not array.flags.c_contiguous:
            raise EmulatorError("an argument is not contiguous")
        self.array = array
        self.address = _emulator().tt_emu_alloc(array.nbytes, _ALIGNMENT)
        if not isinstance(argument, Out):
            ctypes.memmove(self.address, array.ctypes.data, array.nbytes)
            _emulator().tt_emu_mark_written(self.address, array.nbytes)
        self._fill = self._bytes() if isinstance(argument, Out) else np.zeros(0, np.uint8)
        if isinstance(argument, np.ndarray):
            _emulator().tt_emu_protect(self.address, _READ_ONLY)

    def copy_back(self) -> None:
        """Give the caller what the kernel wrote."""
        if not isinstance(self.argument, np.ndarray):
            ctypes.memmove(self.array.ctypes.data, self.address, self.array.nbytes)

    def unwritten(self, checked: bool) -> np.ndarray:
        """Which elements of an output nothing wrote: the first after a checked kernel, suspects after another."""
        if not isinstance(self.argument, Out) or not self.array.size:
            return np.zeros(0, bool)
        if checked:
            offset = _emulator().tt_emu_first_unwritten(self.address, self.array.nbytes)
            return np.arange(self.array.size) == (offset // self.array.itemsize if offset >= 0 else -1)
        same = self._bytes() == self._fill
        return same.reshape(self.array.size, -1).all(axis=1)

    def refill(self) -> None:
        """Put something else into an output than is there now."""
        if isinstance(self.argument, Out):
            self._fill = ~self._bytes()
            ctypes.memmove(self.address, self._fill.ctypes.data, self._fill.nbytes)

    def _bytes(self) -> np.ndarray:
        return np.frombuffer(ctypes.string_at(self.address, self.array.nbytes), np.uint8)

    def free(self) -> None:
        """Unmap."""
        _emulator().tt_emu_free(self.address)


class Kernels:
    """The kernels of one source.

    Attributes
    ----------
    names : kernels that can be launched
    """

    def __init__(self, source: str, library: Path, checked: bool) -> None:
        _emulator()
        self.library = library
        self.checked = checked
        self._parameters = {k.name: k.parameters for k in kernels_of(source)}
        self._handle = ctypes.CDLL(str(library))
        table = (_Row * (len(self._parameters) + 1)).in_dll(self._handle, "tt_kernels")
        self._rows = {row.name.decode(): row for row in table if row.name}
        self.names = tuple(self._rows)

    def launch(
        self,
        name: str,
        grid: Dimensions,
        block: Dimensions,
        dynamic_shared_bytes: int,
        args: Sequence[Any],
        *,
        seed: int = 0,
    ) -> None:
        """Run a kernel on every thread of a grid.

        Parameters
        ----------
        grid, block : up to three extents, x first
        args : an array for a pointer (read-only as it stands, or in `Out` or `InOut`), a number for a number
        seed : order of the warps of a block between two barriers; 0 is ascending

        Raises
        ------
        EmulatorError
            If threads diverge at a barrier or collective, touch what isn't there, write an input, or leave a part of
            an `Out` unwritten; with checked kernels also if they race or read what nothing wrote.
        """
        if name not in self._rows:
            raise EmulatorError(f"no kernel {name}; there are {', '.join(self.names)}")
        row, parameters = self._rows[name], self._parameters[name]
        if len(args) != len(parameters):
            raise EmulatorError(f"kernel {name} takes {len(parameters)} arguments {parameters}, got {len(args)}")
        buffers: dict[int, _Buffer] = {}
        try:
            values = [self._value(row, i, argument, buffers) for i, argument in enumerate(args)]
            again = functools.partial(self._run, row, grid, block, dynamic_shared_bytes, values, seed)
            again()
            self._require_written(name, buffers, again)
            for buffer in buffers.values():
                buffer.copy_back()
        finally:
            for buffer in buffers.values():
                buffer.free()

    def _require_written(self, name: str, buffers: dict[int, _Buffer], again: Callable[[], None]) -> None:
        missing = {i: buffer.unwritten(self.checked) for i, buffer in buffers.items()}
        if not self.checked and any(m.any() for m in missing.values()):
            # An element may look like what was there before by chance; not twice, over something else.
            if any(isinstance(buffer.argument, InOut) for buffer in buffers.values()):
                return
            for buffer in buffers.values():
                buffer.refill()
            again()
            missing = {i: m & buffers[i].unwritten(False) for i, m in missing.items()}
        for i, unwritten in missing.items():
            if unwritten.any():
                array = buffers[i].array
                raise EmulatorError(
                    f"kernel {name}: no thread writes element {int(unwritten.argmax())} of output "
                    f"{self._parameters[name][i]} (argument {i}, {array.size} elements of {array.dtype})"
                )

    def _value(self, row: _Row, i: int, argument: object, buffers: dict[int, _Buffer]) -> Any:
        code = row.signature.decode()[2 * i : 2 * i + 2]
        is_array = isinstance(argument, np.ndarray | Out | InOut)
        if is_array != (code[0] in "PC"):
            kind = "a pointer" if code[0] in "PC" else "a number"
            raise EmulatorError(f"kernel {row.name.decode()}: argument {i} is {kind}, got {type(argument).__name__}")
        if not is_array:
            return _NUMBERS[code](argument)  # type: ignore[arg-type]
        buffers[i] = _Buffer(argument)
        return ctypes.c_void_p(buffers[i].address)

    def _run(self, row: _Row, grid: Dimensions, block: Dimensions, shared: int, values: list[Any], seed: int) -> None:
        emulator = _emulator()
        emulator.tt_emu_set_seed(seed)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        if emulator.tt_emu_launch(ctypes.byref(row), _three(grid), _three(block), shared, pointers):
            raise EmulatorError(toolchain.with_source_lines(emulator.tt_emu_error().decode(), self.library))


def _three(dimensions: Dimensions) -> Any:
    given = (dimensions,) if isinstance(dimensions, int) else tuple(dimensions)
    return (ctypes.c_uint * 3)(*given, *(1,) * (3 - len(given)))


@functools.cache
def compile(source: str, *, checked: bool = True, architecture: int = 800) -> Kernels:
    """Compile the kernels of a CUDA source for the CPU.

    Parameters
    ----------
    source : CUDA C++ as TVM generates it (``module.inspect_source()``); kernels are `extern "C" __global__`
    checked : trace every access: slower by some ten times, finds races and reads of what nothing wrote
    architecture : the value of ``__CUDA_ARCH__``

    Raises
    ------
    EmulatorError
        If g++ refuses the source.
    """
    if not kernels_of(source):
        raise EmulatorError('the source defines no kernel: none begins with extern "C" __global__ void')
    library = toolchain.kernel_library(source, checked=checked, architecture=architecture)
    return Kernels(source, library, checked)
