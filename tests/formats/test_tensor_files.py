"""Safetensors as checkpoints have them: every dtype exactly, shards, and damage that is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.tensor_files import checkpoint_files, open_tensors


def write_raw(path: Path, header: Any, data: bytes = b"", *, text: bytes | None = None) -> Path:
    """A file with any header."""
    encoded = json.dumps(header).encode() if text is None else text
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]], weight_map: Mapping[str, str]) -> Path:
    for name, arrays in shards.items():
        save_file(dict(arrays), folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))
    return folder


A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.int64)
SHARDS = {"model-1.safetensors": {"a": A}, "model-2.safetensors": {"b": B}}
MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors"}


class TestDtypes:
    @pytest.mark.parametrize(
        "dtype",
        [
            "bool",
            "int8",
            "uint8",
            "int16",
            "uint16",
            "int32",
            "uint32",
            "int64",
            "uint64",
            "float16",
            "float32",
            "float64",
        ],
    )
    def test_numpy_types_are_as_stored(self, tmp_path: Path, dtype: str) -> None:
        array = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype)
        save_file({"x": array, "empty": array[:0], "one": np.array(array[0, 0])}, tmp_path / "model.safetensors")
        tensors = open_tensors(tmp_path)
        assert tensors.dtype("x") == dtype
        for name, wanted in (("x", array), ("empty", array[:0]), ("one", np.array(array[0, 0]))):
            got = tensors.load(name)
            assert (got.dtype, got.shape, tensors.shape(name)) == (wanted.dtype, wanted.shape, wanted.shape)
            np.testing.assert_array_equal(got, wanted)

    @pytest.mark.parametrize(
        ("code", "dtype", "bits"),
        [("BF16", "bfloat16", 16), ("F8_E4M3", "float8_e4m3fn", 8), ("F8_E5M2", "float8_e5m2", 8)],
    )
    def test_others_are_widened_exactly_whatever_the_bits(
        self, tmp_path: Path, code: str, dtype: str, bits: int
    ) -> None:
        codes = np.arange(2**bits, dtype=f"uint{bits}")
        size = codes.nbytes
        path = write_raw(tmp_path / "x.safetensors", {"x": entry(code, [2**bits], 0, size)}, codes.tobytes())
        tensors = open_tensors(path)
        assert tensors.dtype("x") == dtype
        got = tensors.load("x")
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, codes.view(getattr(ml_dtypes, dtype)).astype(np.float32))

    def test_one_that_is_not_read_is_named(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "x.safetensors", {"a.weight": entry("F4", [4], 0, 2)}, b"ab")
        with pytest.raises(ModelError, match=r"x.safetensors: a.weight: has dtype F4; expected one of BOOL, I8.*F64"):
            open_tensors(path)


class TestOneFile:
    def test_a_folder_with_one_file_of_any_name(self, tmp_path: Path) -> None:
        save_file({"a": A}, tmp_path / "weights.safetensors")
        tensors = open_tensors(tmp_path)
        assert tensors.names() == ("a",)
        assert tensors.where("a") == f"{tmp_path / 'weights.safetensors'}: a"
        assert checkpoint_files(tmp_path) == (tmp_path / "weights.safetensors",)

    def test_arrays_are_mapped_and_cannot_be_written(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": A}, path)
        array = open_tensors(tmp_path).load("a")
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(np.float32(7).tobytes())
        assert array[1, 2] == 7
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1

    @pytest.mark.parametrize("kept", [0, 7, 30, 95])
    def test_truncated(self, tmp_path: Path, kept: int) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": A}, path)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ModelError, match=r"model.safetensors: is (truncated|no safetensors file).*download"):
            open_tensors(tmp_path)

    def test_cut_after_it_was_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": A}, path)
        tensors = open_tensors(tmp_path)
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ModelError, match="a: cannot be read any more"):
            tensors.load("a")

    @pytest.mark.parametrize(
        ("header", "data", "message"),
        [
            ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "a and b overlap at byte 4"),
            ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 12, 16)}, 16, "a and b leave a gap at byte 8"),
            ({"a": entry("F32", [2], 4, 12)}, 12, "the header and a leave a gap at byte 0"),
            ({"a": entry("F32", [2], 0, 4)}, 4, r"a has 4 bytes; float32 \[2\] needs 8"),
            ({"a": entry("F32", [2], 8, 0)}, 8, "a has -8 bytes"),
            ({"a": entry("F32", [2], 0, 8)}, 12, "has 4 bytes behind its last tensor, a"),
            ({"a": entry("F32", [-2], 0, 8)}, 8, r"gives a shape \[-2\]"),
            ({"a": entry("F32", [2], 0, True)}, 8, "gives a shape"),
            ({"a": {"dtype": "F32", "shape": [2]}}, 8, "says no dtype, shape and offsets of a"),
            ({"a": 3}, 8, "says no dtype"),
            ([], 0, "its header is no JSON object"),
        ],
    )
    def test_a_header_that_does_not_describe_its_data(
        self, tmp_path: Path, header: Any, data: int, message: str
    ) -> None:
        path = write_raw(tmp_path / "x.safetensors", header, bytes(data))
        with pytest.raises(ModelError, match=rf"x.safetensors: .*{message}.*damaged"):
            open_tensors(path)

    def test_a_header_that_is_no_json_or_says_a_name_twice(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "x.safetensors", None, text=b"\xff{")
        with pytest.raises(ModelError, match="its header is not JSON"):
            open_tensors(path)
        twice = json.dumps({"a": entry("F32", [1], 0, 4)})[:-1]
        path = write_raw(path, None, bytes(4), text=f"{twice}, {twice[1:]}}}".encode())
        with pytest.raises(ModelError, match="a twice"):
            open_tensors(path)


class TestFolders:
    def test_without_safetensors_says_what_is_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"holds no safetensors file; expected model.safetensors or"):
            open_tensors(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ModelError, match=r"convert pytorch_model.bin with safetensors"):
            open_tensors(tmp_path)

    def test_several_files_need_an_index(self, tmp_path: Path) -> None:
        for name, arrays in SHARDS.items():
            save_file(arrays, tmp_path / name)
        with pytest.raises(ModelError, match="holds 2 safetensors files and no index"):
            open_tensors(tmp_path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"none: cannot be read \(No such file"):
            open_tensors(tmp_path / "none")


class TestShards:
    def test_are_read_as_one(self, tmp_path: Path) -> None:
        tensors = open_tensors(write_shards(tmp_path, SHARDS, MAP))
        assert tensors.names() == ("a", "b")
        assert (tensors.shape("a"), tensors.dtype("b")) == ((2, 3), "int64")
        np.testing.assert_array_equal(tensors.load("a"), A)
        np.testing.assert_array_equal(tensors.load("b"), B)
        assert tensors.where("b") == f"{tmp_path / 'model-2.safetensors'}: b"
        assert [path.name for path in checkpoint_files(tmp_path)] == ["model.safetensors.index.json", *SHARDS]

    def test_missing_one(self, tmp_path: Path) -> None:
        write_shards(tmp_path, SHARDS, MAP)
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(ModelError, match=r"model-2.safetensors: is missing; model.safetensors.index.json names it"):
            open_tensors(tmp_path)

    def test_damaged_one(self, tmp_path: Path) -> None:
        write_shards(tmp_path, SHARDS, MAP)
        path = tmp_path / "model-2.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ModelError, match=r"model-2.safetensors: is truncated"):
            open_tensors(tmp_path)

    @pytest.mark.parametrize(
        ("weight_map", "message"),
        [
            ({**MAP, "c": "model-1.safetensors"}, "model-1.safetensors: lacks c, which"),
            ({"a": "model-1.safetensors", "x": "model-1.safetensors"}, "model-1.safetensors: lacks x"),
            ({**MAP, "a": "../model-1.safetensors"}, r"index.json: names '../model-1.safetensors' as a shard"),
        ],
    )
    def test_an_index_that_does_not_fit(self, tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            open_tensors(write_shards(tmp_path, SHARDS, weight_map))

    def test_a_tensor_that_the_index_does_not_name(self, tmp_path: Path) -> None:
        shards = {**SHARDS, "model-2.safetensors": {"b": B, "extra": B}}
        with pytest.raises(
            ModelError, match=r"model-2.safetensors: holds extra, which model.safetensors.index.json does"
        ):
            open_tensors(write_shards(tmp_path, shards, MAP))

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
    def test_an_index_that_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index.json: (is not JSON|has no weight_map)"):
            open_tensors(tmp_path)
