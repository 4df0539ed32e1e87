"""Time several functions in turns, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True)
class Turn:
    """What each function does when it is its turn.

    Attributes
    ----------
    pause : float
        Seconds to wait first, for the worker threads of the one before to fall asleep.
    untimed : int
        Calls that bring back what the others have driven out of the caches, and wake its own workers.
    timed : int
        Calls that count.
    """

    pause: float = 0.0
    untimed: int = 1
    timed: int = 1


ALTERNATELY = Turn()
"""Call by call."""


def alternate(
    functions: Mapping[str, Sequence[Callable[[], Any]]], repeat: int, turn: Turn = ALTERNATELY
) -> dict[str, Spread]:
    """Time functions in turns.

    A function given as several copies goes on to the next copy with every call, which finds none of its data in a
    cache that the copies together exceed.

    Parameters
    ----------
    functions : mapping of str to sequence of callable
        The copies of each; one is enough to time it warm.
    repeat : int
        Timed calls of each function, at least; whole turns are made.
    turn : Turn

    Returns
    -------
    dict of str to Spread
    """
    for copies in functions.values():
        for call in copies:
            call()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    endless = {name: itertools.cycle(copies) for name, copies in functions.items()}
    for _ in range(-(-repeat // turn.timed)):
        for name, copies_of in endless.items():
            if turn.pause:
                time.sleep(turn.pause)
            for _ in range(turn.untimed):
                next(copies_of)()
            for _ in range(turn.timed):
                call = next(copies_of)
                start = time.perf_counter_ns()
                call()
                samples[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: Spread.of(values) for name, values in samples.items()}


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
