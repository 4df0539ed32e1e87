"""The matmul benchmark: ours and the peers in one run, in turns, beside what the machine can do at most."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tvm_ffi

from tvm_ternary.bench.engines import Engine, Floats, check_answer, exact_rows, ours
from tvm_ternary.bench.machine import last_level_cache
from tvm_ternary.bench.measurement import Measurement
from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.peers import PEERS
from tvm_ternary.bench.peers.base import Problem
from tvm_ternary.bench.roofline import Roofline
from tvm_ternary.bench.timing import Spread, alternate, pace_of
from tvm_ternary.errors import OptionError
from tvm_ternary.formats.scheme import parse_packed
from tvm_ternary.runtime.threads import ComputeThread, thread_count
from tvm_ternary.target import Target, resolve

TURNS = 9
"""A median of fewer is moved by one disturbance."""
COLD_ROWS = 8
"""Beyond this M computing takes longer than reading the weight from memory."""

# In last-level caches: the copies of a weight. Where a cache does not evict its oldest line, half of a buffer of twice
# its size is still found there.
_COPIES = 4
_PAUSE = 0.15


def cache_states(m: int, cold: bool) -> tuple[str, ...]:
    """In which states of the cache ``m`` rows are measured."""
    return ("warm", "cold") if cold and m <= COLD_ROWS else ("warm",)


def measure_matmuls(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    schemes: Sequence[str],
    *,
    peers: Sequence[str] = (),
    threads: int = 1,
    cold: bool = False,
    turns: int = TURNS,
    target: str | Target = "native",
    roofline: Roofline | None = None,
) -> Iterator[Measurement]:
    """Measure every scheme on every shape and number of rows.

    Parameters
    ----------
    shapes : sequence of (N, K)
    rows : sequence of int
        The M's.
    schemes : sequence of str
        Such as ``t1a8g128``, or ``t1a8/dense`` for another packing.
    peers : sequence of str
        Keys of `tvm_ternary.bench.peers.PEERS`, as `choose_peers` gives them.
    threads : int
        Of every engine.
    cold : bool
        Measure M up to 8 a second time, with weights rotated over copies that exceed four times the last-level cache.
    turns : int
        Of each engine; in a turn it is called once or several times, by how long a call takes.
    target : str or Target
        For our kernels and the peak they are held against; it must be one that this host can run.
    roofline : Roofline, optional
        The limits of that target and that many threads, where they were measured already.

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
    sizes = {"shapes": [size for shape in shapes for size in shape], "rows": list(rows), "turns": [turns]}
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise OptionError(name, f"is {values}; expected whole numbers from 1")
    if cold and min(rows) > COLD_ROWS:
        raise OptionError("cold", f"is for M up to {COLD_ROWS}; rows are {list(rows)}", "leave it out")
    parsed, resolved = list(dict.fromkeys(map(parse_packed, schemes))), resolve(target)
    compute = ComputeThread(tvm_ffi, thread_count(threads))
    limits = roofline or Roofline(resolved, threads)
    cache = _COPIES * last_level_cache() if cold else 0
    compared = [name for name in peers if any(s.activation_bits in PEERS[name].activation_bits for s, _ in parsed)]
    for n, k in shapes:
        refusals = {name: reason for name in compared if (reason := PEERS[name].refuses(n, k)) is not None}
        own = {key: ours(n, k, key[0], resolved, cache, key[1]) for key in parsed}
        problem = Problem.random(n, k, threads, cache)
        others = [compute.call(PEERS[name].make, name, problem) for name in compared if name not in refusals]
        for m in rows:
            x = aligned_copy(np.random.default_rng(m).standard_normal((m, k), dtype=np.float32))
            measured = _Turns([*own.values(), *others], x, compute)
            for state in cache_states(m, cold):
                times = measured.time(state, turns)
                for (scheme, _), engine in own.items():
                    bits, moved = scheme.activation_bits, x.nbytes + 4 * m * n
                    beside = [other for other in others if bits in PEERS[other.name].activation_bits]
                    yield Measurement(
                        n=n,
                        k=k,
                        m=m,
                        scheme=engine.name,
                        cache=state,
                        threads=threads,
                        target=resolved.name,
                        time=times[engine.name],
                        error=measured.errors[engine.name],
                        bytes=engine.weight_bytes + moved,
                        bandwidth=limits.bandwidth(engine.weight_bytes) if state == "warm" else limits.memory,
                        peak=limits.peak(bits),
                        peers={other.name: times[other.name] for other in beside},
                        peer_bytes={other.name: other.weight_bytes + moved for other in beside},
                        left_out={name: why for name, why in refusals.items() if bits in PEERS[name].activation_bits},
                    )


class _Turns:
    """Engines on one x, whose answers have been checked."""

    def __init__(self, engines: Sequence[Engine], x: Floats, compute: ComputeThread) -> None:
        self._compute = compute
        self._rests = rests(engines) if compute.count > 1 else None
        self._calls = {engine.name: compute.call(engine.calls, x) for engine in engines}
        self.errors: dict[str, float] = {}
        # Most peers share a weight.
        exact: dict[int, Any] = {}
        for engine in engines:
            if id(engine.dense) not in exact:
                exact[id(engine.dense)] = exact_rows(engine.dense, x)
            y = compute.call(self._calls[engine.name][0])
            self.errors[engine.name] = check_answer(engine, x, y, exact[id(engine.dense)])
        # numpy's workers, which checked, spin for 100 ms.
        time.sleep(_PAUSE)

    def time(self, state: str, turns: int) -> dict[str, Spread]:
        """Time them all, on the thread whose pool has the right size."""
        functions = {name: calls if state == "cold" else calls[:1] for name, calls in self._calls.items()}
        return self._compute.call(alternate, functions, turns, pace_of(self._compute.count), self._rests)


def rests(engines: Sequence[Engine]) -> dict[str, float]:
    """Seconds to wait after each engine's turn: until its workers sleep, where the next one's are others."""
    following = [*engines[1:], *engines[:1]]
    return {
        one.name: one.workers.spin
        for one, after in zip(engines, following, strict=True)
        if one.workers.library != after.workers.library
    }
