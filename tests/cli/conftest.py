"""The command line as a process, a small model, and its compiled library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest

from ..models import FLOAT, GraphBuilder, mlp
from . import warm

MATRICES = ("layers.0.weight", "layers.1.weight")
NEED_TVM = ("bench", "compile", "eval", "quantize", "tune")


def command(*arguments: str | Path) -> list[str]:
    """The command line of a process."""
    return [sys.executable, "-m", "tvm_ternary", *map(os.fspath, arguments)]


def cli(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it to its end.

    Verbs that need TVM are forked from a process that has imported it, unless variables are given, for these may be
    read when an interpreter starts. The others have to work without it.
    """
    environment = {**os.environ, "TVM_TERNARY_TRACE": "0", **(env or {})}
    if env is None and arguments[0] in NEED_TVM:
        return warm.run([*map(os.fspath, arguments)], environment, timeout=120)
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=environment, timeout=120
    )


def error_line(result: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """Check that a process failed with one line that is an error, after nothing but progress; give the line."""
    *progress, line = result.stderr.splitlines()
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert all(text.endswith(" ...") for text in progress)
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two matrices, (24, 10) and (7, 24): x [batch, 10] to y [batch, 7]."""
    path = tmp_path_factory.mktemp("model") / "mlp.onnx"
    onnx.save(mlp(), path)
    return path


@pytest.fixture(scope="session")
def library(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, compiled by the command line. Do not write there."""
    path = tmp_path_factory.mktemp("library") / "mlp.so"
    result = cli("compile", model, "-o", path, "--quiet")
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="session")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with two inputs that share a dimension, an output with an awkward name, and one that is not finite."""
    g = GraphBuilder("paired")
    left, right = (g.input(name, FLOAT, ["batch", "length"]) for name in ("left", "right"))
    g.node("Add", left, right, output="a/../b c")
    g.node("Sqrt", g.node("Sub", left, g.constant(1e9)), output="A_.._b_c")
    g.output("a/../b c", FLOAT, ["batch", "length"])
    g.output("A_.._b_c", FLOAT, ["batch", "length"])
    folder = tmp_path_factory.mktemp("paired")
    onnx.save(g.model(), folder / "paired.onnx")
    result = cli("compile", folder / "paired.onnx", "-o", folder / "paired.so", "--quiet")
    assert result.returncode == 0, result.stderr
    return folder / "paired.so"
