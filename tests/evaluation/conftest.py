"""Small models compiled as they are and with ternary weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import tvm_ternary as tt
from tvm_ternary.evaluation.models import Runner

from ..models import gpt2, mlp


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two matrices and its libraries; do not write there."""
    folder = tmp_path_factory.mktemp("evaluation")
    _compile(folder, "mlp", mlp(), None)
    return folder


@pytest.fixture(scope="session")
def decoders(folder: Path) -> Path:
    """The same folder, with a decoder of two rows of nine tokens; open numbers of them take four times as long."""
    _compile(folder, "gpt2", gpt2(), {"batch": 2, "length": 9})
    return folder


def _compile(folder: Path, name: str, model: onnx.ModelProto, dims: dict[str, int] | None) -> None:
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    tt.compile(path, folder / f"{name}-float.so", layers=(), embeddings="float", dims=dims)
    tt.compile(path, folder / f"{name}-t2.so", scheme="t2a8g64", dims=dims)


@pytest.fixture(scope="session")
def run_of(folder: Path) -> Callable[[str], Runner]:
    """Give the loaded library of a name."""
    return lambda name: Runner(name, tt.load(folder / f"{name}.so", threads=1))
