"""What this machine can do at most, measured: reading memory, and multiplying in registers.

The yardstick is C code (``roofline.c``) and not TVM's, so that it shares nothing with what it is held against. It uses
the instruction set of the target under test: a forced AVX2 target is held against the peak of AVX2. Only the tile unit
(AMX) is measured wherever the CPU has one.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from tvm_ternary.bench.machine import cache_sizes
from tvm_ternary.bench.memory import aligned
from tvm_ternary.build.link import find_linker
from tvm_ternary.errors import HostError
from tvm_ternary.target import TIERS, Target, host_features, require_host

_SOURCE = Path(__file__).with_name("roofline.c")
_VNNI = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512vpopcntdq", "-mprefer-vector-width=512")
_TIER_FLAGS = {
    "sse4": ("-march=x86-64-v2",),
    "avx2": ("-march=x86-64-v3",),
    "avx2-vnni": ("-march=x86-64-v3", "-mavxvnni"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx512-vnni": _VNNI,
    "amx": _VNNI,
    "neon-dot": ("-march=armv8.2-a+dotprod",),
}
_TILES = "amx_int8"
_TILE_FLAGS = ("-mamx-tile", "-mamx-int8")
# Bits of an activation -> the attribute of `Roofline`; each is measured when it is first asked for.
_PEAKS = {32: "float32_peak", 8: "int8_peak", 1: "trit_peak"}
_SECONDS = 0.01
_TRIALS = 15
# Last-level caches: a buffer that tells how fast memory is, as long as the copies of a cold weight together.
_MEMORY = 4
# Bytes read at a time of a longer buffer: a trial goes on where the last one ended and need not be a whole round, which
# takes half a second where a large server's cache is shared out to small machines.
_PIECE = 1 << 24


@dataclass(frozen=True)
class Limits:
    """What one thread or several can do at most.

    Attributes
    ----------
    bandwidths : dict of str to float
        ``L1`` to ``L3`` and ``memory`` -> bytes a second.
    peaks : dict of str to float
        ``int8``, ``float32``, ``trits`` and perhaps ``int8 tiles`` -> operations a second; a multiplication and an
        addition are two.
    """

    bandwidths: dict[str, float]
    peaks: dict[str, float]

    def as_json(self) -> dict[str, dict[str, float]]:
        """Giga-units a second by name."""
        return {
            "bandwidths_gbs": {name: value / 1e9 for name, value in self.bandwidths.items()},
            "peaks_gops": {name: value / 1e9 for name, value in self.peaks.items()},
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Limits:
        """Read what `as_json` gives.

        Raises
        ------
        KeyError, TypeError, AttributeError
            If something is missing or of another type.
        """
        names = ("bandwidths_gbs", "peaks_gops")
        return cls(*({name: value * 1e9 for name, value in line[key].items()} for key in names))


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
        If this host cannot run the target's code, there is no C compiler, or it does not know the target's
        instructions.
    """

    def __init__(self, target: Target, threads: int) -> None:
        require_host(target, "leave target out to measure for this host")
        self._has_tiles = _TILES in host_features()
        self._uses_tiles = _TILES in target.features
        self._library = build(target, self._has_tiles)
        self._threads = threads
        self._bandwidths: dict[int, float] = {}

    def bandwidth(self, size: int) -> float:
        """Bytes a second when ``size`` bytes, shared out to the threads, are read again and again by vector loads."""
        if size not in self._bandwidths:
            # Whole rounds of eight vectors of 64 bytes.
            part = max(size // self._threads // 512, 1) * 512
            readers = [_Reader(self._library, part) for _ in range(self._threads)]
            self._bandwidths[size] = self._best(lambda thread, times: readers[thread].read(times))
        return self._bandwidths[size]

    @cached_property
    def memory(self) -> float:
        """Bytes a second of a buffer far beyond the caches.

        Raises
        ------
        HostError
            If the kernel does not say how large the caches are.
        """
        sizes = cache_sizes()
        if not sizes:
            raise HostError("the kernel", "does not say how large the caches are", "measure without --cold")
        return self.bandwidth(_MEMORY * max(sizes.values()))

    @cached_property
    def int8_peak(self) -> float:
        """int8 multiplications and additions a second, by the target's vector instructions for them."""
        return self._best(lambda thread, steps: int(self._library.multiply_bytes(steps)))

    @cached_property
    def float32_peak(self) -> float:
        """float32 multiplications and additions a second."""
        return self._best(lambda thread, steps: int(self._library.multiply_floats(steps)))

    @cached_property
    def trit_peak(self) -> float:
        """Multiplications and additions of trits a second, by counting the ones of bit planes."""
        return self._best(lambda thread, steps: int(self._library.multiply_trits(steps)))

    @cached_property
    def tile_peak(self) -> float | None:
        """int8 multiplications and additions a second of the tile unit; None without one, or where it is barred."""
        if not self._has_tiles:
            return None
        library = self._library
        try:
            return self._best(lambda thread, steps: int(library.multiply_tiles(steps)), self._open_tiles)
        except PermissionError:
            return None

    def peak(self, activation_bits: int) -> float:
        """Operations a second at most of a kernel with such activations, for this target."""
        if activation_bits == 8 and self._uses_tiles:
            return max(self.int8_peak, self.tile_peak or 0.0)
        peak: float = getattr(self, _PEAKS[activation_bits])
        return peak

    def limits(self) -> Limits:
        """All of them: half of a cache is read to know the cache, the last level shared by the threads."""
        sizes = cache_sizes()
        last = max(sizes, default=0)
        levels = {f"L{level}": size // 2 * (1 if level == last else self._threads) for level, size in sizes.items()}
        bandwidths = {name: self.bandwidth(size) for name, size in sorted(levels.items())}
        if sizes:
            bandwidths["memory"] = self.memory
        peaks = {"int8": self.int8_peak, "float32": self.float32_peak, "trits": self.trit_peak}
        if self.tile_peak is not None:
            peaks["int8 tiles"] = self.tile_peak
        return Limits(bandwidths, peaks)

    def _open_tiles(self) -> None:
        if not self._library.open_tiles():
            raise PermissionError("the kernel bars the tile registers")

    def _best(self, work: Callable[[int, int], int], prepare: Callable[[], None] = lambda: None) -> float:
        """The highest rate of ``work(thread, times)``, which returns how much it did, of all threads together."""
        barrier = Barrier(self._threads)

        def rate(thread: int) -> float:
            prepare()
            barrier.wait()
            start = time.perf_counter()
            done = work(thread, times)
            return done / (time.perf_counter() - start)

        with ThreadPoolExecutor(self._threads) as pool:
            times = pool.submit(_calibrate, work, prepare).result()
            return max(sum(pool.map(rate, range(self._threads))) for _ in range(_TRIALS))


class _Reader:
    """A buffer of ``size`` bytes that one thread reads round and round, a piece at a time."""

    def __init__(self, library: Any, size: int) -> None:
        self._library, self._buffer = library, aligned((size // 4,), np.float32, fill=1)
        self._next = 0

    def read(self, pieces: int) -> int:
        """Bytes read."""
        size, start = self._buffer.nbytes, self._buffer.ctypes.data
        if size <= _PIECE:
            self._library.read_buffer(start, size, pieces)
            return size * pieces
        done = 0
        for _ in range(pieces):
            length = min(_PIECE, size - self._next)
            self._library.read_buffer(start + self._next, length, 1)
            self._next = (self._next + length) % size
            done += length
        return done


def _calibrate(work: Callable[[int, int], int], prepare: Callable[[], None]) -> int:
    """How often ``work`` fills a trial."""
    prepare()
    times, seconds = 1, 0.0
    while seconds < _SECONDS:
        times = max(2 * times, int(times * _SECONDS / max(seconds, 1e-6))) if seconds else times
        start = time.perf_counter()
        work(0, times)
        seconds = max(time.perf_counter() - start, 1e-9)
    return times


def build(target: Target, tiles: bool) -> Any:
    """Compile ``roofline.c`` for a target, and the tile unit if asked for, and load it.

    Raises
    ------
    HostError
        If there is no C compiler, or it does not know the instructions.
    """
    compiler = find_linker(str(target.tvm["mtriple"]))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofline.so"
        flags = (*_TIER_FLAGS.get(target.tier, ()), *(_TILE_FLAGS if tiles else ()))
        width = f"-DVECTOR_BYTES={TIERS[target.tier].vector_bits // 8}"
        command = [*compiler, "-x", "c", "-O2", "-fPIC", "-shared", *flags, width, str(_SOURCE), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode != 0:
            reason = next(iter(result.stderr.strip().splitlines()), f"exit status {result.returncode}")
            raise HostError(compiler[0], f"cannot compile the roofline ({reason})", "set CC to a newer compiler")
        loaded = ctypes.CDLL(str(library))
    loaded.read_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    loaded.read_buffer.restype = None
    for name in ("multiply_bytes", "multiply_floats", "multiply_trits", *(("multiply_tiles",) if tiles else ())):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    return loaded
