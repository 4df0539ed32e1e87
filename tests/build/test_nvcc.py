"""nvcc: found or refused in one line, the same bytes every time, and numbers that agree with what ptxas says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tvm_ternary.build import nvcc as module
from tvm_ternary.build.fatbin import read_fatbin
from tvm_ternary.build.nvcc import CudaCode, compile_fatbin, find_nvcc
from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.target import CUDA_ARCHS

ARCHS = tuple(CUDA_ARCHS)
# Kernels that use each kind of memory: constants, static shared memory, a stack that arrays, calls and spills need.
SOURCE = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float a[64];
  #pragma unroll
  for (int i = 0; i < 64; i++) a[i] = x[threadIdx.x + i * 1024];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 64; i++) x[threadIdx.x + (63 - i) * 1024] = a[i] * a[(i * 7) % 64];
}
__device__ __noinline__ float picked(float x, int n) {
  float a[8];
  for (int i = 0; i < 8; i++) a[(i * n) % 8] = x * i;
  return a[n];
}
extern "C" __global__ void calls(float* x, int n) {
  float a[16];
  for (int i = 0; i < 16; i++) a[(i * n) % 16] = x[i];
  x[0] = picked(x[1], n) + a[n];
}
extern "C" __global__ void shares(float* x) {
  __shared__ float s[300];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[255 - threadIdx.x];
}
__constant__ float table[100];
extern "C" __global__ void looks_up(double* x, int n) { x[n] = table[n] * 3.14159265358979; }
"""
FAKE = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release {version}, V{version}.88';;
  --list-gpu-code) printf '{archs}\\n';;
  *) printf '%s' '{message}' >&2; exit 1;;
esac
"""


def fake(folder: Path, version: str = "12.0", archs: str = r"sm_80\nsm_90", message: str = "") -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(FAKE.format(version=version, archs=archs, message=message))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def code() -> CudaCode:
    return compile_fatbin(SOURCE, ARCHS)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without nvcc; its CUDA_HOME is a folder that does not exist yet."""
    home = tmp_path / "toolkit"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(module, "_TOOLKIT", str(tmp_path / "absent"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for name in ("CUDA_PATH", "TVM_TERNARY_NVCC"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_each_architecture_has_machine_code_and_the_newest_one_ptx(code: CudaCode) -> None:
    found = [(entry.kind, entry.arch) for entry in read_fatbin(code.fatbin)]
    assert sorted(found) == sorted([("ptx", ARCHS[-1]), *(("elf", arch) for arch in ARCHS)])
    assert {row.arch for row in code.kernels} == set(ARCHS)
    assert {row.kernel for row in code.kernels} == {"spills", "calls", "shares", "looks_up"}


def test_the_numbers_read_from_machine_code_are_those_that_ptxas_prints(tmp_path: Path, code: CudaCode) -> None:
    """Without a fatbin in between, for the oldest and the newest format of machine code."""
    nvcc = find_nvcc(ARCHS)
    (tmp_path / "k.cu").write_text(SOURCE)
    flags = ("-std=c++17", "-O3", "--maxrregcount", "255", "-Xptxas", "-v", "--cubin", "-o", "k.cubin")
    for arch in (ARCHS[0], ARCHS[-1]):
        command = [nvcc.path, *flags, f"-arch={arch}", "k.cu"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stderr
        for row in (row for row in code.kernels if row.arch == arch):
            part = told.partition(f"entry function '{row.kernel}'")[2].partition("Compile time")[0]

            def number(pattern: str, part: str = part) -> int:
                return sum(map(int, re.findall(pattern, part)))

            assert row.registers == number(r"Used (\d+) registers")
            assert row.shared_bytes == number(r"(\d+) bytes smem")
            assert row.local_bytes == number(r"(\d+) bytes cumulative stack size")
            assert row.spill_bytes == number(r"(\d+) bytes spill stores") == number(r"(\d+) bytes spill loads")
            # From sm_90 on ptxas says nothing of the constants that every kernel has.
            if arch == "sm_80":
                assert row.constant_bytes == number(r"(\d+) bytes cmem\[[02]\]")


def test_the_kernels_use_what_they_were_written_to_use(code: CudaCode) -> None:
    by_name = {row.kernel: row for row in code.kernels if row.arch == "sm_90"}
    assert by_name["spills"].spill_bytes > 0
    assert by_name["spills"].local_bytes > 0
    assert by_name["calls"].spill_bytes == 0
    assert by_name["calls"].local_bytes >= 4 * (16 + 8)
    assert {name: row.shared_bytes for name, row in by_name.items() if row.shared_bytes} == {"shares": 1200}
    assert all(row.registers > 0 and row.constant_bytes > 0 for row in code.kernels)


def test_the_same_source_gives_the_same_bytes(code: CudaCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert compile_fatbin(SOURCE, ARCHS).fatbin == code.fatbin
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_source_is_one_line() -> None:
    with pytest.raises(HostError, match=r'kernels.cu\(2\): error: identifier "absent" is undefined') as caught:
        compile_fatbin('\nextern "C" __global__ void k(int* x) { x[0] = absent; x[1] = missing; }', ("sm_80",))
    assert "\n" not in str(caught.value)


def test_too_much_static_shared_memory_is_one_line() -> None:
    body = "__shared__ int s[20000]; s[x[0]] = 1; __syncthreads(); x[1] = s[x[2]];"
    source = f'extern "C" __global__ void k(int* x) {{ {body} }}'
    with pytest.raises(OptionError) as caught:
        compile_fatbin(source, ("sm_80",))
    assert str(caught.value) == (
        "kernel k: needs 80000 bytes of static shared memory a block, more than the 49152 that there are; "
        "choose smaller tiles, or dynamic shared memory"
    )


def test_no_nvcc_is_one_line(alone: Path) -> None:
    with pytest.raises(HostError, match=r"nvcc: not found; .* pip install 'tvm-ternary\[cuda\]'"):
        find_nvcc()


def test_one_that_is_too_old_is_told_with_what_it_can(alone: Path) -> None:
    path = fake(alone)
    assert find_nvcc(["sm_90"]) == module.Nvcc(path, "12.0.88", ("sm_80", "sm_90"))
    with pytest.raises(HostError) as caught:
        find_nvcc(["sm_90", "sm_100", "sm_120"])
    told = f"{path}: version 12.0.88 cannot compile for sm_100, sm_120; it can for sm_80, sm_90; install"
    assert str(caught.value).startswith(told)


def test_a_newer_one_is_taken_where_the_first_is_too_old_or_broken(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path / "old")
    broken = fake(tmp_path / "broken", archs="")
    new = fake(alone, "13.1", r"sm_80\nsm_100")
    monkeypatch.setenv("PATH", f"{tmp_path / 'old' / 'bin'}")
    assert find_nvcc(["sm_100"]).path == new
    assert find_nvcc(["sm_90"]).version == "12.0.88"
    monkeypatch.setenv("PATH", str(broken.parent))
    assert find_nvcc(["sm_80"]).path == new


def test_the_packages_of_the_extra_are_found(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake(tmp_path / "nvidia" / "cu13", "13.0")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    assert find_nvcc().path == path


def test_the_packages_of_the_extra_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: CudaCode) -> None:
    """As on a machine whose only nvcc is theirs: nothing of a toolkit on the system is used."""
    spec = module.importlib.util.find_spec("nvidia")
    found = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("cu*/bin/nvcc")]
    assert found, "install the extra cuda: make setup"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("TVM_TERNARY_NVCC", str(found[0]))
    for name in ("CUDA_HOME", "CUDA_PATH", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    headers = "\n".join(f"#include <{name}>" for name in HEADERS)
    theirs = compile_fatbin(headers + SOURCE, ARCHS[-1:])
    assert [row.kernel for row in theirs.kernels] == [row.kernel for row in code.kernels if row.arch == ARCHS[-1]]
    assert theirs.version.startswith("13.0.")


# What TVM's code generator may include.
HEADERS = ("cstdint", "type_traits", "cuda.h", "cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h", "mma.h", "cuda/barrier")


@pytest.mark.parametrize("what", ["absent", "a folder", "a text"])
def test_the_variable_names_the_one_to_take(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fake(alone)
    path = tmp_path / what
    if what == "a folder":
        path.mkdir()
    elif what == "a text":
        path.write_text("no program")
        path.chmod(0o755)
    monkeypatch.setenv("TVM_TERNARY_NVCC", str(path))
    with pytest.raises(HostError) as caught:
        find_nvcc()
    assert str(caught.value).startswith(f"{path}: does not run (")
    monkeypatch.setenv("TVM_TERNARY_NVCC", str(fake(tmp_path / "another one", "13.2")))
    assert find_nvcc().version == "13.2.88"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("gcc: not here\nnvcc fatal   : Failed to preprocess host compiler properties.", "; install g++"),
        ("", r"\(exit status 1\)"),
        ("remark: hm\nptxas fatal   : Ptx assembly aborted due to errors", r"\(ptxas fatal : Ptx assembly aborted"),
    ],
)
def test_one_that_fails(alone: Path, message: str, expected: str) -> None:
    fake(alone, message=message)
    with pytest.raises(HostError, match=expected) as caught:
        compile_fatbin("", ("sm_90",))
    assert "\n" not in str(caught.value)
