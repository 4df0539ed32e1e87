"""Whole tuning runs on a small task, and what survives them."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tvm

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.schedule.records import RECORDS, Record, read_log, workload_hash
from tvm_ternary.target import resolve
from tvm_ternary.tuning import measure, tuner
from tvm_ternary.tuning.report import TaskResult, TuningReport, errors_table, results_table
from tvm_ternary.tuning.task import decided_schedule, trace_json
from tvm_ternary.tuning.tuner import Options, tune
from tvm_ternary.tuning.workers import Effort, Failure, Library

from .logs import trial
from .toy import BROKEN, DEADLY, Toy, realize

TARGET = resolve("native")
REASON = f"ValueError: a tile of {BROKEN} rows does not fit"
WILD = Toy(64, space={"rows": (1, BROKEN, DEADLY), "columns": (8,)})


class Simulator:
    """Measures in no time: what a candidate takes follows from its decisions."""

    def build(self, modules: Sequence[tvm.IRModule]) -> list[Library | Failure]:
        return [self._build(module) for module in modules]

    def _build(self, module: tvm.IRModule) -> Library | Failure:
        annotations = module["main"].body.block.annotations
        rows, columns = (int(annotations[f"ternary.{name}"]) for name in ("rows", "columns"))
        if rows == BROKEN:
            return Failure(REASON)
        return Library(f"{rows} {columns}", ())

    def time(self, libraries: Sequence[Library]) -> Generator[tuple[int, list[float] | Failure], None, None]:
        for index, library in enumerate(libraries):
            yield index, [self._seconds(library)] * 3

    def compare(self, libraries: Sequence[Library]) -> list[list[float]] | Failure:
        return [[self._seconds(library)] * 5 for library in libraries]

    def _seconds(self, library: Library) -> float:
        rows, columns = map(int, library.path.split())
        return 1e-6 / rows + 1e-6 / columns


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Simulator:
    """Measure by it."""
    made = Simulator()
    monkeypatch.setattr(tuner, "open_measurer", lambda *arguments: nullcontext(made))
    return made


def run(work_dir: Path, *tasks: Toy, **options: Any) -> tuple[TuningReport, list[TaskResult], list[str]]:
    """Tune; the report, the progress, and what was noticed."""
    shown: list[TaskResult] = []
    notes: list[str] = []
    report = tune(
        tasks,
        work_dir,
        TARGET,
        realize,
        Options(**{"cost_model": "random", **options}),
        progress=lambda result, trials: shown.append(result),
        notice=notes.append,
    )
    return report, shown, notes


def points(work_dir: Path) -> list[tuple[str, tuple[int, ...]]]:
    """What was tried, in order, choices left out."""
    records = read_log(work_dir).records
    return [(r.task, tuple(r.decisions.values())) for r in records if not r.default_seconds]


def test_a_run_measures_every_candidate_and_counts_the_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TRIAL", Effort(2, 1))
    monkeypatch.setattr(measure, "FINAL", Effort(3, 1))
    killed = tmp_path / "log" / "build" / "dead"
    killed.mkdir(parents=True)
    (killed / "1.so").write_text("of a job that was killed")
    report, shown, notes = run(tmp_path / "log", Toy(), WILD, Toy(), trials=8)
    plain, wild = report.tasks
    assert (plain.name, plain.trials, plain.failures) == ("toy 32x32", 6, 0)
    assert (wild.name, wild.trials, wild.failures) == ("toy 64x32", 3, 2)
    assert report.measured == 6 + 3 + 2
    assert sum(count for _, count in report.errors) == 2
    assert {reason for reason, _ in report.errors} == {
        REASON,
        "ended its process: a crash, or not enough memory",
    }
    assert report.complaint is None
    assert notes == []
    for task in report.tasks:
        assert task.before is not None
        assert task.after is not None
        assert 0 < task.after <= task.before
        assert task.gain == task.before / task.after
        assert [result.trials for result in shown if result.name == task.name][-1] == task.trials
    log = read_log(tmp_path / "log", target=TARGET.name)
    assert len(log.records) == report.measured
    found = log.find(workload_hash(Toy().workload()), ("rows", "columns"))
    assert found is not None
    assert (found.decisions, found.seconds) == (plain.decisions, plain.after)
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["log.json", RECORDS]

    # All is measured: a second call gives the same report and adds nothing.
    again, _, _ = run(tmp_path / "log", Toy(), WILD, trials=8)
    assert again.tasks == report.tasks
    assert again.measured == 0


@pytest.mark.usefixtures("simulator")
def test_a_later_call_goes_on_and_chooses_anew(tmp_path: Path) -> None:
    first, _, _ = run(tmp_path, Toy(), trials=3)
    before = (tmp_path / RECORDS).read_bytes()
    second, _, _ = run(tmp_path, Toy(), trials=5)
    assert (first.tasks[0].trials, second.tasks[0].trials) == (3, 5)
    assert second.measured == 2 + 1
    assert (tmp_path / RECORDS).read_bytes().startswith(before)
    tried = points(tmp_path)
    assert len(set(tried)) == len(tried) == 5
    assert tried[0] == ("toy 32x32", (1, 8))


@pytest.mark.usefixtures("simulator")
def test_an_evolutionary_run_with_a_trained_model(tmp_path: Path) -> None:
    toy = Toy(space={"rows": (1, 2, 4, 8, 16, 32), "columns": (1, 2, 4, 8, 16, 32)})
    report, _, _ = run(tmp_path, toy, trials=30, cost_model="xgb")
    (task,) = report.tasks
    assert (task.trials, task.failures) == (30, 0)
    assert len(set(points(tmp_path))) == 30
    assert task.decisions == {"rows": 32, "columns": 32}


@pytest.mark.usefixtures("simulator")
def test_a_time_limit_ends_the_trials_and_still_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    report, _, _ = run(tmp_path, Toy(), trials=6, time_limit=4.0)
    (task,) = report.tasks
    assert 0 < task.trials < 6
    assert task.before is not None


@pytest.mark.usefixtures("simulator")
def test_a_run_whose_candidates_mostly_fail_complains(tmp_path: Path) -> None:
    mostly = Toy(space={"rows": (1, BROKEN), "columns": (4, 8, 16)}, default={"rows": 1, "columns": 8})
    bad = Toy(64, space={"rows": (BROKEN,), "columns": (8,)}, default={"rows": BROKEN, "columns": 8})
    report, _, _ = run(tmp_path, mostly, bad, trials=6)
    assert report.complaint == f"4 of 7 candidates failed; most often: {REASON}"
    assert report.tasks[1].after is report.tasks[1].before is None
    assert errors_table(report).rows == (("4", REASON),)
    assert results_table(report).rows[1] == ("toy 64x32", "", "", "", "1", "1", "")
    only_bad = TuningReport("", (report.tasks[0], TaskResult("x", None, None, {}, 1, 1)), 0)
    assert only_bad.complaint == "4 of 7 candidates failed"
    half = TuningReport("", (TaskResult("y", 1.0, 1.0, {}, 9, 0), TaskResult("x", None, None, {}, 1, 1)), 0)
    assert half.complaint == "all candidates of x failed"


def test_a_comparison_that_fails_is_named_and_the_trials_count(
    tmp_path: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "compare", lambda libraries: Failure("out of luck"))
    report, _, notes = run(tmp_path, Toy(), trials=6)
    assert notes == ["toy 32x32: not compared with its default schedule (out of luck)"]
    assert report.tasks[0].before is None
    assert report.tasks[0].decisions == {"rows": 4, "columns": 16}


def test_what_was_luck_does_not_survive_the_comparison(
    tmp_path: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = simulator._seconds
    lucky = "2 8"
    times = {"2 8": [1e-9]}

    def trial_times(libraries: Sequence[Library]) -> Generator[tuple[int, list[float] | Failure], None, None]:
        for index, library in enumerate(libraries):
            yield index, times.get(library.path, [seconds(library)])

    monkeypatch.setattr(simulator, "time", trial_times)
    report, _, _ = run(tmp_path, Toy(), trials=6)
    assert lucky in {f"{r} {c}" for _, (r, c) in points(tmp_path)}
    assert report.tasks[0].decisions == {"rows": 4, "columns": 16}


@pytest.mark.usefixtures("simulator")
def test_the_last_winner_is_compared_again(tmp_path: Path) -> None:
    toy = Toy(space={"rows": (1, 2, 4, 8), "columns": (8, 16)})
    run(tmp_path, toy, trials=7)
    key = workload_hash(toy.workload())
    before = read_log(tmp_path).find(key, toy.space)
    # Three lucky trials of slow candidates push the winner off the list of the fastest.
    with (tmp_path / RECORDS).open("a") as stream:
        for rows in (1, 2, 4):
            schedule = decided_schedule(toy.workload(), toy.space, (rows, 8))
            stream.write(Record(key, toy.name, trace_json(schedule.trace), (1e-9,)).line())
    report, _, _ = run(tmp_path, toy, trials=7)
    assert before is not None
    assert report.measured == 1
    assert report.tasks[0].decisions == before.decisions


def test_where_nothing_is_faster_the_default_is_chosen(
    tmp_path: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "_seconds", lambda library: 1e-6)
    report, _, _ = run(tmp_path, Toy(), trials=6)
    assert report.tasks[0].decisions == dict(Toy().default)
    assert report.tasks[0].gain == 1.0


@pytest.mark.usefixtures("simulator")
def test_records_of_a_changed_space_are_passed_over(tmp_path: Path) -> None:
    run(tmp_path, Toy(), trials=2)
    with (tmp_path / RECORDS).open("a") as stream:
        stream.write(trial(1e-12, workload=workload_hash(Toy().workload())).line())
    wider = Toy(space={"rows": (1, 2, 4), "columns": (8, 16, 32)})
    report, _, _ = run(tmp_path, wider, trials=9)
    assert report.tasks[0].trials == 9
    assert report.tasks[0].after is not None
    assert report.tasks[0].after > 1e-12


@pytest.mark.usefixtures("simulator")
def test_lines_that_are_no_records_are_noticed(tmp_path: Path) -> None:
    run(tmp_path, Toy(), trials=1)
    with (tmp_path / RECORDS).open("a") as stream:
        stream.write('{"torn')
    report, _, notes = run(tmp_path, Toy(), trials=1)
    assert len(notes) == 1
    assert "line 3: not a record, torn" in notes[0]
    assert report.measured == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"trials": 0}, "--trials: is 0; expected at least 1"),
        ({"time_limit": 0.0}, "--time-limit: is 0 s; expected more than 0"),
        ({"time_limit": float("nan")}, "--time-limit: is nan s; expected more than 0"),
        ({"cost_model": "mlp"}, "--cost-model: is 'mlp'; expected xgb or random"),
        ({"seed": -1}, "--seed: is -1; expected 0 to 2147483646"),
        ({"seed": 2**31}, "--seed: is 2147483648; expected 0 to 2147483646"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options(**options)
    assert str(caught.value) == part


@pytest.mark.usefixtures("simulator")
def test_the_largest_seed_is_one_that_tvm_takes(tmp_path: Path) -> None:
    toy = Toy(space={"rows": (1, 2, 4, 8, 16, 32), "columns": (1, 2, 4, 8, 16, 32)})
    report, _, _ = run(tmp_path, toy, trials=20, cost_model="xgb", seed=2**31 - 2)
    assert report.tasks[0].trials == 20


def test_nothing_to_tune_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="got nothing to tune"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("model", "missing"), [("xgb", ["cloudpickle", "xgboost"]), ("random", ["cloudpickle"])], ids=["xgb", "random"]
)
def test_missing_packages_are_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, missing: Sequence[str]
) -> None:
    monkeypatch.setattr(tuner, "find_spec", lambda name: None if name in ("cloudpickle", "xgboost") else name)
    with pytest.raises(HostError, match=f"lacks the packages {', '.join(missing)}; install"):
        run(tmp_path / "log", Toy(), trials=1, cost_model=model)
    assert not (tmp_path / "log").exists()


def test_a_target_that_this_host_cannot_run_needs_a_tracker(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"aarch64: is for aarch64; this host is .*--rpc-tracker"):
        tune([Toy()], tmp_path, resolve("aarch64"), realize, Options(trials=1))


def test_without_a_c_compiler_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(HostError, match="linker: no C compiler to link for"):
        run(tmp_path, Toy(), trials=1)


def test_the_report_is_json(tmp_path: Path) -> None:
    report = TuningReport("dir", (TaskResult("t", 2e-6, 1e-6, {"rows": 2}, 3, 1),), 4, (("no", 1),))
    assert json.loads(json.dumps(report.as_json())) == {
        "work_dir": "dir",
        "measured": 4,
        "tasks": [
            {
                "name": "t",
                "before": 2e-6,
                "after": 1e-6,
                "gain": 2.0,
                "decisions": {"rows": 2},
                "trials": 3,
                "failures": 1,
            }
        ],
        "errors": [{"reason": "no", "candidates": 1}],
    }
    assert results_table(report).rows == (("t", "2.00", "1.00", "2.00x", "3", "1", "rows=2"),)
