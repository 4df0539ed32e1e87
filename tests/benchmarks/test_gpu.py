"""The GPU benchmark as far as it goes without one: what it builds, a visit to the emulator, what it says elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import cases, peers, run, sanitizer
from benchmarks.gpu.models import ERRORS
from benchmarks.gpu.results import Results, known_cases

from . import kit

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "benchmarks/gpu.sh"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What travels, small, unpacked; and the sources that the emulator needs."""
    folder = tmp_path_factory.mktemp("kit")
    return folder, kit.make(folder)


def lines_of(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("*.jsonl")
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_visit_checks_kernels_models_and_the_program(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    assert known_cases(made[0]) == kit.CASES
    told = kit.visit(*made, tmp_path)
    assert "status 0" in told
    lines = lines_of(tmp_path)
    assert [(line["case"], line["m"], line["wrong"]) for line in lines if line["kind"] == "check"] == [
        *((cases.name_of(*case), m, 0) for case in kit.CASES.checked for m in kit.CASES.checked_rows),
        *((f"{kind}_{cases.cache_name(cache)}", 1, 0) for cache in kit.CASES.caches for kind in ("append", "step")),
        *((f"prompt_{cases.chunk_name(chunk)}", chunk[5], 0) for chunk in kit.CASES.chunks),
        *((f"prompt_{cases.prompt_name(prompt)}", prompt[3], 0) for prompt in kit.CASES.prompts),
    ]
    found = {line["kind"]: line for line in lines}
    assert found["model check"]["error"] <= found["model check"]["most"] == ERRORS["a8"]
    assert found["runner"]["error"] < 1e-6
    assert "median of" in found["runner"]["said"]
    assert all(line["gpu"] == "Emulated H100" and line["commit"] and line["cpu"] for line in lines)
    assert "wrong: none" in (tmp_path / "cuda-emulated-h100.md").read_text()


def test_a_wrong_kernel_is_found(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, sources = made
    wrong = [source.replace("(word >> (2 * s)) & 0x03030303u", "(word >> (2 * s)) & 0x01030303u") for source in sources]
    assert wrong != sources
    told = kit.visit(folder, wrong, tmp_path)
    assert "status 1" in told
    assert "WRONG t2a8g32_70x300, 18 rows" in told
    assert "t2a8g32_70x300 M=18" in (tmp_path / "cuda-emulated-h100.md").read_text()


def test_a_phase_that_dies_is_told_and_the_others_go_on(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A kernel that reads outside of its arrays ends its process."""
    folder, sources = made
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    (torn / "kernels.so").write_bytes(b"no library")
    told = kit.visit(torn, sources, tmp_path / "out")
    assert "status 1" in told
    found = {line["kind"]: line for line in lines_of(tmp_path / "out")}
    assert found["error"]["step"] == "kernels"
    assert found["model check"]["error"] <= found["model check"]["most"] == ERRORS["a8"]


def test_without_a_gpu_it_says_what_it_tried_and_exits_2(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", str(made[0]), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "no GPU" not in result.stderr:
        pytest.fail(f"this host has a GPU, or something is wrong: {result.stderr}")
    assert result.returncode == 2
    assert "nothing was measured" in result.stderr
    assert "kernels.so has its 10 functions" in result.stdout
    assert "references: 3 matrices" in result.stdout
    assert "cpu_t2a8g16: ran on the CPU" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_kit_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", str(tmp_path), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "lacks libtvm_runtime.so, libtvm_runtime_cuda.so" in result.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the folder, in which nothing is built."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    os.symlink(ROOT / "tvm_ternary", tmp_path / "tvm_ternary")
    return tmp_path


def script(copy: Path, *words: str) -> tuple[int, str, str]:
    result = subprocess.run(
        [copy / SCRIPT, *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run",), "no build-gpu/kit.tar.xz; run 'benchmarks/gpu.sh build'"),
        ((), "no environment; run 'make setup' first"),
        (("walk",), "usage: "),
        (("run", "--out"), "usage: "),
        (("run", "--fast", "1"), "usage: "),
        (("--budget", "soon"), "--budget is 'soon'; expected whole seconds"),
    ],
)
def test_what_the_script_refuses(copy: Path, words: tuple[str, ...], message: str) -> None:
    status, _, errors = script(copy, *words)
    assert (status, message in errors) == (1, True), errors


def test_the_script_unpacks_runs_and_cleans_up(made: tuple[Path, list[str]], copy: Path, tmp_path: Path) -> None:
    folder = copy / "build-gpu"
    folder.mkdir()
    subprocess.run(["tar", "cJf", folder / "kit.tar.xz", "-C", made[0], "."], check=True)
    with (folder / "kit.sha256").open("w") as stream:
        subprocess.run(["sha256sum", "kit.tar.xz"], cwd=folder, stdout=stream, check=True)
    places = tmp_path / "places"
    places.mkdir()
    os.environ["TMPDIR"] = str(places)
    try:
        status, printed, errors = script(copy, "run", "--out", str(tmp_path / "out"))
    finally:
        del os.environ["TMPDIR"]
    assert status == 2, errors
    assert "kernels.so has its 10 functions" in printed
    assert not list(places.iterdir())
    with (folder / "kit.tar.xz").open("ab") as stream:
        stream.write(b"more")
    status, _, errors = script(copy, "run")
    assert (status, "is not what was built; copy it again" in errors) == (1, True)


def test_times_go_on_after_a_process_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a phase, in their order; each is started only if the one before says that it makes sense."""
    (tmp_path / "facts.json").write_text(json.dumps({"commit": "0"}))
    statuses = {"kernels": [0], "models": [1], "ceilings": [0], "times": [3, -11, 0]}
    begun: list[str] = []

    def process(command: list[str], **options: Any) -> Any:
        begun.append(command[3])
        return subprocess.CompletedProcess(command, statuses[command[3]].pop(0))

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=process, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(run, "sanitize", lambda *arguments: iter(()))
    monkeypatch.setattr(run.peers, "collect", lambda name, seconds: [{"peer": name, "reason": "not installed"}])
    visit = run.Visit(tmp_path, tmp_path / "out", run.time.monotonic() + 500, "H100")
    assert visit.all(timed_too=True) == 1
    assert begun == ["kernels", "models", "ceilings", "times", "times", "times"]
    assert visit.failed == ["models", "times"]


def test_nothing_is_timed_where_kernels_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "facts.json").write_text(json.dumps({"commit": "0"}))
    begun: list[str] = []

    def process(command: list[str], **options: Any) -> Any:
        begun.append(command[3])
        return subprocess.CompletedProcess(command, int(command[3] == "kernels"))

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=process, TimeoutExpired=subprocess.TimeoutExpired))
    assert run.Visit(tmp_path, tmp_path / "out", run.time.monotonic() + 500, "H100").all(timed_too=True) == 1
    assert begun == ["kernels", "models"]


@pytest.mark.parametrize(
    ("script", "status", "wrong"),
    [
        ("exit 0", "nothing found", False),
        ("exit 9", "exit status 9", True),
        ("echo Device not supported; exit 1", "refused the device", False),
        ("sleep 20", "not finished in 1 s", False),
    ],
)
def test_what_the_sanitizer_says(
    script: str, status: str, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / sanitizer.TOOL
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "CHECKS", ("memcheck",))
    (line,) = sanitizer.sanitize(tmp_path, tmp_path, 1)
    assert (line["tool"], line["status"], line["wrong"]) == ("memcheck", status, wrong)


def test_a_sanitizer_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    assert [line["status"] for line in sanitizer.sanitize(tmp_path, tmp_path, 60)] == ["not installed"]


def test_what_of_a_peer_is_kept() -> None:
    whole = {"peer": "gemlite", "case": "t1a8_8x8", "m": 1, "seconds": 1e-6}
    text = f'Tuning {{"x": 1}}\n{json.dumps(whole)}\n[1]\n{json.dumps(whole)[:-9]}'
    assert peers.lines_of(text) == [whole]
    assert peers.collect("no_such_package", 1) == [{"peer": "no_such_package", "reason": "not installed"}]


def test_lines_say_where_they_are_from(tmp_path: Path) -> None:
    results = Results(tmp_path / "new", "NVIDIA H100 80GB HBM3", {"commit": "1", "floors": {}, "cases": {}})
    results.begin()
    results.add("time", case="one")
    results.facts["card"] = {"driver_version": "580"}
    results.add("check", case="two")
    assert results.path.name == "cuda-nvidia-h100-80gb-hbm3.jsonl"
    (line,) = results.rows("check")
    assert (line["case"], line["commit"], line["card"], "floors" in line) == (
        "two",
        "1",
        {"driver_version": "580"},
        False,
    )
    assert {"date", "cpu", "system", "python", "versions"} <= line.keys()
