"""What tuning came to: a row a task, as a table or as JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm_ternary.analysis.report import Table
from tvm_ternary.schedule.records import Record, results

_COLUMNS = ("task", "before us", "after us", "gain", "trials", "failed", "decisions")
_EXACT_BELOW = 10.0


@dataclass(frozen=True)
class TaskResult:
    """What is known of a task.

    Attributes
    ----------
    name : str
    before : float or None
        Median seconds of the default schedule; None if it was not measured or failed.
    after : float or None
        Median seconds of the best candidate.
    decisions : dict of str to int
        Those of the best candidate.
    trials, failures : int
        Candidates tried, and those of them that could not be built or run.
    """

    name: str
    before: float | None
    after: float | None
    decisions: dict[str, int]
    trials: int
    failures: int

    @property
    def gain(self) -> float | None:
        """How many times faster than the default schedule, measured in turns."""
        return self.before / self.after if self.before and self.after else None

    def as_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {**self.__dict__, "gain": self.gain}


@dataclass(frozen=True)
class TuningReport:
    """What a call came to.

    Attributes
    ----------
    work_dir : str
    tasks : tuple of TaskResult
    measured : int
        Records that this call added.
    errors : tuple of (str, int)
        Why candidates failed and how many did so, the most frequent first.
    """

    work_dir: str
    tasks: tuple[TaskResult, ...]
    measured: int
    errors: tuple[tuple[str, int], ...] = ()

    @property
    def complaint(self) -> str | None:
        """What is wrong with the run as a whole: most candidates failed, or all of one task."""
        trials, failures = (sum(getattr(task, name) for task in self.tasks) for name in ("trials", "failures"))
        cause = f"; most often: {self.errors[0][0]}" if self.errors else ""
        if failures > trials / 2:
            return f"{failures} of {trials} candidates failed{cause}"
        bare = [task.name for task in self.tasks if task.trials and task.after is None]
        return f"all candidates of {', '.join(bare)} failed{cause}" if bare else None

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON document."""
        return {
            "work_dir": self.work_dir,
            "measured": self.measured,
            "tasks": [task.as_json() for task in self.tasks],
            "errors": [{"reason": reason, "candidates": count} for reason, count in self.errors],
        }


def make_report(work_dir: str, tasks: Mapping[str, Sequence[Record]], measured: int) -> TuningReport:
    """Summarise the records of some tasks, given by name."""
    errors = Counter(record.error for records in tasks.values() for record in records if record.error is not None)
    summary = tuple(task_result(name, records) for name, records in tasks.items())
    return TuningReport(work_dir, summary, measured, tuple(errors.most_common()))


def task_result(name: str, records: Sequence[Record]) -> TaskResult:
    """Summarise the records of one task."""
    tried = [record for record in records if not record.default_seconds]
    best = next(iter(results(records).values()), None)
    return TaskResult(
        name=name,
        before=statistics.median(best.default_seconds) if best is not None and best.default_seconds else None,
        after=best.median if best is not None else None,
        decisions=best.decisions if best is not None else {},
        trials=len(tried),
        failures=sum(record.error is not None for record in tried),
    )


def results_table(report: TuningReport) -> Table:
    """A row a task: microseconds before and after, measured in turns, how much faster, and by which decisions."""
    rows = [
        (
            task.name,
            microseconds(task.before),
            microseconds(task.after),
            "" if task.gain is None else f"{task.gain:.2f}x",
            str(task.trials),
            str(task.failures),
            " ".join(f"{name}={value}" for name, value in task.decisions.items()),
        )
        for task in report.tasks
    ]
    return Table(_COLUMNS, tuple(rows), frozenset(range(1, len(_COLUMNS) - 1)))


def errors_table(report: TuningReport) -> Table:
    """A row for each reason why candidates failed."""
    return Table(("candidates", "failed because"), tuple((str(n), text) for text, n in report.errors), frozenset({0}))


def microseconds(seconds: float | None) -> str:
    """Show a time; nothing for None."""
    if seconds is None:
        return ""
    value = seconds * 1e6
    return f"{value:.2f}" if value < _EXACT_BELOW else f"{value:.1f}"
