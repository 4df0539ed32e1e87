"""Every way in which an artifact file can be damaged is an error of one line, and none of its code runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tvm_ternary.errors import ArtifactError
from tvm_ternary.runtime.artifact import read_artifact

from .conftest import FOOTER_BYTES, reseal


def refused(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_whole_artifact(built: Path) -> None:
    artifact = read_artifact(built / "inside.so")
    content = (built / "inside.so").read_bytes()
    assert artifact.manifest.model.file == "small.onnx"
    assert artifact.path.is_absolute()
    assert json.loads(content[artifact.elf_bytes : -FOOTER_BYTES]) == artifact.manifest.to_dict()


@pytest.mark.parametrize("name", ["inside.so", "mapped.so"])
def test_resealing_an_artifact_by_the_documented_layout_changes_nothing_else(copies: Path, name: str) -> None:
    before = read_artifact(copies / name)
    reseal(copies / name, lambda manifest: None)
    assert read_artifact(copies / name) == before


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.so")


def test_a_folder(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library" * 100, bytes(4096)])
def test_a_file_that_is_not_elf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(content)
    message = refused(path)
    assert "is not an ELF library" in message or "too few for a compiled library" in message


def test_a_library_that_is_not_ours(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.so"
    artifact = read_artifact(built / "inside.so")
    path.write_bytes((built / "inside.so").read_bytes()[: artifact.elf_bytes])
    assert "without a manifest" in refused(path)
    interpreter = Path(shutil.copy(Path(sys.executable).resolve(), tmp_path / "python"))
    refused(interpreter)


def test_elf_for_a_machine_that_is_not_known(copies: Path) -> None:
    path = copies / "inside.so"
    reseal(path, lambda manifest: None, lambda elf: elf.__setitem__(18, 8))
    assert "ELF for machine 8; expected 64-bit x86_64 or aarch64" in refused(path)


@pytest.mark.parametrize("name", ["inside.so", "mapped.so"])
def test_truncation_anywhere(copies: Path, name: str) -> None:
    path = copies / name
    content, elf_bytes = path.read_bytes(), read_artifact(path).elf_bytes
    near_the_borders = [edge + step for edge in (64, elf_bytes, len(content) - FOOTER_BYTES) for step in (-1, 0, 1)]
    for size in (1, elf_bytes // 2, *near_the_borders, len(content) - 1):
        path.write_bytes(content[:size])
        message = refused(path)
        assert "truncated" in message or "cut short" in message or "too few" in message


@pytest.mark.parametrize("name", ["inside.so", "mapped.so"])
def test_alteration_anywhere(copies: Path, name: str) -> None:
    path = copies / name
    content = path.read_bytes()
    artifact = read_artifact(path)
    generator = np.random.default_rng(0)
    behind_the_code = generator.integers(artifact.elf_bytes, artifact.elf_bytes + artifact.weights_bytes + 1, 20)
    positions = [
        *generator.integers(64, len(content), 60),
        *behind_the_code,
        *range(len(content) - FOOTER_BYTES, len(content), 5),
    ]
    for position in positions:
        altered = bytearray(content)
        altered[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(altered)
        assert "is altered" in refused(path) or position >= len(content) - FOOTER_BYTES


def test_bytes_appended(copies: Path) -> None:
    path = copies / "inside.so"
    path.write_bytes(path.read_bytes() + b"\n")
    assert "bytes appended" in refused(path)


def test_a_manifest_of_another_version(copies: Path) -> None:
    path = copies / "inside.so"
    reseal(path, lambda manifest: manifest.update(version=7))
    assert "has version 7; expected 5" in refused(path)
