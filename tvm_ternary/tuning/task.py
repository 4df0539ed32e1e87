"""What can be tuned: a workload, the decisions that its schedule leaves open, and the ones taken by default."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, runtime_checkable

import tvm
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Trace

from tvm_ternary.schedule.records import ANNOTATION

Realize = Callable[[tvm.IRModule], tvm.IRModule]
"""Make the scheduled module of a workload whose root block carries decisions; raises where they do not fit it.

It runs in worker processes, so it must be a function of a module that those can import.
"""

Decisions = tuple[int, ...]
"""The value of each decision of a task's space, in the space's order."""


class Task(Protocol):
    """One workload to tune; `tvm_ternary.schedule.tasks.MatmulTask` is one."""

    @property
    def name(self) -> str:
        """Unique among the tasks of a run, for people."""

    @property
    def workload(self) -> Callable[[], tvm.IRModule]:
        """Make the unscheduled module: one function ``main`` with one root block, structurally equal each time."""

    @property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """Candidates of each decision."""

    @property
    def default(self) -> Mapping[str, int]:
        """The hand-chosen decisions, each one of the candidates."""


@runtime_checkable
class Limited(Protocol):
    """What a task is as well if its space holds decisions that cannot go together.

    `tvm_ternary.schedule.cuda.tasks.CudaTask` is one: tiles and stages that are each fine alone ask for more shared
    memory than there is. Such candidates are no part of the space and no failures.
    """

    def fits(self, decisions: Mapping[str, int]) -> bool:
        """Whether a candidate of these decisions can be; those of the default can."""


@dataclass(frozen=True)
class Pinned:
    """A task some of whose decisions are not open: they stay as they are by default.

    Attributes
    ----------
    task : Task
    decisions : tuple of str
        Those that stay.
    """

    task: Task
    decisions: tuple[str, ...]

    @property
    def name(self) -> str:
        """The task's."""
        return self.task.name

    @property
    def workload(self) -> Callable[[], tvm.IRModule]:
        """The task's."""
        return self.task.workload

    @property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """The task's, with one candidate for each decision that stays."""
        kept = {name: (self.default[name],) for name in self.decisions if name in self.default}
        return {**self.task.space, **kept}

    @property
    def default(self) -> Mapping[str, int]:
        """The task's."""
        return self.task.default


def space_points(task: Task) -> Iterator[Decisions]:
    """Give every set of decisions that can go together."""
    points = product(*task.space.values())
    return (point for point in points if fits(task, point)) if isinstance(task, Limited) else points


def space_size(task: Task) -> int:
    """How many sets of decisions there are."""
    if isinstance(task, Limited):
        return sum(1 for _ in space_points(task))
    return math.prod(len(candidates) for candidates in task.space.values())


def fits(task: Task, point: Decisions) -> bool:
    """Whether decisions can go together."""
    return not isinstance(task, Limited) or task.fits(dict(zip(task.space, point, strict=True)))


def schedule_function(space: Mapping[str, tuple[int, ...]]) -> Callable[[Schedule], None]:
    """Give MetaSchedule's schedule function of a space: it samples every decision and annotates the root block."""

    def sample(schedule: Schedule) -> None:
        _annotate(schedule, space, lambda name: None)

    return sample


def decided_schedule(module: tvm.IRModule, space: Mapping[str, tuple[int, ...]], decisions: Decisions) -> Schedule:
    """Apply given decisions to a workload; the trace is the one that sampling them would have left.

    Parameters
    ----------
    module : tvm.IRModule
    space : mapping of str to tuple of int
    decisions : tuple of int
        Each one of its candidates.
    """
    schedule = Schedule(module)
    chosen = dict(zip(space, decisions, strict=True))
    _annotate(schedule, space, lambda name: space[name].index(chosen[name]))
    return schedule


def _annotate(schedule: Schedule, space: Mapping[str, tuple[int, ...]], decide: Callable[[str], int | None]) -> None:
    # Its name is up to the workload: a body that is one block is its own root.
    root = schedule.get_sblock(schedule.mod["main"].body.block.name_hint)
    for name, candidates in space.items():
        even = [1 / len(candidates)] * len(candidates)
        value = schedule.sample_categorical(list(candidates), even, decision=decide(name))
        schedule.annotate(root, ANNOTATION + name, value)


def trace_json(trace: Trace) -> Any:
    """Give a trace as plain JSON: TVM's own conversion leaves its number objects in."""
    return _plain(trace.as_json())


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if hasattr(value, "value") else value
