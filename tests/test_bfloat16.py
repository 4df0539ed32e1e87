"""Inputs and outputs of bfloat16, a type that numpy has from another package."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import tvm_ternary
from tests.cli.conftest import cli
from tvm_ternary.errors import HostError, InputError
from tvm_ternary.runtime.arrays import dtype_of
from tvm_ternary.runtime.sample import random_inputs

SIZE = 300


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x + x and x itself, large enough to be handed out where they lie were they of another type."""
    folder = tmp_path_factory.mktemp("bfloat16")
    value = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", SIZE]) for name in ("x", "y", "same")]
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Identity", ["x"], ["same"])]
    model = helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]))
    onnx.save(model, folder / "m.onnx")
    return tvm_ternary.compile(folder / "m.onnx", folder / "m.so").path


def test_values_go_in_and_out(library: Path) -> None:
    module = tvm_ternary.load(library, threads=1)
    inputs = random_inputs(module.inputs, {"n": SIZE})
    assert inputs["x"].dtype == ml_dtypes.bfloat16
    kept = inputs["x"].copy()
    y, same = module.run(None, inputs)
    np.testing.assert_array_equal(y, kept + kept)
    same[...] = 0
    np.testing.assert_array_equal(inputs["x"], kept)


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_weights(weights: str, tmp_path: Path) -> None:
    table = np.arange(SIZE * SIZE).reshape(SIZE, SIZE).astype(ml_dtypes.bfloat16)
    tensor = helper.make_tensor("table", TensorProto.BFLOAT16, table.shape, table.tobytes(), raw=True)
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [SIZE, SIZE]) for name in "xy"]
    node = helper.make_node("Add", ["x", "table"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], [tensor])), tmp_path / "m.onnx")
    library = tvm_ternary.compile(tmp_path / "m.onnx", tmp_path / "m.so", weights=weights).path
    (y,) = tvm_ternary.load(library, threads=1).run(None, {"x": table})
    np.testing.assert_array_equal(y, table + table)


def test_files_on_the_command_line(library: Path, tmp_path: Path) -> None:
    x = np.arange(2 * SIZE).reshape(2, SIZE).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    result = cli("run", library, "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "y.npy").view(ml_dtypes.bfloat16), x + x)


def test_another_type_is_refused(library: Path) -> None:
    module = tvm_ternary.load(library, threads=1)
    with pytest.raises(InputError, match=r"has dtype float32; expected bfloat16; cast it with .*ml_dtypes.bfloat16"):
        module.run(None, {"x": np.zeros((1, SIZE), np.float32)})


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(HostError, match="bfloat16: numpy has no such type without the package ml_dtypes; pip install"):
        dtype_of("bfloat16")
