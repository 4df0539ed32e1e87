"""The matmul benchmark: ours and the peers in one run, in turns, beside what the machine can do at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi

from tvm_ternary.bench.engines import Engine, Floats, check_answer, ours
from tvm_ternary.bench.machine import last_level_cache
from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.peers import PEERS, Problem
from tvm_ternary.bench.roofline import Roofline
from tvm_ternary.bench.timing import Spread, Turn, alternate, geometric_mean
from tvm_ternary.errors import OptionError
from tvm_ternary.formats.scheme import Scheme
from tvm_ternary.runtime.threads import ComputeThread, thread_count
from tvm_ternary.target import Target, resolve

# Who comes after an engine that has read far more than the caches hold takes several calls to be warm again: after one
# call, M = 1 still takes twice as long.
_UNTIMED, _TIMED = 8, 5
# With several threads: onnxruntime's workers spin for some 70 ms after a run, on cores that the next engine's need.
_PAUSE = 0.1
# In last-level caches: the copies of a weight. Where a cache does not evict its oldest line, half of a buffer of twice
# its size is still found there.
_COPIES = 4
# And the buffer that tells how fast memory is, which nobody else reads in between.
_MEMORY = 8


@dataclass(frozen=True)
class Measurement:
    """One of our schemes on one shape, M and state of the cache, beside the peers of the same turns.

    Attributes
    ----------
    n, k, m : int
    scheme : str
    cache : str
        ``warm``, or ``cold``: the weight comes from memory.
    time : Spread
        Microseconds from float32 to float32.
    error : float
        Relative, of the checked rows.
    bytes : int
        Weight, scales, activations and results.
    bandwidth : float
        Bytes a second that the machine reads with: warm a buffer of the weight's size, cold one far beyond the caches.
    peak : float or None
        Operations a second at most; None where the kernel's arithmetic has no measured peak (``a1``).
    peers : dict of str to Spread
    """

    n: int
    k: int
    m: int
    scheme: str
    cache: str
    time: Spread
    error: float
    bytes: int
    bandwidth: float
    peak: float | None
    peers: dict[str, Spread]

    @property
    def operations(self) -> int:
        """2 M N K, however many planes the weight has."""
        return 2 * self.m * self.n * self.k

    @property
    def floor(self) -> float:
        """Microseconds that reading or computing takes at least."""
        computing = self.operations / self.peak if self.peak is not None else 0.0
        return max(self.bytes / self.bandwidth, computing) * 1e6

    @property
    def best_peer(self) -> str | None:
        """The peer with the lowest median."""
        return min(self.peers, key=lambda name: self.peers[name].median, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the best peer, by medians."""
        return None if self.best_peer is None else self.peers[self.best_peer].median / self.time.median

    def as_json(self) -> dict[str, Any]:
        """Numbers by name; times in microseconds, rates a second."""
        return {
            **{key: getattr(self, key) for key in ("n", "k", "m", "scheme", "cache", "error", "bytes", "best_peer")},
            "us": vars(self.time),
            "peers_us": {name: vars(spread) for name, spread in self.peers.items()},
            "floor_us": self.floor,
            "floor_percent": 100 * self.floor / self.time.median,
            "gbs": self.bytes / self.time.median / 1e3,
            "gops": self.operations / self.time.median / 1e3,
            "bandwidth_gbs": self.bandwidth / 1e9,
            "peak_gops": None if self.peak is None else self.peak / 1e9,
            "ratio": self.ratio,
        }


def measure_matmuls(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    schemes: Sequence[str],
    *,
    peers: Sequence[str] = (),
    threads: int = 1,
    cold: bool = False,
    repeat: int = 30,
    target: str | Target = "native",
) -> Iterator[Measurement]:
    """Measure every scheme on every shape and number of rows.

    Parameters
    ----------
    shapes : sequence of (N, K)
    rows : sequence of int
        The M's.
    schemes : sequence of str
        Such as ``t1a8g128``.
    peers : sequence of str
        Keys of `tvm_ternary.bench.peers.PEERS`, as `choose_peers` gives them.
    threads : int
        Of every engine.
    cold : bool
        Measure a second time with weights rotated over copies that exceed four times the last-level cache.
    repeat : int
        Timed calls of each engine, at least.
    target : str or Target
        For our kernels and the peak they are held against; it must be one that this host can run.

    Yields
    ------
    Measurement
        As soon as it is there.

    Raises
    ------
    OptionError
        If an option has no meaning.
    WrongAnswerError
        If what is to be timed computes something else.
    HostError
        If this host cannot run the target's code, has no C compiler, or does not tell the size of its caches.
    """
    sizes = {"shapes": [size for shape in shapes for size in shape], "rows": list(rows), "repeat": [repeat]}
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise OptionError(name, f"is {values}; expected whole numbers from 1")
    parsed, resolved = [Scheme.parse(scheme) for scheme in dict.fromkeys(schemes)], resolve(target)
    compute = ComputeThread(tvm_ffi, thread_count(threads))
    cache = _COPIES * last_level_cache() if cold else 0
    memory = _MEMORY * cache // _COPIES
    roofline: Roofline | None = None
    for n, k in shapes:
        own = {scheme: ours(n, k, scheme, resolved, cache) for scheme in parsed}
        # After the first of ours, which finds out whether this host can run the target's code at all.
        roofline = roofline or Roofline(resolved, threads)
        problem = _problem(n, k, threads, cache)
        others = [PEERS[name].make(name, problem) for name in peers]
        for m in rows:
            x = aligned_copy(np.random.default_rng(m).standard_normal((m, k), dtype=np.float32))
            turns = _Turns([*own.values(), *others], x, compute)
            for state in ("warm", "cold") if cold else ("warm",):
                times = turns.time(state, repeat)
                for scheme, engine in own.items():
                    yield Measurement(
                        n=n,
                        k=k,
                        m=m,
                        scheme=engine.name,
                        cache=state,
                        time=times[engine.name],
                        error=turns.errors[engine.name],
                        bytes=engine.weight_bytes + x.nbytes + 4 * m * n,
                        bandwidth=roofline.bandwidth(engine.weight_bytes if state == "warm" else memory),
                        peak=_PEAKS[scheme.activation_bits](roofline),
                        peers={name: times[name] for name in peers},
                    )


class _Turns:
    """Engines on one x, whose answers have been checked."""

    def __init__(self, engines: Sequence[Engine], x: Floats, compute: ComputeThread) -> None:
        self._compute = compute
        self._calls = {engine.name: engine.calls(x) for engine in engines}
        self.errors = {
            engine.name: check_answer(engine, x, compute.call(self._calls[engine.name][0])) for engine in engines
        }

    def time(self, state: str, repeat: int) -> dict[str, Spread]:
        """Time them all, on the thread whose pool has the right size."""
        functions = {name: calls if state == "cold" else calls[:1] for name, calls in self._calls.items()}
        turn = Turn(_PAUSE if self._compute.count > 1 else 0.0, _UNTIMED, _TIMED)
        return self._compute.call(alternate, functions, repeat, turn)


def _problem(n: int, k: int, threads: int, cache: int) -> Problem:
    rng = np.random.default_rng(1)
    trits = rng.integers(-1, 2, (n, k), dtype=np.int8)
    return Problem(trits, rng.uniform(0.5, 1.5, n).astype(np.float32), threads, cache)


_PEAKS: Mapping[int, Callable[[Roofline], float | None]] = {
    32: lambda roofline: roofline.float32_peak,
    8: lambda roofline: roofline.int8_peak,
    1: lambda roofline: None,
}


def mean_ratios(measurements: Sequence[Measurement]) -> dict[tuple[str, str, int], float]:
    """(scheme, cache, M) -> geometric mean, over the shapes, of the ratio to the best peer of each row."""
    ratios: dict[tuple[str, str, int], list[float]] = {}
    for one in measurements:
        if one.ratio is not None:
            ratios.setdefault((one.scheme, one.cache, one.m), []).append(one.ratio)
    return {key: geometric_mean(values) for key, values in ratios.items()}
