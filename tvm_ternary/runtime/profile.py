"""What one run of a model spends its time on: every call that the virtual machine makes, in order.

TVM's virtual machine tells an instrument of each call before and after it. The clock is read there, in Python, which
adds about half a microsecond to a call, more to one of many arguments, and more between calls. So the shortest call of
all is taken off each, and the time of a whole run is measured without the instrument.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BUILTIN = "vm.builtin."
"""How names of the machine's own functions begin: allocation, shapes, checks."""


@dataclass(frozen=True)
class Argument:
    """Element type and shape of a tensor that a call takes or writes."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes
    ----------
    function : str
        Its name in the library, or one that begins with `BUILTIN`.
    layer : str
        Whose weights it reads, as the manifest says; empty where it reads none that has a name.
    start : float
        Seconds after the run began, of the median run.
    seconds : float
        Median over the runs, less that of the shortest call, which is the clock's own.
    arguments : tuple of Argument
        Tensors; the last one is what it writes.
    """

    function: str
    layer: str
    start: float
    seconds: float
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Profile:
    """The calls of a run, and how long a run takes when nobody looks.

    Attributes
    ----------
    calls : tuple of Call
    seconds : float
        Median of the runs without instrument.
    runs : int
        How often each was measured.
    """

    calls: tuple[Call, ...]
    seconds: float
    runs: int


class Recorder:
    """The instrument: notes the tensors of the first run that it sees, and the times of the later ones."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self._begun: list[int] = []
        self._origin = 0
        self.names: list[str] = []
        self.arguments: list[tuple[Argument, ...]] = []
        self.times: list[list[tuple[int, int]]] = []

    def look(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        """Instrument of a run whose tensors are noted."""
        if before:
            self.names.append(str(name))
            tensors = (one for one in arguments if isinstance(one, self._tensor))
            self.arguments.append(tuple(Argument(str(one.dtype), tuple(map(int, one.shape))) for one in tensors))

    def begin(self) -> None:
        """A run begins whose calls are timed."""
        self.times.append([])
        self._origin = time.perf_counter_ns()

    def clock(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        """Instrument of a run that is timed."""
        now = time.perf_counter_ns()
        if before:
            # Read again, last of all.
            self._begun.append(time.perf_counter_ns())
        else:
            begun = self._begun.pop()
            self.times[-1].append((begun - self._origin, now - begun))


def take_profile(
    machine: Any, run: Callable[[], Any], tensor: Any, layers: dict[str, tuple[str, ...]], repeat: int
) -> Profile:
    """Measure ``repeat`` runs with the instrument, and as many without.

    Parameters
    ----------
    machine : module
        The virtual machine, with ``set_instrument``.
    run : callable
        Runs the model.
    tensor : type
        What tensor arguments are.
    layers : dict of str to tuple of str
        For each function the layer of its first call, of its second, and so on.
    repeat : int
    """
    recorder = Recorder(tensor)
    run()
    plain = sorted(_seconds(run) for _ in range(repeat))
    try:
        machine["set_instrument"](recorder.look)
        run()
        machine["set_instrument"](recorder.clock)
        for _ in range(repeat):
            recorder.begin()
            run()
    finally:
        machine["set_instrument"](None)
    typical = sorted(recorder.times, key=lambda calls: sum(seconds for _, seconds in calls))[repeat // 2]
    middle = [sorted(times[index][1] for times in recorder.times)[repeat // 2] for index in range(len(recorder.names))]
    clock = min(middle, default=0)
    counts: dict[str, int] = {}
    calls = []
    for index, name in enumerate(recorder.names):
        position = counts.get(name, 0)
        counts[name] = position + 1
        own = layers.get(name, ())
        seconds = (middle[index] - clock) / 1e9
        layer = own[position] if position < len(own) else ""
        calls.append(Call(name, layer, typical[index][0] / 1e9, seconds, recorder.arguments[index]))
    return Profile(tuple(calls), plain[repeat // 2], repeat)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
