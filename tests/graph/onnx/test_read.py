"""Damaged and missing files, each told in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import gpt2, mlp
from tvm_ternary.errors import ModelError
from tvm_ternary.graph.onnx.data import LEFT_OUT, point_to, weight_array
from tvm_ternary.graph.onnx.read import check_finite, read_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.onnx"
    path.write_bytes(mlp().SerializeToString())
    return path


def refused(source: Path | onnx.ModelProto) -> str:
    with pytest.raises(ModelError) as caught:
        read_model(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_a_path_and_a_model_are_the_same(file: Path) -> None:
    assert read_model(file) == read_model(str(file)) == read_model(mlp())


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.onnx") == f"{tmp_path / 'none.onnx'}: no such file"


def test_a_folder(tmp_path: Path) -> None:
    assert "cannot be read: Is a directory" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x7fELF\x02\x01\x01" + bytes(64), b"PK\x03\x04" * 9])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    assert "is no ONNX model" in refused(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, part: float) -> None:
    data = gpt2().SerializeToString()
    path = tmp_path / "short.onnx"
    path.write_bytes(data[: int(len(data) * part)])
    assert "is no ONNX model, or it is truncated" in refused(path)


def test_an_old_version() -> None:
    model = mlp()
    model.ir_version = 2
    assert "IR version 2 is older than 3" in refused(model)


def test_external_data(tmp_path: Path) -> None:
    path, weights = tmp_path / "big.onnx", tmp_path / "big.bin"
    onnx.save_model(mlp(), path, save_as_external_data=True, location=weights.name, size_threshold=0)
    for tensor, inline in zip(read_model(path).graph.initializer, mlp().graph.initializer, strict=True):
        array = weight_array(tensor)
        np.testing.assert_array_equal(array, weight_array(inline))
        assert isinstance(array.base, np.memmap), "mapped, not read"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert f"ends at byte {len(data)} of {weights}, which has {len(data) - 1}" in refused(path)
    weights.unlink()
    assert f"lies in {weights}, which does not exist" in refused(path)


def test_external_data_outside_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = folder / "big.onnx"
    onnx.save_model(mlp(), path, save_as_external_data=True, location="big.bin", size_threshold=0)
    (folder / "big.bin").rename(tmp_path / "big.bin")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../big.bin"
    path.write_bytes(model.SerializeToString())
    assert "lies outside of the model's folder" in refused(path)


@pytest.mark.parametrize("kind", [onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT16])
def test_external_data_of_every_kind(tmp_path: Path, kind: int) -> None:
    model = mlp()
    values = np.array([[1, -2, 3], [0, 7, -8]], np.float32)
    tensor = onnx.helper.make_tensor("odd", kind, values.shape, values.reshape(-1))
    inline = onnx.numpy_helper.to_array(tensor)
    model.graph.initializer.append(tensor)
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    read = weight_array(read_model(tmp_path / "m.onnx").graph.initializer[-1])
    assert read.dtype == inline.dtype
    np.testing.assert_array_equal(read.astype(np.float32), values)


def test_a_weight_that_was_left_out(tmp_path: Path) -> None:
    model = mlp()
    shape = tuple(model.graph.initializer[0].dims)
    point_to(model.graph.initializer[0], LEFT_OUT)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert f"without its ternary weights; name its folder, {tmp_path}" in refused(path)
    array = weight_array(read_model(path, quantized=True).graph.initializer[0])
    assert (array.shape, array.dtype, array.strides) == (shape, np.float32, (0, 0))


def test_check_finite() -> None:
    array = np.zeros((3, 4), dtype=np.float32)
    check_finite("fc.weight", array)
    array[1, 2], array[2, 0] = np.nan, -np.inf
    with pytest.raises(ModelError, match=r"fc\.weight: 2 of 12 elements are NaN or infinite, the first at \(1, 2\)"):
        check_finite("fc.weight", array)
