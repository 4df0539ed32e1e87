"""Run and time kernels on a GPU with TVM's runtime alone. Travels with `measure`, so it imports no ``tvm``."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import HostError
from tvm_ternary.runtime.cuda import RUNTIME_CUDA, CudaFacts
from tvm_ternary.runtime.cuda import Gpu as GpuFacts
from tvm_ternary.runtime.library import CUDART, load_cuda_runtime, load_runtime

CACHE_BYTES = 256 << 20
"""More than the second-level cache of any GPU: input sets that are used in turns are as large together."""

_CUDA = 2  # as in DLPack
_MOST_SETS = 64
_MOST_LAUNCHES = 400  # fewer than the GPU's queue holds
_MOST_AHEAD = 200
_RANGES: dict[str, tuple[float, float]] = {"int8": (-127, 127), "int32": (-4096, 4096)}
_FLOATS = (0.5, 1.5)

Input = Mapping[str, Any]
"""``dtype`` and ``shape`` of an array; ``low`` and ``high``, which its values are drawn from, where it matters."""


def find_gpu(facts: CudaFacts, arch: str, number: int = 0) -> GpuFacts:
    """Give a GPU, if it can be measured on.

    Parameters
    ----------
    facts : CudaFacts
        From `tvm_ternary.runtime.driver.read_devices`.
    arch : str
        Such as ``sm_90``. Code for it may run on other GPUs, too, but times there say nothing of it.
    number : int

    Raises
    ------
    HostError
        If there is no driver, it is too old or finds no GPU, there is no such GPU, or it is of another architecture.
    """
    subject = f"device cuda:{number}"
    if facts.library is not None:
        raise HostError(subject, f"this host has no NVIDIA driver ({facts.library})")
    if facts.version < RUNTIME_CUDA:
        known, needed = (".".join(map(str, version)) for version in (facts.version, RUNTIME_CUDA))
        raise HostError(subject, f"the NVIDIA driver knows CUDA {known}; expected {needed} or later", "update it")
    if not facts.gpus:
        raise HostError(subject, f"the NVIDIA driver finds no GPU ({facts.initialization or 'it lists none'})")
    found = next((gpu for gpu in facts.gpus if gpu.number == number and gpu.arch == arch), None)
    if found is None:
        raise HostError(subject, f"is no {arch}; this host has {', '.join(map(str, facts.gpus))}")
    return found


class Gpu:
    """A GPU and the arrays and functions on it.

    Parameters
    ----------
    beside : Path
        A folder in which the runtime libraries may lie.
    number : int
        As in ``cuda:0``.

    Raises
    ------
    HostError
        If a library is missing or cannot be loaded, which is so wherever there is no driver.
    """

    def __init__(self, beside: Path, number: int = 0) -> None:
        self._ffi = load_runtime(beside)
        load_cuda_runtime(beside)
        # The copy that TVM's library has loaded.
        self._cuda = ctypes.CDLL(CUDART)
        self._cuda.cudaGetErrorName.restype = ctypes.c_char_p
        self._call("cudaSetDevice", number)
        self._place = self._ffi.device("cuda", number)
        self._allocate, self._write, self._read = (
            self._ffi.get_global_func(f"runtime.{name}")
            for name in ("TVMTensorAllocWithScope", "TVMTensorCopyFromBytes", "TVMTensorCopyToBytes")
        )
        self._start, self._stop = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (self._start, self._stop):
            self._call("cudaEventCreate", ctypes.byref(event))
        self._flushed = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(self._flushed), ctypes.c_size_t(CACHE_BYTES))
        self._flush(1)
        self._flush_seconds = max(self._elapsed(lambda: self._flush(1)), 1e-6)

    def function(self, library: Path, name: str) -> Callable[..., None]:
        """Load a function, which queues its kernel and returns."""
        function: Callable[..., None] = self._ffi.load_module(str(library))[name]
        return function

    def array(self, values: npt.NDArray[Any], dtype: str) -> Any:
        """Copy to the GPU; ``dtype`` names what numpy has no name for."""
        source = np.ascontiguousarray(values)
        tensor = self._allocate(self._ffi.Shape(source.shape), self._ffi.dtype(dtype), self._place, None)
        self._write(tensor, ctypes.c_void_p(source.ctypes.data), source.nbytes)
        return tensor

    def read(self, tensor: Any) -> npt.NDArray[np.float32]:
        """Copy float32 from the GPU, once all that was queued is done."""
        array = np.empty(tuple(tensor.shape), np.float32)
        self._read(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def time(self, function: Callable[..., None], sets: Sequence[Sequence[Any]], launches: int) -> float:
        """Seconds a launch, of so many with the sets of arguments in turns, none of them in the cache at first."""

        def run() -> None:
            for index in range(launches):
                function(*sets[index % len(sets)])

        begun = time.perf_counter()
        run()
        queued = time.perf_counter() - begun
        self._call("cudaDeviceSynchronize")
        # The GPU is busy for as long as this process needs to queue the launches, or that would be measured.
        self._flush(min(_MOST_AHEAD, 1 + math.ceil(1.5 * queued / self._flush_seconds)))
        return self._elapsed(run) / launches

    def _elapsed(self, queue: Callable[[], None]) -> float:
        self._call("cudaEventRecord", self._start, None)
        queue()
        self._call("cudaEventRecord", self._stop, None)
        self._call("cudaEventSynchronize", self._stop)
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), self._start, self._stop)
        # An error of a kernel comes with whatever is called after it.
        self._call("cudaDeviceSynchronize")
        return max(milliseconds.value * 1e-3, 1e-9)

    def _flush(self, times: int) -> None:
        for _ in range(times):
            self._call("cudaMemsetAsync", self._flushed, 0, ctypes.c_size_t(CACHE_BYTES), None)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cuda, function)(*arguments)
        if status:
            raise RuntimeError(f"{function}: {self._cuda.cudaGetErrorName(status).decode()}")


def random_values(given: Input, generator: np.random.Generator) -> npt.NDArray[Any]:
    """Values of an input; bfloat16 as its bits."""
    dtype, shape = given["dtype"], tuple(given["shape"])
    if "float" in dtype:
        values = generator.uniform(*_limits(given, _FLOATS), shape).astype(np.float32)
        if dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(dtype)
    kind = np.iinfo(dtype)
    low, high = _limits(given, _RANGES.get(dtype, (kind.min, kind.max)))
    return generator.integers(int(low), int(high), shape, dtype, endpoint=True)


def _limits(given: Input, default: tuple[float, float]) -> tuple[float, float]:
    return given.get("low", default[0]), given.get("high", default[1])


def random_sets(gpu: Gpu, inputs: Sequence[Input], most: int = _MOST_SETS) -> list[list[Any]]:
    """Sets of arguments, the last of each for the results, so many that they do not stay in the cache together."""
    generator = np.random.default_rng(0)
    arrays = [random_values(given, generator) for given in inputs]
    count = min(most, math.ceil(CACHE_BYTES / max(1, sum(array.nbytes for array in arrays))))
    # Values do not matter for the time; where they lie does.
    return [[gpu.array(a, given["dtype"]) for a, given in zip(arrays, inputs, strict=True)] for _ in range(count)]


def time_in_turns(
    gpu: Gpu,
    functions: Sequence[Callable[..., None]],
    sets: Sequence[Sequence[Any]],
    rounds: int,
    milliseconds: float,
    begin: Callable[[int], None] = lambda index: None,
) -> list[list[float]]:
    """Seconds a launch of each function, a value a round; every round times each of them once.

    Parameters
    ----------
    gpu : Gpu
    functions : sequence of callable
        From `Gpu.function`.
    sets : sequence of sequence of array
        From `random_sets`.
    rounds : int
    milliseconds : float
        How long each is launched in a round, about.
    begin : callable
        Told of the number of a function before it is launched.
    """
    launches: list[int] = []
    for index, function in enumerate(functions):
        begin(index)
        launches.append(max(1, min(_MOST_LAUNCHES, round(1e-3 * milliseconds / gpu.time(function, sets, 1)))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for index, function in enumerate(functions):
            begin(index)
            times[index].append(gpu.time(function, sets, launches[index]))
    return times
