"""Tune tasks: try candidates in turns over the tasks, then measure the best of each beside the default schedule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tvm
from tvm.s_tir import Schedule

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.schedule.records import About, Record, workload_hash
from tvm_ternary.target import Target
from tvm_ternary.tuning.log import LogWriter, open_log
from tvm_ternary.tuning.measure import Measurer, open_measurer
from tvm_ternary.tuning.report import TaskResult, TuningReport, make_report, task_result
from tvm_ternary.tuning.rpc import Tracker
from tvm_ternary.tuning.search import COST_MODELS, Search, make_search
from tvm_ternary.tuning.task import Decisions, Realize, Task, decided_schedule, space_size, trace_json
from tvm_ternary.tuning.workers import Failure, Library

Progress = Callable[[TaskResult, int], None]
"""Called with a task's result so far and the number of trials that it will have."""

_BATCH = 16
# Single measurements are noisy, so the fastest of them is not always the best.
_FINALISTS = 3
# TVM takes seeds from 1 to 2^31 - 1.
_MAX_SEED = 2**31 - 2


@dataclass(frozen=True)
class Options:
    """How to tune.

    Attributes
    ----------
    trials : int
        Candidates of each task, those of earlier calls included.
    time_limit : float or None
        Seconds after which no further candidate is tried.
    cost_model : str
        ``xgb`` or ``random``: what ranks the candidates of a space too large to try them all.
    threads : int
        That each candidate runs on.
    seed : int
        What is drawn at random depends on it alone.
    tracker : Tracker or None
        Whose servers measure; None: this host.
    """

    trials: int = 64
    time_limit: float | None = None
    cost_model: str = "xgb"
    threads: int = 1
    seed: int = 0
    tracker: Tracker | None = None

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise OptionError("--trials", f"is {self.trials}; expected at least 1")
        if self.time_limit is not None and not self.time_limit > 0:
            raise OptionError("--time-limit", f"is {self.time_limit:g} s; expected more than 0")
        if self.cost_model not in COST_MODELS:
            raise OptionError("--cost-model", f"is {self.cost_model!r}; expected {' or '.join(COST_MODELS)}")
        if not 0 <= self.seed <= _MAX_SEED:
            raise OptionError("--seed", f"is {self.seed}; expected 0 to {_MAX_SEED}")


def tune(
    tasks: Sequence[Task],
    work_dir: str | Path,
    target: Target,
    realize: Realize,
    options: Options,
    *,
    progress: Progress = lambda result, trials: None,
    notice: Callable[[str], None] = lambda text: None,
) -> TuningReport:
    """Tune, going on with what ``work_dir`` holds.

    Parameters
    ----------
    tasks : sequence of Task
        Those with equal workloads are tuned once.
    work_dir : path
        The log to write; see `tvm_ternary.schedule.records`. Made if it does not exist.
    target : Target
    realize : callable
        As `tvm_ternary.schedule.tasks.realize`.
    options : Options
    progress : callable
    notice : callable
        Told, in a sentence each, of lines of the log that are no records.

    Raises
    ------
    OptionError
        If there is nothing to tune, or the log is of another target, number of threads or TVM.
    HostError
        If this host lacks a package or a linker, or cannot run the target's code; or if no RPC server can be used, or
        none any more. What was measured is kept.
    OutputError
        If the log cannot be written.
    """
    if not tasks:
        raise OptionError("tune", "got nothing to tune; expected at least one ternary matrix")
    require_packages(options)
    with (
        open_measurer(target, realize, options.threads, options.tracker, Path(work_dir)) as measurer,
        open_log(work_dir, About(target.name, options.threads), notice) as log,
    ):
        return _Tuning(tasks, target, options, log, measurer, progress, notice).run()


def require_packages(options: Options) -> None:
    """Find what TVM would miss only later, in the middle of its search."""
    needed = ["cloudpickle", "psutil", *(["xgboost"] if options.cost_model == "xgb" else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise HostError("tune", f"lacks the packages {', '.join(missing)}", "install tvm-ternary[tune]")


class Job:
    """A task while it is tuned."""

    def __init__(self, task: Task, module: tvm.IRModule, search: Search) -> None:
        self.task, self.module, self.search = task, module, search
        self.key = workload_hash(module)
        self.size = space_size(task)
        self.records: list[Record] = []
        self.costs: dict[Decisions, float | None] = {}
        self.chosen: Decisions | None = None
        self.exhausted = False

    def note(self, record: Record) -> None:
        """Remember a record, unless it is of a space that has changed since."""
        space, decisions = self.task.space, record.decisions
        if set(decisions) != set(space) or any(decisions[name] not in space[name] for name in space):
            return
        self.records.append(record)
        point = tuple(decisions[name] for name in space)
        if record.default_seconds:
            self.chosen = point
        else:
            self.costs[point] = record.median if record.error is None else None

    def default(self) -> Decisions:
        """The decisions taken without tuning."""
        return tuple(self.task.default[name] for name in self.task.space)

    def decided(self, point: Decisions) -> Schedule:
        """The workload with these decisions."""
        return decided_schedule(self.module, self.task.space, point)

    def trace(self, point: Decisions) -> Any:
        """How a record tells of these decisions."""
        return trace_json(self.decided(point).trace)

    def finalists(self) -> list[Decisions]:
        """The default, the winner of the last comparison, and the fastest."""
        measured = {point: cost for point, cost in self.costs.items() if cost is not None}
        fastest = sorted(measured, key=measured.__getitem__)[:_FINALISTS]
        return list(dict.fromkeys([self.default(), *([self.chosen] if self.chosen else []), *fastest]))


class _Tuning:
    """One call of `tune`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        target: Target,
        options: Options,
        log: LogWriter,
        measurer: Measurer,
        progress: Progress,
        notice: Callable[[str], None],
    ) -> None:
        self.options, self.log, self.measurer = options, log, measurer
        self.progress, self.notice = progress, notice
        self.deadline = None if options.time_limit is None else time.monotonic() + options.time_limit
        self.started = len(log.records)
        self.jobs = open_jobs(tasks, tvm.target.Target(target.tvm), options, log.records)

    def run(self) -> TuningReport:
        """A batch of each task in turns, so that a time limit does not leave the last ones out."""
        for job in self.jobs:
            self._show(job)
        going = list(self.jobs)
        while going and not self._late():
            for job in going:
                if not self._late():
                    self._batch(job)
            going = [job for job in going if not job.exhausted and len(job.costs) < self.options.trials]
        for job in self.jobs:
            self._choose(job)
            self._show(job)
        summary = {job.task.name: job.records for job in self.jobs}
        return make_report(str(self.log.folder), summary, len(self.log.records) - self.started)

    def _batch(self, job: Job) -> None:
        """Try the next candidates of a task."""
        count = min(_BATCH, self.options.trials - len(job.costs))
        points = job.search.propose(count) if count > 0 else []
        job.exhausted = not points
        libraries: dict[Decisions, Library] = {}
        for point, library in zip(points, self._build(job, points), strict=True):
            if isinstance(library, Failure):
                self._record(job, point, library)
            else:
                libraries[point] = library
        built = list(libraries)
        with closing(self.measurer.time(list(libraries.values()))) as results:
            for index, result in results:
                self._record(job, built[index], result)
                if self._late():
                    break
        job.search.tell({point: job.costs[point] for point in points if point in job.costs})

    def _build(self, job: Job, points: Sequence[Decisions]) -> list[Library | Failure]:
        return self.measurer.build([job.decided(point).mod for point in points])

    def _record(self, job: Job, point: Decisions, result: list[float] | Failure) -> None:
        seconds, error = ((), result.reason) if isinstance(result, Failure) else (tuple(result), None)
        record = Record(job.key, job.task.name, job.trace(point), seconds, error=error)
        self._keep(job, record)
        self._show(job)

    def _keep(self, job: Job, record: Record) -> None:
        self.log.append(record)
        job.note(record)

    def _choose(self, job: Job) -> None:
        """Measure the fastest candidates and the default once more, in turns, and write down which is best."""
        if not self._is_open(job):
            return
        points = job.finalists()
        built = dict(zip(points, self._build(job, points), strict=True))
        libraries = {point: library for point, library in built.items() if isinstance(library, Library)}
        times = self.measurer.compare(list(libraries.values())) if job.default() in libraries else built[job.default()]
        if not isinstance(times, list):
            assert isinstance(times, Failure)
            self.notice(f"{job.task.name}: not compared with its default schedule ({times.reason})")
            return
        seconds = dict(zip(libraries, times, strict=True))
        # In the order of the points: of equal ones, the default.
        best = min(seconds, key=lambda point: statistics.median(seconds[point]))
        default = tuple(seconds[job.default()])
        self._keep(job, Record(job.key, job.task.name, job.trace(best), tuple(seconds[best]), default))

    def _is_open(self, job: Job) -> bool:
        """Whether anything was measured since the last choice, and the default runs."""
        measured = bool(job.records) and not job.records[-1].default_seconds
        return measured and job.costs.get(job.default()) is not None

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _show(self, job: Job) -> None:
        goal = min(self.options.trials, job.size)
        self.progress(task_result(job.task.name, job.records), goal)


def open_jobs(
    tasks: Sequence[Task], target: tvm.target.Target, options: Options, records: Sequence[Record]
) -> list[Job]:
    """Give each workload once, with what is known of it."""
    jobs: dict[str, Job] = {}
    for task in tasks:
        module = task.workload()
        search = make_search(task, module, target, options.trials, options.cost_model, options.seed)
        job = Job(task, module, search)
        jobs.setdefault(job.key, job)
    for record in records:
        if record.workload in jobs:
            jobs[record.workload].note(record)
    for job in jobs.values():
        job.search.tell(job.costs)
    return list(jobs.values())
