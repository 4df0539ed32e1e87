"""Time the stages of an evaluation and tell who watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how many of its steps are done, and of how many."""


class Stages:
    """Seconds of each stage, in order."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Yield a function that counts a step; a stage of one step counts it by itself. Of no steps nothing is told."""
        done = 0
        started = time.perf_counter()

        def step() -> None:
            nonlocal done
            done += 1
            self._tell(name, done, steps)

        self._tell(name, 0, steps)
        yield step
        if steps:
            self.seconds[name] = time.perf_counter() - started
        if done < steps:
            self._tell(name, steps, steps)

    def _tell(self, name: str, done: int, steps: int) -> None:
        if self._progress is not None and steps:
            self._progress(name, done, steps)
