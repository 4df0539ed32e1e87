"""``tvm-ternary tune``: as a process, killed and called again, and every bad input in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import pytest

from tvm_ternary.cli import main, tune
from tvm_ternary.runtime.artifact import read_artifact
from tvm_ternary.schedule.records import RECORDS, read_log
from tvm_ternary.tuning.log import SET_ASIDE
from tvm_ternary.tuning.report import TaskResult

from ..tuning.logs import OTHER, TARGET, choice, failure, trial, write_log
from .conftest import cli, command

TINY = ("tune", "--op", "linear", "--shape", "32,64", "--scheme", "t1a8", "--cost-model", "random")


def test_a_job_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    arguments = (*TINY, "--m", "1,2", "--trials", "4", "--work-dir", tmp_path)
    file = tmp_path / RECORDS
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not file.exists() or file.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = read_log(tmp_path)
    assert len(before.records) >= 4
    assert all(record.error is None for record in before.records)
    # As if it had been killed within a write.
    torn = trial(1e-6).line().encode()[:77]
    with file.open("ab") as stream:
        stream.write(torn)

    result = cli(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    after = read_log(tmp_path)
    assert after.records[: len(before.records)] == before.records
    tried = [record for record in after.records if not record.default_seconds]
    assert len({(record.task, *record.decisions.items()) for record in tried}) == len(tried) == 8
    assert (tmp_path / SET_ASIDE).read_bytes() == torn + b"\n"
    (note,) = result.stderr.splitlines()
    assert note.startswith(f"note: {file} line {len(before.records) + 1}: not a record, torn")
    report = json.loads(result.stdout)
    assert report["measured"] == len(after.records) - len(before.records)
    trials = {task["name"]: task["trials"] for task in report["tasks"]}
    assert trials == {"t1a8 32x64 m1": 4, "t1a8 32x64 m2": 4}
    for task in report["tasks"]:
        assert task["gain"] == pytest.approx(task["before"] / task["after"])
        assert task["gain"] >= 1

    again = cli(*arguments)
    assert again.returncode == 0, again.stderr
    head, line, *rows = again.stdout.splitlines()
    assert head.split() == ["task", "before", "us", "after", "us", "gain", "trials", "failed", "decisions"]
    assert set(line) <= {"-", " "}
    assert [row.split()[:3] for row in rows[:2]] == [["t1a8", "32x64", "m1"], ["t1a8", "32x64", "m2"]]
    assert len(read_log(tmp_path).records) == len(after.records)


def test_a_model_is_tuned_for_its_own_rows(model: Path, tmp_path: Path) -> None:
    fixed = (model, "--scheme", "t1a32", "--layers", "layers.0", "--dim", "batch=3", "--trials", "2", "--m", "7")
    result = cli("tune", *fixed, "--cost-model", "random", "--work-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert {record.task for record in read_log(tmp_path).records} == {"t1a32 24x10 m3"}
    lines = result.stderr.splitlines()
    assert lines[0].startswith("t1a32 24x10 m3: 1 of 2, best ")
    assert all(line.endswith(" us ...") for line in lines)


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with tune._show_progress(False) as progress:
        progress(TaskResult("a", None, None, {}, 0, 0), 8)
        progress(TaskResult("a", None, 2e-6, {}, 5, 1), 8)
        progress(TaskResult("b\n", None, 12.34e-6, {}, 8, 0), 8)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "5/8" in printed.err
    assert "best 2.00 us, 1 failed" in printed.err
    assert "b\\n" in printed.err
    assert "best 12.3 us" in printed.err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with tune._show_progress(True) as progress:
        progress(TaskResult("a", None, 2e-6, {}, 5, 1), 8)
    assert capsys.readouterr() == ("", "")


def test_prune_merges_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "one", [trial(1e-6), trial(2e-6, rows=2), failure(workload=OTHER)])
    write_log(tmp_path / "two", [choice(3e-6, workload=OTHER)])
    arguments = [
        "tune",
        "--prune",
        str(tmp_path / "one"),
        "--prune",
        str(tmp_path / "two"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out'}: 2 records\n", "")
    assert set(read_log(tmp_path / "out").records) == {trial(1e-6), choice(3e-6, workload=OTHER)}
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "out"), "records": 2}


def test_candidates_are_exported_and_results_used(model: Path, tmp_path: Path) -> None:
    """From a model to its library, with times made up in the place of a GPU's."""
    chosen = (model, "--scheme", "t1a8", "--dim", "batch=2", "--layers", "layers.0", "--target", "cuda-sm_90")
    log, batch = tmp_path / "log", tmp_path / "batch"
    search = ("--trials", "2", "--cost-model", "random", "--work-dir", log)
    exported = cli("tune", *chosen, *search, "--export-candidates", batch, "--quiet")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout.startswith(f"{batch}: 2 candidates of 1 tasks, ")
    rows = [json.loads(line) for line in (batch / "candidates.jsonl").read_text().splitlines()]
    digest = sha256((batch / "candidates.jsonl").read_bytes()).hexdigest()
    header = {**rows[0], "candidates": digest, "machine": "host", "device": "H100"}
    times = [{"id": row["id"], "seconds": [seconds]} for row, seconds in zip(rows[1:], (2e-6, 1e-6), strict=True)]
    (batch / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (header, *times)))

    imported = cli("tune", "--import-results", batch / "results.jsonl", "--work-dir", log, "--json")
    assert imported.returncode == 0, imported.stderr
    (task,) = json.loads(imported.stdout)["tasks"]
    assert (task["name"], task["gain"], task["decisions"]) == ("t1a8 24x10 m2", 2.0, rows[2]["decisions"])

    artifact = tmp_path / "model.so"
    result = cli("compile", *chosen, "-o", artifact, "--tuning-log", log, "--quiet")
    assert result.returncode == 0, result.stderr
    layers = {layer.name: layer.schedule for layer in read_artifact(artifact).manifest.layers}
    assert layers["layers.0.weight"] == f"{log}#{read_log(log).records[-1].tag}"


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a bad call ends with."""
    assert main([os.fspath(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--trials", "0"), "--trials: is 0; expected at least 1"),
        (("--target", "vax"), "target vax: no such target; expected one of native"),
        (("--target", "aarch64"), "target aarch64: is for aarch64; this host is"),
        (("--target", "cuda-sm_90"), "target cuda-sm_90: device cuda:0 this host has no NVIDIA driver"),
        (("--target", "cuda-sm_80+sm_90"), "target cuda-sm_80+sm_90: is of 2 architectures; expected one"),
        (("--target", "cuda-sm_90", "--threads", "2"), "--threads: is 2; one thread launches what a GPU computes"),
        (("--export-candidates", "x"), "is for a CPU; candidates are exported for GPUs"),
        (("--export-candidates", "x", "--time-limit", "1"), "--export-candidates: measures nothing"),
        (("--import-results", "x"), "--import-results: expected --work-dir DIR, the log to write, and nothing to tune"),
        (("--cost-model", "mlp"), "--cost-model: is 'mlp'; expected xgb or random"),
        (("--time-limit", "0"), "--time-limit: is 0 s; expected more than 0"),
        (("--seed", "-1"), "--seed: is -1; expected 0 to 2147483646"),
        (("--threads", "0"), "threads: is 0; expected a whole number from 1"),
        (("--threads", "many"), "--threads: N is 'many'"),
        (("--m", "1,0"), "--m: got '1,0'; expected rows of at least 1"),
        (("--m", "1,,2"), "--m: M is ''"),
        (("--shape", "32"), "--shape: got '32'; expected N,K"),
        (("--shape", "32,0"), "--shape: got '32,0'; expected N,K, both at least 1"),
        (("--scheme", "t1a7"), "scheme 't1a7': unknown"),
        (("--layers", "ffn"), "--op linear: has no --layers, --dim or --constant"),
        (("model.onnx",), "tune: expected a model or --op linear, and not both"),
        (("--rpc-tracker", "127.0.0.1:9190"), "--rpc-tracker: goes with --rpc-key"),
        (("--rpc-tracker", "nowhere", "--rpc-key", "k"), "--rpc-tracker: got 'nowhere'; expected HOST:PORT"),
        (
            ("--rpc-tracker", "127.0.0.1:1", "--rpc-key", "k"),
            "tracker 127.0.0.1:1: does not answer (Connection refused)",
        ),
        (("--prune", "x"), "--prune: expected --prune DIR, perhaps several, with -o DIR"),
        (("-o", "x"), "--prune: expected --prune DIR, perhaps several, with -o DIR"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    assert part in line_of(capsys, *TINY, "--work-dir", tmp_path / "log", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "tune: expected a model or --op linear, and not both"),
        (("--op", "linear"), "--op linear: needs --shape N,K"),
        (("no.onnx",), "no.onnx"),
        (("--import-results", "none/results.jsonl", "--work-dir", "log"), "none/results.jsonl: cannot be read"),
        (("no.onnx", "--shape", "2,2"), "--shape: is for --op linear"),
        (("no.onnx", "--dim", "batch"), "--dim: got 'batch'; expected NAME=VALUE"),
        (("--prune", "none", "-o", "out"), "none: holds no tuning log: log.json cannot be read"),
    ],
)
def test_bad_calls_are_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str) -> None:
    assert part in line_of(capsys, "tune", *arguments)


def test_a_work_dir_of_another_target_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, [trial(1e-6)], target="vax")
    line = line_of(capsys, *TINY, "--target", TARGET, "--work-dir", tmp_path)
    assert f"{tmp_path}: holds records of target vax on 1 thread; expected target {TARGET} on 1 thread" in line
    assert len(read_log(tmp_path).records) == 1


def test_without_a_c_compiler_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "linker: no C compiler to link for" in line_of(capsys, *TINY, "--work-dir", tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_candidates_mostly_fail_exits_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    assert main([*TINY, "--m", "1", "--trials", "2", "--work-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    table, errors = printed.out.split("\n\n")
    assert table.splitlines()[2].split()[:5] == ["t1a8", "32x64", "m1", "2", "2"]
    assert errors.splitlines()[2].split()[0] == "2"
    assert "false failed" in errors
    *_, last = printed.err.splitlines()
    assert last.startswith("error: tune: 2 of 2 candidates failed; most often: RuntimeError: ")
    assert last.endswith(f"look into {tmp_path}")
