"""Artifacts appear whole or not at all, and an old one stays whatever stops the build."""

from __future__ import annotations

import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tvm_ternary.build import artifact as build
from tvm_ternary.build.artifact import append_manifest, build_artifact
from tvm_ternary.build.weights import describe_weights
from tvm_ternary.errors import ArtifactError, HostError, OutputError, TernaryError
from tvm_ternary.runtime.artifact import read_artifact
from tvm_ternary.runtime.module import load
from tvm_ternary.target import resolve

from . import small_model

TARGET = resolve("native")
MANIFEST = small_model.manifest(TARGET, (small_model.IDS, small_model.X), small_model.OUTPUTS)
GIVEN = {"ids": np.arange(6).reshape(2, 3), "x": np.ones((2, 4), np.float32)}


@pytest.fixture(scope="module")
def inside() -> Any:
    return small_model.compiled(small_model.dynamic(), TARGET)


@pytest.fixture(scope="module")
def beside() -> Any:
    return small_model.compiled(small_model.dynamic(beside=True), TARGET)


def runs(path: Path) -> None:
    for got, expected in zip(load(path).run(None, GIVEN), small_model.reference(**GIVEN), strict=True):
        np.testing.assert_array_equal(got, expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_weights_inside(inside: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    assert build_artifact(inside, MANIFEST, path) == path
    assert read_artifact(path).manifest == MANIFEST
    assert [file.name for file in tmp_path.iterdir()] == ["model.so"]
    assert path.stat().st_mode & stat.S_IXUSR
    runs(path)


def test_weights_beside(beside: Any, tmp_path: Path) -> None:
    path = build_artifact(beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS)
    weights = read_artifact(path).manifest.weights
    assert (weights.file, weights.names, weights.bytes) == ("model.safetensors", ("table", "flag"), 50)
    assert replace(read_artifact(path).manifest, weights=MANIFEST.weights) == MANIFEST
    assert contents(tmp_path).keys() == {"model.so", "model.safetensors"}
    runs(path)


def test_large_weights_inside(beside: Any, tmp_path: Path) -> None:
    path = build_artifact(beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS, beside=False)
    artifact = read_artifact(path)
    assert artifact.manifest == replace(MANIFEST, weights=replace(MANIFEST.weights, names=("table", "flag")))
    (tmp_path / "part").write_bytes(path.read_bytes()[-(-artifact.elf_bytes // 64) * 64 :][: artifact.weights_bytes])
    assert load_file(tmp_path / "part").keys() == small_model.WEIGHTS.keys()
    runs(path)
    again = build_artifact(beside, MANIFEST, tmp_path / "again.so", small_model.WEIGHTS, beside=False)
    assert again.read_bytes() == path.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"model.so", "again.so", "part"}


def test_building_again_replaces_and_gives_the_same_bytes(beside: Any, tmp_path: Path) -> None:
    for _ in range(2):
        build_artifact(beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS)
        before = contents(tmp_path)
    build_artifact(beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS)
    assert contents(tmp_path) == before


def test_a_module_that_is_loaded_survives_a_new_build(inside: Any, tmp_path: Path) -> None:
    path = build_artifact(inside, MANIFEST, tmp_path / "model.so")
    module = load(path)
    changed = replace(MANIFEST, model=replace(MANIFEST.model, name="other"))
    build_artifact(inside, changed, path)
    np.testing.assert_array_equal(module.run(None, GIVEN)[0], small_model.reference(**GIVEN)[0])
    assert load(path).manifest.model.name == "other"


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, here and in the linker: as near to a full disk as a test gets."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(folder: Path, error: type[TernaryError], *arguments: Any) -> str:
    """The message of a build that must fail and leave the folder as it was."""
    before = contents(folder)
    with pytest.raises(error) as caught:
        build_artifact(*arguments)
    assert contents(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_disk_that_is_full_before_the_manifest(inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_artifact(inside, MANIFEST, tmp_path / "model.so")
    elf_bytes = read_artifact(path).elf_bytes

    def full(library: Path, *arguments: Any) -> None:
        with small_files(elf_bytes + 10):
            append_manifest(library, *arguments)

    monkeypatch.setattr(build, "append_manifest", full)
    message = refused(tmp_path, OutputError, inside, MANIFEST, path)
    assert message.startswith(f"{path}: cannot be written (File too large)")
    runs(path)


def test_a_disk_that_is_full_for_the_weights(beside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_artifact(beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS)
    write = build.write_weights

    def full(*arguments: Any) -> Any:
        with small_files(100):
            return write(*arguments)

    monkeypatch.setattr(build, "write_weights", full)
    message = refused(tmp_path, OutputError, beside, MANIFEST, path, small_model.WEIGHTS)
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: cannot be written (File too large)")
    runs(path)


def test_a_disk_that_is_full_for_the_linker(inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_artifact(inside, MANIFEST, tmp_path / "model.so")
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nulimit -f 8\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    message = refused(tmp_path, OutputError, inside, MANIFEST, path)
    assert message.startswith(f"{path}: cannot be written (File too large)")
    runs(path)


@pytest.mark.parametrize("where", ["link", "append_manifest", "write_weights"])
def test_an_interrupt_leaves_the_old_artifact(
    where: str, beside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_artifact(beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS)
    before = contents(tmp_path)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_artifact(beside, MANIFEST, path, {**small_model.WEIGHTS, "flag": np.array([False, False])})
    assert contents(tmp_path) == before
    runs(path)


def test_a_stop_between_the_two_files_is_noticed(beside: Any, tmp_path: Path) -> None:
    path = build_artifact(beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS)
    old_library = path.read_bytes()
    build_artifact(beside, MANIFEST, path, {**small_model.WEIGHTS, "table": small_model.TABLE + 1})
    path.write_bytes(old_library)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: has SHA-256"):
        load(path)


def test_a_folder_that_is_missing_or_no_folder(inside: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "absent" / "model.so", tmp_path / "file" / "model.so", tmp_path):
        message = refused(tmp_path, OutputError, inside, MANIFEST, output)
        assert message.startswith(str(output))


def test_a_checkpoint_in_the_way_is_found_before_anything_is_built(
    beside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_text("the only copy")
    monkeypatch.setattr(build, "link", lambda *arguments: pytest.fail("linked"))
    message = refused(tmp_path, OutputError, beside, MANIFEST, tmp_path / "model.so", small_model.WEIGHTS)
    assert "is in the way" in message


def test_no_linker_leaves_nothing(inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "absent"))
    assert "not on the PATH" in refused(tmp_path, HostError, inside, MANIFEST, tmp_path / "model.so")


def test_the_manifest_of_weights_inside_is_the_callers() -> None:
    assert MANIFEST.weights == describe_weights({"table": small_model.TABLE})
