"""CUDA source to machine code for several architectures, by nvcc. No GPU and no driver are needed.

nvcc comes from the system or from the packages of the extra ``cuda``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_ternary.build.fatbin import FatbinEntry, read_fatbin, read_kernels
from tvm_ternary.errors import HostError, OptionError

_VARIABLE = "TVM_TERNARY_NVCC"
_TOOLKIT = "/usr/local/cuda"
_INSTALL = "install the CUDA toolkit 13 or newer, or pip install 'tvm-ternary[cuda]'"
# Not compressed, so that what is in a library can be looked at; the names of the files are part of nothing then.
# ptxas is asked to be verbose because only its messages tell how much is spilled. Warnings are about generated code.
# Only the preprocessor of the host's compiler is used: one that nvcc does not know yet will do.
_FLAGS = (
    *("--fatbin", "-std=c++17", "-O3", "--no-compress", "--threads", "2", "-Xptxas", "-v"),
    # The assembler would rather spill a register than have one block of threads less on a multiprocessor.
    *("--maxrregcount", "255"),
    *("--disable-warnings", "--allow-unsupported-compiler"),
)
_USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<arch>sm_\w+)'\n"
    r".*Function properties for (?P=kernel)\n"
    r"\s*\d+ bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)
_TOO_MUCH_SHARED = re.compile(r"function '([^']+)' uses too much shared data \((\w+) bytes, (\w+) max\)")


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that runs.

    Parameters
    ----------
    path : Path
    version : str
        Such as ``13.0.88``.
    archs : tuple of str
        Architectures that it makes machine code for, oldest first.
    """

    path: Path
    version: str
    archs: tuple[str, ...]


@dataclass(frozen=True)
class KernelResources:
    """What a kernel uses on an architecture.

    Parameters
    ----------
    kernel, arch : str
    registers : int
        A thread.
    shared_bytes : int
        Static shared memory a block; what is asked for at launch comes on top.
    local_bytes : int
        Stack a thread: local arrays and spilled registers.
    spill_bytes : int
        Stores of spilled registers or loads of them, whichever are more, in bytes a thread.
    constant_bytes : int
        Constant memory, arguments included.
    """

    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    local_bytes: int
    spill_bytes: int
    constant_bytes: int


@dataclass(frozen=True)
class CudaCode:
    """Machine code for each architecture and PTX for later ones.

    Parameters
    ----------
    fatbin : bytes
    kernels : tuple of KernelResources
        By architecture, then name.
    version : str
        Of nvcc.
    """

    fatbin: bytes
    kernels: tuple[KernelResources, ...]
    version: str


def find_nvcc(archs: Sequence[str] = ()) -> Nvcc:
    """Give the first nvcc that runs and knows these architectures.

    It is looked for on the ``PATH``, in ``CUDA_HOME`` and ``CUDA_PATH``, in ``/usr/local/cuda`` and in the packages of
    the extra ``cuda``. Where the variable ``TVM_TERNARY_NVCC`` names one, that one it must be.

    Raises
    ------
    HostError
        If there is none, none runs, or none knows all architectures; the message lists what the best one can.
    """
    broken, old = [], []
    for path in _candidates():
        try:
            found = _ask(path.absolute())
        except HostError as error:
            broken.append(error)
            continue
        if set(archs) <= set(found.archs):
            return found
        old.append(found)
    if old:
        best = max(old, key=lambda nvcc: len(set(archs) & set(nvcc.archs)))
        missing = ", ".join(arch for arch in archs if arch not in best.archs)
        problem = f"version {best.version} cannot compile for {missing}; it can for {', '.join(best.archs)}"
        raise HostError(str(best.path), problem, _INSTALL)
    if broken:
        raise broken[0]
    places = f"{_VARIABLE}, the PATH, CUDA_HOME, {_TOOLKIT} and this Python's packages"
    raise HostError("nvcc", f"not found; looked at {places}", _INSTALL)


def compile_fatbin(source: str, archs: Sequence[str], nvcc: Nvcc | None = None) -> CudaCode:
    """Compile CUDA source for each architecture, and to PTX for those after the newest one.

    The same source, architectures and version of nvcc give the same bytes, whatever the folder.

    Parameters
    ----------
    source : str
        What TVM generates: kernels that are ``extern "C"``.
    archs : sequence of str
        Such as ``("sm_80", "sm_90")``, ascending.
    nvcc : Nvcc, optional
        From `find_nvcc`.

    Raises
    ------
    HostError
        If there is no nvcc for these architectures, or it refuses the source.
    OptionError
        If a kernel needs more static shared memory than there is.
    """
    compiler = nvcc or find_nvcc(archs)
    # Names without a folder, because nvcc writes them into what it makes.
    with tempfile.TemporaryDirectory(prefix="tvm-ternary-") as folder:
        Path(folder, "kernels.cu").write_text(source, encoding="utf-8")
        command = [str(compiler.path), *_FLAGS, *_targets(archs), "-o", "kernels.fatbin", "kernels.cu"]
        result = _run(command, folder)
        if result.returncode != 0:
            raise _compile_error(compiler, result)
        fatbin = Path(folder, "kernels.fatbin").read_bytes()
    return CudaCode(fatbin, _resources(compiler, read_fatbin(fatbin), result.stderr), compiler.version)


def _candidates() -> Iterator[Path]:
    if named := os.environ.get(_VARIABLE):
        yield Path(named)
        return
    if found := shutil.which("nvcc"):
        yield Path(found)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _TOOLKIT]
    # The packages all unpack into one folder a major version, laid out as the toolkit is.
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        homes += sorted(map(str, Path(folder).glob("cu[0-9][0-9]")), reverse=True)
    for home in filter(None, homes):
        path = Path(home, "bin", "nvcc")
        if path.is_file():
            yield path


def _ask(path: Path) -> Nvcc:
    """Run an nvcc to see what it is."""
    told = _run([str(path), "--version"])
    codes = _run([str(path), "--list-gpu-code"])
    version = re.search(r"\bV(\d+\.\d+\.\d+)", told.stdout)
    archs = re.findall(r"^sm_\d+$", codes.stdout, re.MULTILINE)
    if told.returncode or codes.returncode or version is None or not archs:
        line = next(iter((told.stderr + codes.stderr).strip().splitlines()), "it says nothing of its version")
        raise HostError(str(path), f"does not run as nvcc does ({line})", _INSTALL)
    return Nvcc(path, version[1], tuple(sorted(archs, key=_number)))


def _run(command: Sequence[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run nvcc. Its own files go to the folder, too, by a name without spaces, which it cannot bear in a path."""
    environment = {**os.environ, "LC_ALL": "C", **({"TMPDIR": "."} if folder else {})}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, cwd=folder, env=environment
        )
    except OSError as error:
        raise HostError(command[0], f"does not run ({error.strerror or error})", _INSTALL) from error


def _targets(archs: Sequence[str]) -> list[str]:
    numbers = [_number(arch) for arch in archs]
    codes = [(number, f"sm_{number}") for number in numbers] + [(max(numbers), f"compute_{max(numbers)}")]
    return [word for number, code in codes for word in ("-gencode", f"arch=compute_{number},code={code}")]


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _resources(nvcc: Nvcc, entries: Sequence[FatbinEntry], messages: str) -> tuple[KernelResources, ...]:
    """Numbers from the machine code, and what is spilled, which only the messages tell."""
    told = {(match["kernel"], match["arch"]): match for match in _USAGE.finditer(messages)}
    resources = []
    for entry in entries:
        for kernel in read_kernels(entry.data) if entry.kind == "elf" else ():
            match = told.get((kernel.name, entry.arch))
            if match is None or int(match["registers"]) != kernel.registers:
                problem = f"its messages do not fit the code of {kernel.name} for {entry.arch}"
                raise HostError(str(nvcc.path), problem, f"version {nvcc.version} is not known here; use 13.0")
            resources.append(
                KernelResources(
                    kernel.name,
                    entry.arch,
                    kernel.registers,
                    kernel.shared_bytes,
                    kernel.local_bytes,
                    max(int(match["stores"]), int(match["loads"])),
                    kernel.constant_bytes,
                )
            )
    return tuple(sorted(resources, key=lambda row: (_number(row.arch), row.kernel)))


def _compile_error(nvcc: Nvcc, result: subprocess.CompletedProcess[str]) -> HostError | OptionError:
    if match := _TOO_MUCH_SHARED.search(result.stderr):
        needed, most = int(match[2], 0), int(match[3], 0)
        problem = f"needs {needed} bytes of static shared memory a block, more than the {most} that there are"
        return OptionError(f"kernel {match[1]}", problem, "choose smaller tiles, or dynamic shared memory")
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    telling = next((line for line in lines if re.search(r"\b(error|fatal)\b|No such file", line)), lines[0])
    no_compiler = "host compiler" in result.stderr
    hint = "install g++, which nvcc needs" if no_compiler else "the fault is in the generated code; please report it"
    return HostError(str(nvcc.path), f"could not compile the kernels ({telling})", hint)
