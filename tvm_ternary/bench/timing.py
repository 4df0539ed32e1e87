"""Time several functions in turns, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Microseconds of one function's calls: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise at least one sample; each figure is one of the samples."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(*(ordered[round(last * part)] for part in (0.5, 0.2, 0.8)))

    @classmethod
    def of_turns(cls, turns: Sequence[Sequence[float]]) -> Spread:
        """Summarise the calls of all turns."""
        return cls.of([one for turn in turns for one in turn])


@dataclass(frozen=True)
class Pace:
    """How often a function is called when it is its turn, by how long a call takes.

    Attributes
    ----------
    warming, timing : float
        Seconds of calls that do not count, and of calls that do. The former bring back what the others have driven out
        of the caches, and wake the function's own workers.
    most_warming, most_timing : int
        Calls at most; a slow function is called once and once.
    """

    warming: float = 0.02
    timing: float = 0.01
    most_warming: int = 8
    most_timing: int = 5

    def calls(self, seconds: float) -> tuple[int, int]:
        """Calls that do not count, and that do, of a function whose call takes ``seconds``."""
        shares = ((self.warming, self.most_warming), (self.timing, self.most_timing))
        first, second = (min(most, math.ceil(share / max(seconds, 1e-9))) for share, most in shares)
        return first, second


PACE = Pace()
"""After an engine that has read far more than the caches hold, M = 1 takes eight calls to be warm again."""
WAKING = Pace(warming=0.15, most_warming=10_000)
"""For several threads, after a rest. The CPUs of a rented machine are threads of its host, which may put one that wakes
up beside another on the same core, and take 0.1 s to move it: two are then as fast as one."""


def pace_of(threads: int) -> Pace:
    """Which of the two is for engines of so many threads."""
    return WAKING if threads > 1 else PACE


def alternate(
    functions: Mapping[_Name, Sequence[Callable[[], Any]]],
    turns: int,
    pace: Pace = PACE,
    rests: Mapping[_Name, float] | None = None,
) -> dict[_Name, Spread]:
    """Time functions in turns.

    A function given as several copies goes on to the next copy with every call, which finds none of its data in a
    cache that the copies together exceed.

    Parameters
    ----------
    functions : mapping of str to sequence of callable
        The copies of each; one is enough to time it warm.
    turns : int
        Of each function.
    pace : Pace
    rests : mapping of str to float, optional
        Seconds to wait after a function's turn, for its worker threads to fall asleep.

    Returns
    -------
    dict of str to Spread
    """
    return {name: Spread.of_turns(own) for name, own in time_turns(functions, turns, pace, rests).items()}


def time_turns(
    functions: Mapping[_Name, Sequence[Callable[[], Any]]],
    turns: int,
    pace: Pace = PACE,
    rests: Mapping[_Name, float] | None = None,
) -> dict[_Name, list[list[float]]]:
    """As `alternate`, but give the microseconds of every call, a list for each turn."""
    endless = {name: itertools.cycle(copies) for name, copies in functions.items()}
    calls = {name: pace.calls(_estimate(copies, endless[name])) for name, copies in functions.items()}
    samples: dict[_Name, list[list[float]]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, copies_of in endless.items():
            warming, timed = calls[name]
            for _ in range(warming):
                next(copies_of)()
            samples[name].append([])
            for _ in range(timed):
                call = next(copies_of)
                start = time.perf_counter_ns()
                call()
                samples[name][-1].append((time.perf_counter_ns() - start) / 1e3)
            if rests is not None and name in rests:
                time.sleep(rests[name])
    return samples


def turn_ratio(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> float:
    """Median over the turns of a peer's median over ours in the same turn: above 1 we are faster."""
    return statistics.median(statistics.median(t) / statistics.median(o) for t, o in zip(theirs, ours, strict=True))


def _estimate(copies: Sequence[Callable[[], Any]], endless: Iterator[Callable[[], Any]]) -> float:
    """Seconds of a call, the faster of two, after each copy has been called once."""
    for _ in copies:
        next(endless)()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        next(endless)()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def geometric_mean(values: Iterable[float]) -> float:
    """The n-th root of the product of n positive numbers.

    Raises
    ------
    ValueError
        If there are none, or one is not positive.
    """
    numbers = list(values)
    if not numbers or min(numbers) <= 0:
        raise ValueError(f"geometric mean of {numbers}; expected at least one number, all positive")
    return math.exp(math.fsum(map(math.log, numbers)) / len(numbers))
