"""Builds the emulator, the fake driver and kernels with g++, once for each content.

In a folder that processes share, those of a test run for one: the first one that needs a thing builds it beside its
place and moves it there, and others wait for it.
"""

import atexit
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import EmulatorError
from .source import prepare

NATIVE = Path(__file__).parent / "native"

_EMULATOR_SOURCES = ("block.cpp", "buffers.cpp", "fiber.cpp", "memory.cpp", "warp.cpp")
# What kernel sources include; all that these give is in cuda_shim.h, which is included before.
_EMPTY_HEADERS = (
    "cuda.h",
    "cuda_bf16.h",
    "cuda_fp16.h",
    "cuda_runtime.h",
    "math_constants.h",
    "mma.h",
    "sm_61_intrinsics.h",
)
# No fused multiply-add where the source has none: results don't depend on the machine.
_COMMON = ("-std=c++17", "-fPIC", "-O2", "-ffp-contract=off", "-march=native")


FOLDER = "TT_EMULATOR_FOLDER"
"""The variable that names a process's folder to those that it starts."""


@functools.cache
def folder() -> Path:
    """A temporary folder of this process, or of the one that started it; gone when that one ends."""
    inherited = os.environ.get(FOLDER)
    if inherited:
        return Path(inherited)
    made = Path(tempfile.mkdtemp(prefix="cuda-emulator-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _built(place: Path, build: Callable[[Path], None]) -> Path:
    """A file or folder that one process builds, by the path it is given."""
    if not place.exists():
        with open(f"{place}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another one may have built it meanwhile.
            if not place.exists():
                building = Path(f"{place}.building")
                build(building)
                building.rename(place)
    return place


def gxx(arguments: Sequence[object]) -> None:
    """Run g++; raises EmulatorError with what it said."""
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(f"g++ refuses the source:\n{done.stderr[:6000]}")


@functools.cache
def emulator_library() -> Path:
    """Path of libtt_emulator.so: threads, warps, memory. Built in seconds, once."""

    def build(library: Path) -> None:
        sources = [NATIVE / name for name in _EMULATOR_SOURCES]
        gxx([*_COMMON, "-shared", "-Wl,-soname,libtt_emulator.so", *sources, "-o", library])

    return _built(folder() / "libtt_emulator.so", build)


@functools.cache
def fake_driver_folder() -> Path:
    """Folder with libcuda.so.1 and libcudart.so.13, whose device is the emulator."""
    emulator_library()

    def build(made: Path) -> None:
        made.mkdir(exist_ok=True)
        link = [f"-L{folder()}", "-l:libtt_emulator.so", f"-Wl,-rpath,{folder()}"]
        device = [NATIVE / "device.cpp", f"-I{NATIVE}"]
        gxx([*_COMMON, "-shared", "-Wl,-soname,libtt_device.so", *device, *link, "-o", made / "libtt_device.so"])
        link += [f"-L{made}", "-l:libtt_device.so", "-Wl,-rpath,$ORIGIN"]
        for name, source in (("libcuda.so.1", "driver.cpp"), ("libcudart.so.13", "runtime.cpp")):
            script = [f"-Wl,--version-script,{NATIVE / 'cudart.map'}"] if source == "runtime.cpp" else []
            gxx([*_COMMON, "-shared", f"-Wl,-soname,{name}", *script, NATIVE / source, *link, "-o", made / name])

    return _built(folder() / "driver", build)


# A loop that became a call of memset would not be traced.
_KERNEL_FLAGS = (
    *_COMMON,
    "-w",
    "-g1",
    "-fvisibility=hidden",
    "-fno-threadsafe-statics",
    "-fno-tree-loop-distribute-patterns",
    "-DTVM_TERNARY_EMULATED",
    "-D__CUDACC_VER_MAJOR__=13",
)
_TRACED_FLAGS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")


@functools.cache
def _shim(checked: bool) -> tuple[object, ...]:
    """Flags to compile a kernel with: those of the language, and the shim, which is compiled once ahead of all."""

    def touch_all(made: Path) -> None:
        made.mkdir(exist_ok=True)
        for header in _EMPTY_HEADERS:
            (made / header).touch()

    include = _built(folder() / "include", touch_all)
    flags = (*_KERNEL_FLAGS, *(_TRACED_FLAGS if checked else ()), f"-I{include}", f"-I{NATIVE}")

    def precompile(made: Path) -> None:
        made.mkdir(exist_ok=True)
        shutil.copy(NATIVE / "cuda_shim.h", made)
        gxx([*flags, "-x", "c++-header", made / "cuda_shim.h", "-o", made / "cuda_shim.h.gch"])

    return (*flags, "-include", _built(folder() / ("traced" if checked else "plain"), precompile) / "cuda_shim.h")


def kernel_library(source: str, *, checked: bool, architecture: int) -> Path:
    """Compile a CUDA source to a shared object with the table `tt_kernels`.

    Parameters
    ----------
    checked : trace every access to memory (g++ -fsanitize=thread, whose calls the emulator answers itself)
    architecture : the value of __CUDA_ARCH__, 800 for sm_80
    """
    key = hashlib.sha256(f"{checked} {architecture} {source}".encode()).hexdigest()[:24]
    path = folder() / f"kernels-{key}.so"
    emulator_library()

    def build(library: Path) -> None:
        given, prepared, compiled = (path.with_suffix(suffix) for suffix in (".cu", ".cpp", ".o"))
        given.write_text(source)
        prepared.write_text(prepare(source, given))
        gxx([*_shim(checked), f"-D__CUDA_ARCH__={architecture}", "-c", prepared, "-o", compiled])
        # Not linked with -fsanitize=thread, which would bring in libtsan.
        gxx(["-shared", compiled, f"-L{folder()}", "-l:libtt_emulator.so", f"-Wl,-rpath,{folder()}", "-o", library])
        compiled.unlink()

    return _built(path, build)


def with_source_lines(message: str, library: Path) -> str:
    """Replace `<pc 0x...>` in a report by the line of the kernel's source."""

    def line_of(match: re.Match[str]) -> str:
        done = subprocess.run(["addr2line", "-e", str(library), match.group(1)], capture_output=True, text=True)
        name, _, number = done.stdout.split(" ")[0].strip().rpartition(":")
        # Lines are those of the source also where the name is that of the file made from it.
        if done.returncode or not number.isdigit() or Path(name).stem != library.stem:
            return ""
        text = library.with_suffix(".cu").read_text().splitlines()[int(number) - 1].strip()
        return f" (line {number}: `{text[:160]}`)"

    return re.sub(r" <pc (0x[0-9a-f]+)>", line_of, message)


assert platform.system() == "Linux", "the emulator knows Linux only"
