"""The reader of weights beside an artifact against files of the safetensors package, and against damaged ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from tvm_ternary.errors import ArtifactError
from tvm_ternary.runtime.arrays import can_be_read_in_place
from tvm_ternary.runtime.artifact import read_artifact
from tvm_ternary.runtime.manifest import DTYPES, WeightsInfo
from tvm_ternary.runtime.weights import artifact_weights, read_weights

from .conftest import reseal

# Hypothesis has no numbers of bfloat16.
ARRAYS = st.sampled_from([name for name in DTYPES if name != "bfloat16"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))
)


def info(content: bytes, *names: str) -> WeightsInfo:
    return WeightsInfo(hashlib.sha256(content).hexdigest(), 0, "w.safetensors", names)


def write(folder: Path, content: bytes, *names: str) -> WeightsInfo:
    (folder / "w.safetensors").write_bytes(content)
    return info(content, *names)


@given(st.lists(ARRAYS, max_size=4))
def test_files_of_the_safetensors_package(
    tmp_path_factory: pytest.TempPathFactory, arrays: list[np.ndarray[Any, Any]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    named = {f"tensor {i}": array for i, array in enumerate(arrays)}
    read = read_weights(folder, write(folder, save(named), *named))
    assert len(read) == len(arrays)
    for got, expected in zip(read, arrays, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_weights_of_another_build(tmp_path: Path) -> None:
    described = write(tmp_path, save({"a": np.zeros(3)}), "a")
    (tmp_path / "w.safetensors").write_bytes(save({"a": np.ones(3)}))
    with pytest.raises(
        ArtifactError, match=r"w\.safetensors: has SHA-256 .*; the artifact was compiled with .*; copy the \.so"
    ):
        read_weights(tmp_path, described)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file, but the artifact's weights lie there"):
        read_weights(tmp_path, info(b""))


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_weights(tmp_path, info(b""))


def test_weights_in_the_artifact_are_views_of_it(built: Path) -> None:
    artifact = read_artifact(built / "mapped.so")
    table, flag = artifact_weights(artifact)
    np.testing.assert_array_equal(table, np.arange(12).reshape(4, 3) - 5)
    assert flag.tolist() == [True, False]
    assert can_be_read_in_place(table)
    assert not artifact_weights(read_artifact(built / "inside.so"))


def test_a_tensor_that_the_artifact_lacks(copies: Path) -> None:
    path = copies / "mapped.so"
    reseal(path, lambda manifest: manifest["weights"].update(names=["table", "banner"]))
    with pytest.raises(ArtifactError, match=r"mapped\.so: lacks the tensor or field 'banner'"):
        artifact_weights(read_artifact(path))


def test_what_is_written_to_weights_reaches_no_file(copies: Path) -> None:
    path = copies / "mapped.so"
    before = path.read_bytes()
    artifact_weights(read_artifact(path))[0][...] = 7
    assert path.read_bytes() == before
    assert artifact_weights(read_artifact(path))[0][0, 0] == -5


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lacks the tensor or field 'b'"):
        read_weights(tmp_path, write(tmp_path, save({"a": np.zeros(3)}), "a", "b"))


def with_header(header: object, data: bytes = bytes(8)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"abc",
        (1 << 63).to_bytes(8, "little") + b"{}",
        b"\x02" + bytes(7) + b"{x",
        with_header([1]),
        with_header({"a": [1]}),
        with_header({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}),
        with_header({"a": {"dtype": "F64", "shape": [1], "data_offsets": [8, 16]}}),
        with_header({"a": {"dtype": "F64", "shape": [-1], "data_offsets": [8, 0]}}),
        with_header({"a": {"dtype": "F64", "shape": ["1"], "data_offsets": [0, 8]}}),
    ],
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ArtifactError, match="is not a safetensors file") as caught:
        read_weights(tmp_path, write(tmp_path, content, "a"))
    assert "\n" not in str(caught.value)
