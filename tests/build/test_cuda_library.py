"""A library for GPUs, taken apart: machine code and PTX, by architecture and kernel, and no source."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tvm_ternary
from tvm_ternary.build.executable import build_executable, cuda_source
from tvm_ternary.build.fatbin import FatbinEntry, read_fatbin, read_kernels
from tvm_ternary.build.library_bin import library_blob, read_cuda, read_library_bin, write_library_bin
from tvm_ternary.build.link import link
from tvm_ternary.target import resolve

from . import cuda_model, small_model

TARGET = resolve("cuda-sm_80+sm_90")
ROOT = Path(tvm_ternary.__file__).parents[1]
NAMES = sorted(f"{name}_kernel" for name in cuda_model.KERNELS)
# What any CUDA source has in it. The names of thread axes are no such thing: they stand in the table of launches.
SOURCE = (b"__global__", b"__shared__", b"__launch_bounds__", b"__syncthreads", b"#include", b"(int)threadIdx")

LOADED = """
import sys, tvm, tvm_ffi
seen = []
def load(content):
    seen.append(bytes(content))
    return tvm_ffi.system_lib()
tvm_ffi.register_global_func("ffi.Module.load_from_bytes.cuda", load, override=True)
module = tvm_ffi.load_module(sys.argv[1])
module["vm_load_executable"]
sys.stdout.buffer.write(seen[0])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("cuda") / "model.so"
    return output, cuda_model.build(TARGET.name, output)


def entries(library: Path) -> tuple[FatbinEntry, ...]:
    modules = read_library_bin(library_blob(library.read_bytes()))
    content = read_cuda(next(module.content for module in modules if module.kind == "cuda"))
    assert content.fmt == "fatbin"
    return read_fatbin(bytes(content.code))


def test_it_holds_machine_code_for_each_architecture_and_ptx_for_later_ones(library: tuple[Path, Any]) -> None:
    found = sorted((entry.kind, entry.arch) for entry in entries(library[0]))
    assert found == [("elf", "sm_80"), ("elf", "sm_90"), ("ptx", "sm_90")]


def test_the_kernels_are_there_by_name_with_what_they_use(library: tuple[Path, Any]) -> None:
    for entry in entries(library[0]):
        if entry.kind == "ptx":
            assert all(f".entry {name}(".encode() in entry.data for name in NAMES)
            continue
        kernels = read_kernels(entry.data)
        assert [kernel.name for kernel in kernels] == NAMES
        for kernel in kernels:
            assert 0 < kernel.registers <= 32
            assert kernel.shared_bytes == 512
            assert kernel.local_bytes == 0
    resources = library[1].kernels
    assert [(row.arch, row.kernel) for row in resources] == [(arch, name) for arch in TARGET.archs for name in NAMES]
    assert all(row.spill_bytes == 0 for row in resources)


def test_no_source_is_in_it(library: tuple[Path, Any]) -> None:
    content = library[0].read_bytes()
    assert [word for word in SOURCE if word in content] == []
    executable = build_executable(cuda_model.static(), TARGET.tvm)
    source = (cuda_source(executable) or "").encode()
    # Else the first line would find nothing whatever is in the library.
    assert [word for word in SOURCE if word not in source] == []


def test_the_runtime_reads_what_was_written(library: tuple[Path, Any]) -> None:
    """TVM's own reader takes the blob apart; the GPU's loader is one here that gives the content back."""
    result = subprocess.run([sys.executable, "-c", LOADED, library[0]], capture_output=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr.decode()
    content = read_cuda(result.stdout)
    assert content.fmt == "fatbin"
    assert bytes(content.code) == library[1].fatbin
    for name in NAMES:
        assert name.encode() in bytes(content.table)


def test_all_else_is_as_tvm_packs_it(library: tuple[Path, Any]) -> None:
    blob = bytes(library_blob(library[0].read_bytes()))
    modules = read_library_bin(blob)
    assert write_library_bin(modules) == blob
    assert [(module.kind, module.imports) for module in modules] == [
        ("relax.VMExecutable", (1,)),
        ("_lib", (2,)),
        ("cuda", ()),
    ]
    assert cuda_model.WEIGHTS.tobytes() in bytes(modules[0].content)


def test_two_processes_in_two_folders_give_the_same_bytes(library: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "another folder"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TMPDIR": str(folder)}
    command = [sys.executable, cuda_model.__file__, TARGET.name, "other name.so"]
    subprocess.run(command, check=True, cwd=folder, env=environment, timeout=120)
    assert [file.name for file in folder.iterdir()] == ["other name.so"]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (library[0], folder / "other name.so")]
    assert digests[0] == digests[1]


def test_source_is_never_linked_in_the_place_of_code(tmp_path: Path) -> None:
    executable = build_executable(cuda_model.static(("reverse",)), TARGET.tvm)
    with pytest.raises(ValueError, match="a fatbin must be given"):
        link(executable, TARGET.tvm, tmp_path / "x.so")
    cpu = resolve("x86-64-v3")
    with pytest.raises(ValueError, match="and for no other"):
        link(small_model.compiled(small_model.dynamic(), cpu), cpu.tvm, tmp_path / "x.so", b"code")
    assert list(tmp_path.iterdir()) == []
