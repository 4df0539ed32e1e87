"""Where TVM's runtime library is looked for, and that a process gets only one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_ternary.errors import HostError
from tvm_ternary.runtime import library
from tvm_ternary.runtime.library import (
    CUDART,
    LIBRARY,
    LIBRARY_CUDA,
    VARIABLE,
    VARIABLE_CUDA,
    VARIABLE_CUDART,
    find_cudart,
    find_runtime,
    find_runtime_cuda,
)

from .conftest import ROOT


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with no runtime library in any place, and an empty folder."""
    for variable in (VARIABLE, VARIABLE_CUDA, VARIABLE_CUDART, "LD_LIBRARY_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "package" / "runtime" / "library.py"))
    return tmp_path


def put(folder: Path, name: str = LIBRARY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    return folder / name


def test_none_anywhere(bare: Path) -> None:
    with pytest.raises(HostError) as caught:
        find_runtime(bare)
    assert str(caught.value) == (
        "libtvm_runtime.so: TVM's runtime library was not found; install apache-tvm, put libtvm_runtime.so next to the "
        "artifact, or name the file in TVM_TERNARY_RUNTIME"
    )


def test_the_order_of_the_places(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linker = put(bare / "linker")
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{bare / 'absent'}:{linker.parent}")
    assert find_runtime(bare / "model") == linker
    package = put(bare / "package" / "runtime")
    assert find_runtime(bare / "model") == package
    beside = put(bare / "model")
    assert find_runtime(bare / "model") == beside
    installed = put(bare / "tvm" / "lib")
    spec = importlib.machinery.ModuleSpec("tvm", None, is_package=True)
    spec.submodule_search_locations = [str(bare / "tvm")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert find_runtime(bare / "model") == installed
    named = put(bare / "named")
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_runtime(bare / "model") == named


def test_the_library_for_cuda(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError) as caught:
        find_runtime_cuda(bare)
    assert str(caught.value) == (
        "libtvm_runtime_cuda.so: TVM's runtime library for CUDA was not found; install apache-tvm, put "
        "libtvm_runtime_cuda.so next to the artifact, or name the file in TVM_TERNARY_RUNTIME_CUDA"
    )
    beside = put(bare / "model", LIBRARY_CUDA)
    assert find_runtime_cuda(bare / "model") == beside
    named = put(bare / "named", LIBRARY_CUDA)
    monkeypatch.setenv(VARIABLE_CUDA, str(named))
    assert find_runtime_cuda(bare / "model") == named


def test_the_order_of_the_places_of_cuda(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkits = (bare / "usr" / "lib64",)
    monkeypatch.setattr(library, "CUDA_TOOLKITS", toolkits)
    # Left to the dynamic linker, which may know a place.
    assert find_cudart(bare / "model") == CUDART
    toolkit = put(toolkits[0], CUDART)
    assert find_cudart(bare / "model") == toolkit
    installed = put(bare / "nvidia" / "cu13" / "lib", CUDART)
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(bare / "nvidia")]
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": spec}.get)
    assert find_cudart(bare / "model") == installed
    linker = put(bare / "linker", CUDART)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(linker.parent))
    assert find_cudart(bare / "model") == linker
    beside = put(bare / "model", CUDART)
    assert find_cudart(bare / "model") == beside
    named = put(bare / "named", CUDART)
    monkeypatch.setenv(VARIABLE_CUDART, str(named))
    assert find_cudart(bare / "model") == named


def test_the_variable_names_no_file(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bare)
    monkeypatch.setenv(VARIABLE, str(bare))
    with pytest.raises(HostError, match=r"TVM_TERNARY_RUNTIME: names .*, which is no file"):
        find_runtime(bare)


def run(code: str, *arguments: object, **environment: str) -> str:
    """What a new process prints: for what a process can do only once."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


MAPPED = """
def mapped():
    return len({line.split()[-1] for line in open("/proc/self/maps") if "libtvm_runtime.so" in line})
"""


@pytest.mark.parametrize("first", ["import tvm", "load_runtime(Path(sys.argv[1]))"])
def test_one_copy_whoever_comes_first(first: str, built: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tvm_ternary.runtime.library import load_runtime
from tvm_ternary.runtime.module import load
{MAPPED}
{first}
load_runtime(Path(sys.argv[1]))
import tvm
module = load(Path(sys.argv[1]) / "probe.so")
print(mapped(), len(module.run(None, {{}})))
"""
    assert run(code, built) == "1 1\n"


def test_tvm_is_not_imported(built: Path) -> None:
    code = """
import sys
from tvm_ternary.runtime.module import load
load(sys.argv[1]).run(None, {})
print([name for name in ("tvm", "onnx", "scipy", "safetensors") if name in sys.modules])
"""
    assert run(code, built / "probe.so") == "[]\n"


LOAD = """
import sys
from pathlib import Path
from tvm_ternary.errors import HostError
from tvm_ternary.runtime.library import load_runtime
try:
    load_runtime(Path(sys.argv[1]))
except HostError as error:
    print(error)
"""


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    bad = tmp_path / "bad.so"
    bad.write_text("text")
    message = run(LOAD, tmp_path, TVM_TERNARY_RUNTIME=str(bad))
    assert message.startswith(f"{bad}: cannot be loaded (")
    assert message.count("\n") == 1


def test_a_library_that_is_not_tvm(built: Path) -> None:
    message = run(LOAD, built, TVM_TERNARY_RUNTIME=str(built / "inside.so"))
    assert "inside.so: is no TVM runtime with the Relax virtual machine" in message or "cannot be loaded" in message
    assert message.count("\n") == 1
