"""What this machine can do at most, measured: reading memory, and multiplying in registers.

The yardstick is C code (``roofline.c``) and not TVM's, so that it shares nothing with what it is held against. It uses
the instruction set of the target under test: a forced AVX2 target is held against the peak of AVX2.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from tvm_ternary.bench.memory import aligned
from tvm_ternary.build.link import find_linker
from tvm_ternary.errors import HostError
from tvm_ternary.target import Target

_SOURCE = Path(__file__).with_name("roofline.c")
_TIER_FLAGS = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx512-vnni": ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
}
_SECONDS = 0.01
_TRIALS = 15


class Roofline:
    """The limits of ``threads`` threads that run code for ``target``.

    Each is the best of 15 trials of about 10 ms: a limit is what was reached once.

    Parameters
    ----------
    target : Target
        One that this host can run.
    threads : int

    Raises
    ------
    HostError
        If there is no C compiler, or it does not know the target's instructions.
    """

    def __init__(self, target: Target, threads: int) -> None:
        self._library = _build(target)
        self._threads = threads
        self._bandwidths: dict[int, float] = {}

    def bandwidth(self, size: int) -> float:
        """Bytes a second when ``size`` bytes, shared out to the threads, are read again and again by vector loads.

        A size beyond the caches gives the bandwidth of memory.
        """
        if size not in self._bandwidths:
            # Whole rounds of eight vectors of 64 bytes.
            part = max(size // self._threads // 512, 1) * 512
            buffers = [aligned((part // 4,), np.float32, fill=1) for _ in range(self._threads)]

            def read(thread: int, times: int) -> int:
                self._library.read_buffer(buffers[thread].ctypes.data, part, times)
                return part * times

            self._bandwidths[size] = self._best(read)
        return self._bandwidths[size]

    @cached_property
    def int8_peak(self) -> float:
        """int8 multiplications and additions a second, by the target's instructions for them."""
        return self._best(lambda thread, steps: int(self._library.multiply_bytes(steps)))

    @cached_property
    def float32_peak(self) -> float:
        """float32 multiplications and additions a second."""
        return self._best(lambda thread, steps: int(self._library.multiply_floats(steps)))

    def _best(self, work: Callable[[int, int], int]) -> float:
        """The highest rate of ``work(thread, times)``, which returns how much it did, of all threads together."""
        times, seconds = 1, 0.0
        while seconds < _SECONDS:
            times = max(2 * times, int(times * _SECONDS / max(seconds, 1e-6))) if seconds else times
            start = time.perf_counter()
            work(0, times)
            seconds = max(time.perf_counter() - start, 1e-9)
        barrier = Barrier(self._threads)

        def rate(thread: int) -> float:
            barrier.wait()
            start = time.perf_counter()
            done = work(thread, times)
            return done / (time.perf_counter() - start)

        with ThreadPoolExecutor(self._threads) as pool:
            return max(sum(pool.map(rate, range(self._threads))) for _ in range(_TRIALS))


def _build(target: Target) -> Any:
    compiler = find_linker(str(target.tvm["mtriple"]))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofline.so"
        flags = (*_TIER_FLAGS.get(target.tier, ()), f"-DVECTOR_BYTES={target.vector_bits // 8}")
        command = [*compiler, "-x", "c", "-O2", "-fPIC", "-shared", *flags, str(_SOURCE), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode != 0:
            reason = next(iter(result.stderr.strip().splitlines()), f"exit status {result.returncode}")
            raise HostError(compiler[0], f"cannot compile the roofline ({reason})", "set CC to a newer compiler")
        loaded = ctypes.CDLL(str(library))
    loaded.read_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    loaded.read_buffer.restype = None
    for name in ("multiply_bytes", "multiply_floats"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    return loaded
