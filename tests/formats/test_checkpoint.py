"""Checkpoint files: whole, equal for equal content, and refused when damaged."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from tvm_ternary.errors import LayoutError, ModelError, OutputError
from tvm_ternary.formats import PerChannel, PerGroup, TernaryTensor, load_metadata, load_tensors, save_tensors
from tvm_ternary.formats.checkpoint import CheckpointFile
from tvm_ternary.formats.transform import InputTransform
from tvm_ternary.quantize import quantize

from .strategies import assert_same, tensors


def example() -> dict[str, Any]:
    """Two ternary tensors and some arrays, not in order of name."""
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (2, 20, 70), dtype=np.int8)
    return {
        "layers.1.up": TernaryTensor.from_trits(trits, rng.random((2, 20, 3), dtype=np.float32), PerGroup(32)),
        "layers.0.up": TernaryTensor.from_trits(trits[:1], rng.random((1, 20, 1), dtype=np.float32), PerChannel()),
        "bias": rng.random(20, dtype=np.float32),
        "a step": np.int64(7) * np.ones((), np.int64),
    }


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["tvm_ternary"])


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Save the same arrays with a changed description."""
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = {**header(path), **change}
    if "checksum" not in change:
        del content["checksum"]
        content["checksum"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    save_file(arrays, path, metadata={"tvm_ternary": json.dumps(content)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_tensors(path, example(), {"model": "demo", "note": "é"})
    return path


@given(st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: "." not in name), tensors(), max_size=3))
def test_saved_and_loaded_is_the_same(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    content = {name: tensor for name, tensor in content.items() if name != "__metadata__"}
    path = tmp_path_factory.mktemp("checkpoint") / "x.safetensors"
    save_tensors(path, content)
    loaded = load_tensors(path)
    assert list(loaded) == sorted(content)
    for name, tensor in content.items():
        got = loaded[name]
        assert isinstance(got, TernaryTensor)
        assert_same(got, tensor)


def test_arrays_and_metadata_come_back(saved: Path) -> None:
    loaded, content = load_tensors(saved), example()
    assert list(loaded) == sorted(content)
    for name in ("bias", "a step"):
        array = loaded[name]
        assert isinstance(array, np.ndarray)
        assert array.dtype == content[name].dtype
        assert array.shape == content[name].shape
        np.testing.assert_array_equal(array, content[name])
    assert load_metadata(saved) == {"model": "demo", "note": "é"}


def test_the_names_in_the_file_are_the_documented_ones(saved: Path) -> None:
    with safe_open(saved, framework="np") as file:
        names = sorted(file.keys())
    assert names == sorted(
        ["a step", "bias", "layers.0.up.planes", "layers.0.up.scale", "layers.1.up.planes", "layers.1.up.scale"]
    )
    assert header(saved)["tensors"]["layers.1.up"] == {"shape": [20, 70], "granularity": "g32"}


@pytest.mark.parametrize("view", [np.s_[::2], np.s_[:, ::-1], np.s_[:, 1]])
def test_strided_arrays_are_stored_as_seen(tmp_path: Path, view: Any) -> None:
    array = np.arange(24, dtype=np.int16).reshape(4, 6)[view]
    save_tensors(tmp_path / "x", {"a": array, "b": array.astype(">i2"), "t": array.T})
    loaded = load_tensors(tmp_path / "x")
    np.testing.assert_array_equal(loaded["a"], array)
    np.testing.assert_array_equal(loaded["b"], array)
    np.testing.assert_array_equal(loaded["t"], array.T)


def test_equal_content_gives_equal_bytes_in_another_process(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    code = (
        "import sys; from tvm_ternary.formats import load_metadata, load_tensors, save_tensors;"
        "t = load_tensors(sys.argv[1]); m = load_metadata(sys.argv[1]);"
        "save_tensors(sys.argv[2], dict(reversed(t.items())), dict(reversed(m.items())))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, saved, again], check=True, env=environment)
    assert again.read_bytes() == saved.read_bytes()


def test_every_truncation_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    damaged = tmp_path / "damaged"
    for length in [*range(0, 64), len(whole) // 2, len(whole) - 1]:
        damaged.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"damaged: .*the file is damaged"):
            load_tensors(damaged)


def test_any_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    trits = np.ones((1, 2, 5), dtype=np.int8)
    tensor = TernaryTensor.from_trits(trits, np.ones((1, 2, 1), dtype=np.float32), PerChannel())
    save_tensors(path, {"w": tensor, "bias": np.ones((2, 3), np.float32)}, {"model": "demo"})
    whole = path.read_bytes()
    load_tensors(path)
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises((ModelError, LayoutError)):
            load_tensors(path)


def test_a_changed_weight_is_named(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    # The arrays of eight-byte elements come first; the last bytes belong to a float32 array.
    whole[-1] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(ModelError, match="scale does not match its checksum; the file is damaged"):
        load_tensors(saved)


@pytest.mark.parametrize(("old", "new"), [(b'"F32","shape":[2,3]', b'"I32","shape":[2,3]'), (b"[2,3]", b"[3,2]")])
def test_a_changed_dtype_or_shape_is_named(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "x"
    save_tensors(path, {"bias": np.ones((2, 3), np.float32)})
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(ModelError, match="bias does not match its checksum"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("change", "kind", "problem"),
    [
        ({"version": 2}, ModelError, "format version 2, expected 1; read it with the tvm-ternary that wrote it"),
        ({"version": None}, ModelError, "format version None"),
        ({"tensors": None}, ModelError, "description is incomplete"),
        ({"checksum": 5}, ModelError, "its description does not match its checksum"),
        ({"crc32": {}}, ModelError, "does not hold the arrays that its description names"),
        ({"tensors": {"gone": {"shape": [1, 1], "granularity": ""}}}, ModelError, "gone is not described"),
        ({"tensors": {"layers.0.up": {}}}, ModelError, "layers.0.up is not described"),
        ({"tensors": {"layers.0.up": {"shape": 5, "granularity": ""}}}, ModelError, "layers.0.up is not described"),
        ({"tensors": {"layers.0.up": {"shape": [5], "granularity": ""}}}, ModelError, "layers.0.up is not described"),
        ({"tensors": {"layers.0.up": {"shape": [20, 70], "granularity": "row"}}}, LayoutError, "granularity 'row'"),
        ({"tensors": {"layers.0.up": {"shape": [20, 71], "granularity": "g16"}}}, LayoutError, "layers.0.up: scale: "),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    saved: Path, change: dict[str, Any], kind: type[Exception], problem: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(kind, match=problem) as caught:
        load_tensors(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_description_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "x", metadata={"tvm_ternary": text})
    with pytest.raises(ModelError):
        load_metadata(tmp_path / "x")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "x", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="x: not written by tvm-ternary"):
        load_tensors(tmp_path / "x")
    with pytest.raises(ModelError, match="missing: cannot be read"):
        load_tensors(tmp_path / "missing")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tensors(tmp_path)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    content = example()
    content["bias.scale"] = content["bias"]
    content["bias"] = content.pop("layers.0.up")
    with pytest.raises(LayoutError, match=r"bias\.scale: two tensors"):
        save_tensors(tmp_path / "x", content)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros(1, np.longdouble), np.zeros(1, "M8[s]")])
def test_dtypes_that_cannot_be_stored_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(LayoutError, match="cannot be stored, expected one of bool, float16"):
        save_tensors(tmp_path / "x", {"a": array})
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        save_tensors(tmp_path / "missing" / "x", example())


def test_a_full_disk_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            save_tensors(saved, {"a": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_the_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x.safetensors", {"a": np.ones(3, np.float32)})
    finally:
        os.umask(umask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("scale", [None, np.exp2(np.arange(70) % 5 - 2).astype(np.float32)])
@pytest.mark.parametrize("rotation", [None, 32])
def test_transforms_of_inputs_come_back(tmp_path: Path, scale: np.ndarray | None, rotation: int | None) -> None:
    weight = quantize(np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32), "t2a8g32")
    transform = InputTransform(scale, rotation)
    save_tensors(tmp_path / "a", {"w": replace(weight, transform=transform)})
    whole, mapped = load_tensors(tmp_path / "a")["w"], CheckpointFile(tmp_path / "a")["w"]
    for got in (whole, mapped):
        assert isinstance(got, TernaryTensor)
        assert got.transform is not None
        assert got.transform.key == transform.key
        np.testing.assert_allclose(got.dequantize(), transform.restore(weight.dequantize()), rtol=1e-6)
    save_tensors(tmp_path / "b", {"w": whole})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
