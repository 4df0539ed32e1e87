"""Linking: the same bytes from every folder and process, and one line when there is no linker or no room."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tvm_ternary
from tvm_ternary.build.link import find_linker, link
from tvm_ternary.errors import HostError
from tvm_ternary.target import resolve

from . import small_model

TARGET = resolve("native")
ROOT = Path(tvm_ternary.__file__).parents[1]
FOREIGN = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]


@pytest.fixture(scope="module")
def executable() -> Any:
    return small_model.compiled(small_model.dynamic(), TARGET)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_two_processes_in_two_folders_give_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for folder, seed in ((tmp_path / "a", "1"), (tmp_path / "another folder", "2")):
        folder.mkdir()
        command = [sys.executable, Path(small_model.__file__), folder, "native"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "TMPDIR": str(folder)}
        subprocess.run(command, check=True, cwd=folder, env=environment, timeout=120)
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()})
    assert digests[0] == digests[1]
    assert {"inside.so", "beside.so", "beside.safetensors", "probe.so"} <= digests[0].keys()


def test_nothing_of_this_host_or_of_debugging_is_left(executable: Any, tmp_path: Path) -> None:
    output = tmp_path / "some name.so"
    link(executable, TARGET.tvm, output)
    content = output.read_bytes()
    for trace in (b".symtab", b".debug", b".comment", b"build-id", b"/proc/", os.fsencode(tmp_path), b"GCC:"):
        assert trace not in content
    assert b"__tvm_ffi__library_bin" in content


def test_linking_leaves_no_file_and_no_handle(executable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    link(executable, TARGET.tvm, tmp_path / "x.so")
    assert set(os.listdir("/proc/self/fd")) == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.so"]


def test_the_variable_cc_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "my cc", "exit 0")
    monkeypatch.setenv("CC", f"'{compiler}' -B/elsewhere")
    assert find_linker(TARGET.tvm["mtriple"]) == [str(compiler), "-B/elsewhere"]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        find_linker(TARGET.tvm["mtriple"])
    assert str(caught.value) == (
        f"linker: no C compiler to link for {TARGET.tvm['mtriple']}: cc, gcc, g++, clang not on the PATH; "
        "install one (apt-get install gcc) or set CC"
    )


def test_a_foreign_architecture_needs_its_cross_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triple = f"{FOREIGN}-unknown-linux-gnu"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    with pytest.raises(HostError) as caught:
        find_linker(triple)
    assert f"{FOREIGN}-linux-gnu-gcc not on the PATH; install one" in str(caught.value)
    assert f"gcc-{FOREIGN.replace('_', '-')}-linux-gnu" in str(caught.value)
    compiler = script(tmp_path / f"{FOREIGN}-linux-gnu-gcc", "exit 0")
    assert find_linker(triple) == [str(compiler)]


@pytest.mark.parametrize(
    ("message", "error", "expected"),
    [
        ("ld: failed: No space left on device\ncollect2: error", OSError, "No space left on device"),
        ("ld: cannot open output file x.so: Permission denied", PermissionError, "Permission denied"),
        ("note: hm\nld: error: no -lm\ncollect2: error", HostError, "could not link the library (ld: error: no -lm)"),
        ("", HostError, "could not link the library (exit status 3)"),
    ],
)
def test_a_linker_that_fails(
    executable: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    error: type[Exception],
    expected: str,
) -> None:
    compiler = script(tmp_path / "cc", f"cat >&2 <<'END'\n{message}\nEND\nexit 3")
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(error) as caught:
        link(executable, TARGET.tvm, tmp_path / "x.so")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(executable: Any, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"could not link the library \(.*absent.*No such file"):
        link(executable, TARGET.tvm, tmp_path / "absent" / "x.so")


def test_the_output_may_be_run_by_all(executable: Any, tmp_path: Path) -> None:
    link(executable, TARGET.tvm, tmp_path / "x.so")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.so").stat().st_mode) == 0o777 & ~umask
