"""Checkpoints of one file and of several: written, read lazily, and told when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.formats.strategies import make_tensor
from tvm_ternary.errors import ModelError
from tvm_ternary.formats import PerChannel, PerGroup, TernaryTensor
from tvm_ternary.formats.checkpoint_folder import INDEX, WEIGHTS, CheckpointFolder, save_folder

TENSORS = {
    "a.weight": make_tensor(16, 70, PerGroup(32), 2, seed=1),
    "b.weight": make_tensor(8, 64, PerChannel(), 1, seed=2),
    "bias": np.arange(5, dtype=np.float32),
    "raw": np.arange(7, dtype=np.uint8),
    "scalar": np.asarray(3, dtype=np.int64),
    "none": np.empty((0, 4), dtype=np.float16),
}


def check(folder: Path) -> None:
    read = CheckpointFolder(folder)
    assert list(read) == sorted(TENSORS)
    for name, expected in TENSORS.items():
        tensor = read[name]
        assert read.is_ternary(name) == isinstance(expected, TernaryTensor)
        if isinstance(expected, TernaryTensor):
            assert isinstance(tensor, TernaryTensor)
            np.testing.assert_array_equal(tensor.planes, expected.planes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            assert (tensor.shape, tensor.granularity) == (expected.shape, expected.granularity)
        else:
            assert isinstance(tensor, np.ndarray)
            assert tensor.dtype == expected.dtype
            np.testing.assert_array_equal(tensor, expected)
            file, offset, size = read.extent(name)
            assert (folder / file).read_bytes()[offset : offset + size] == expected.tobytes()


def test_one_file_that_the_library_reads_too(tmp_path: Path) -> None:
    save_folder(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    check(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["bias"].tolist() == [0, 1, 2, 3, 4]


def test_shards_with_an_index(tmp_path: Path) -> None:
    save_folder(tmp_path, TENSORS, shard_bytes=700)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 1
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"]["a.weight.planes"] in shards
    check(tmp_path)


def test_equal_tensors_give_equal_bytes_when_they_were_read_back(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    save_folder(tmp_path / "first", TENSORS)
    save_folder(tmp_path / "second", CheckpointFolder(tmp_path / "first"))
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()


def test_a_damaged_tensor_is_told_when_it_is_read(tmp_path: Path) -> None:
    save_folder(tmp_path, TENSORS)
    _, offset, _ = CheckpointFolder(tmp_path).extent("bias")
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[offset] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    read = CheckpointFolder(tmp_path)
    assert isinstance(read["a.weight"], TernaryTensor)
    with pytest.raises(ModelError, match=r"model\.safetensors: bias does not match its checksum; the file is damaged"):
        read["bias"]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match="is no index of shards"):
        CheckpointFolder(tmp_path)


def test_missing_shards_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        CheckpointFolder(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ModelError, match="names files outside of its folder"):
        CheckpointFolder(tmp_path)
