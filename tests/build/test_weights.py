"""Weights beside the library: the file is right, readable by all, and never replaces what is not ours."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from tvm_ternary.build.weights import BESIDE_BYTES, describe_weights, weights_lie_beside, weights_path, write_weights
from tvm_ternary.errors import OptionError, OutputError
from tvm_ternary.runtime.manifest import DTYPES
from tvm_ternary.runtime.weights import read_weights

# Hypothesis has no numbers of bfloat16.
ARRAYS = st.sampled_from([name for name in DTYPES if name != "bfloat16"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__")
NAMED = st.dictionaries(NAMES, ARRAYS, max_size=4)


@given(NAMED)
def test_write_and_read(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = folder / "round.safetensors"
    info = write_weights(file, weights)
    assert info.bytes == sum(array.nbytes for array in weights.values())
    assert info.names == tuple(weights)
    assert info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    theirs = load_file(file)
    assert theirs.keys() == weights.keys()
    ours = read_weights(folder, type(info)(info.sha256, info.bytes, file.name, info.names))
    for name, array in zip(info.names, ours, strict=True):
        for read in (array, theirs[name]):
            assert read.dtype == weights[name].dtype
            np.testing.assert_array_equal(read, weights[name])


@given(st.lists(st.integers(0, 200), max_size=6), st.text(max_size=70))
def test_tensors_are_aligned_but_for_those_behind_an_odd_one(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], name: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "aligned.safetensors"
    weights = {f"{name}{i}": np.full(size, i, np.int8) for i, size in enumerate(sizes)}
    write_weights(file, weights)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begins = {key: 8 + length + header[key]["data_offsets"][0] for key in weights}
    even = [key for key, array in weights.items() if array.nbytes % 64 == 0]
    odd = [key for key in weights if key not in even]
    assert all(begins[key] % 64 == 0 for key in [*even, *odd[:1]])


def test_strides_do_not_matter(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    strided = array.T.copy().T
    assert write_weights(tmp_path / "a", {"w": array}) == write_weights(tmp_path / "b", {"w": strided})
    assert describe_weights({"w": array}) == describe_weights({"w": strided})


def test_all_may_read_the_file(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", {"w": np.zeros(3)})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    "other",
    [
        {"w": np.array([1, 2, 4], np.int32)},
        {"v": np.array([1, 2, 3], np.int32)},
        {"w": np.array([1, 2, 3], np.uint32)},
        {"w": np.array([[1, 2, 3]], np.int32)},
        {"w": np.array([1, 2, 3], np.int32), "v": np.zeros(0)},
    ],
)
def test_the_description_tells_weights_apart(other: dict[str, np.ndarray[Any, Any]]) -> None:
    weights = {"w": np.array([1, 2, 3], np.int32)}
    assert describe_weights(weights).sha256 != describe_weights(other).sha256
    assert describe_weights(weights).bytes == 12


def test_where_weights_go() -> None:
    assert not weights_lie_beside(BESIDE_BYTES)
    assert weights_lie_beside(BESIDE_BYTES + 1)
    assert weights_lie_beside(1, "beside")
    assert not weights_lie_beside(BESIDE_BYTES, "inside")
    with pytest.raises(OptionError, match="they have 1073741825 bytes; expected at most 1073741824; use 'beside'"):
        weights_lie_beside(BESIDE_BYTES + 1, "inside")
    with pytest.raises(OptionError, match="weights 'above': no such place; expected one of auto, inside, beside"):
        weights_lie_beside(1, "above")


def test_the_path_of_the_weights(tmp_path: Path) -> None:
    assert weights_path(tmp_path / "model.so") == tmp_path / "model.safetensors"
    write_weights(tmp_path / "model.safetensors", {"w": np.zeros(3)})
    assert weights_path(tmp_path / "model.so") == tmp_path / "model.safetensors"
    with pytest.raises(OutputError, match=r"give the library the suffix \.so"):
        weights_path(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["checkpoint", "text", "empty", "folder", "dangling link"])
def test_a_file_that_is_not_ours_is_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "checkpoint":
        save_file({"w": np.zeros(3)}, path, metadata={"format": "pt"})
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "absent")
    else:
        path.write_text("text" if kind == "text" else "")
    with pytest.raises(OutputError, match=r"is in the way: .* tvm-ternary did not write it; move it away"):
        weights_path(tmp_path / "model.so")
