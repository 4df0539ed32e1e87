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
    """Models and libraries; do not write there."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, model in (("mlp", mlp()), ("gpt2", gpt2())):
        onnx.save(model, folder / f"{name}.onnx")
        tt.compile(folder / f"{name}.onnx", folder / f"{name}-float.so", layers=(), embeddings="float")
        tt.compile(folder / f"{name}.onnx", folder / f"{name}-t2.so", scheme="t2a8g64")
    return folder


@pytest.fixture(scope="session")
def run_of(folder: Path) -> Callable[[str], Runner]:
    """Give the loaded library of a name."""
    return lambda name: Runner(name, tt.load(folder / f"{name}.so", threads=1))
