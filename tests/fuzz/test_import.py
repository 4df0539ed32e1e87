"""No file crashes or hangs the importer, escapes its one-line errors, or makes it write anywhere but to its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FAST, MANY, SHARE = 500, 20_000, 1000


def fuzz(folder: Path, first: int, count: int) -> None:
    """Run cases in a process of its own."""
    inner = folder / "inner"
    inner.mkdir()
    (folder / "beside").write_bytes(b"untouched")
    command = [sys.executable, "-m", "tests.fuzz.child", str(inner), str(first), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=inner, env=environment, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    last = next((line for line in reversed(lines) if line.startswith("case")), "no case")
    assert result.returncode == 0, f"{last} ended the process: {result.returncode}\n{result.stderr[-2000:]}"
    assert not [line for line in lines if line.startswith("failed")]
    assert int(lines[-1].removeprefix("imported ")) > count // 20, "mutants are refused too early to say anything"
    assert {path.name for path in inner.iterdir()} <= {"model.onnx", "model.so"}
    assert [path.name for path in sorted(folder.iterdir())] == ["beside", "inner"]
    assert (folder / "beside").read_bytes() == b"untouched"


def test_mutants(tmp_path: Path) -> None:
    fuzz(tmp_path, 0, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, FAST + MANY, SHARE))
def test_many_mutants(tmp_path: Path, first: int) -> None:
    fuzz(tmp_path, first, SHARE)
