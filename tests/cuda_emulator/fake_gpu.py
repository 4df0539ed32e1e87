"""A driver whose GPU is the emulator: environments for processes that believe in a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import toolchain
from .errors import EmulatorError
from .source import kernels_of

ROOT = Path(__file__).resolve().parents[2]


def environment(
    *,
    kernels: Sequence[str] = (),
    compute_capability: tuple[int, int] = (8, 0),
    checked: bool = True,
    count: int = 1,
    driver: int = 13000,
    memory: int = 80 << 30,
    name: str = "Emulated GPU",
) -> dict[str, str]:
    """The variables of a process that finds the fake libcuda.so.1 and libcudart.so.13.

    Parameters
    ----------
    kernels : CUDA sources, from which a real image (fatbin, PTX, ELF) gets its kernels, by name, the last source first;
        the image itself is looked at only for a code that runs on the compute capability
    count : how many GPUs there are; 0 is a machine with a driver and no GPU
    driver : the newest CUDA that the driver knows, 13000 for 13.0
    memory : bytes of the GPU's memory
    """
    architecture = compute_capability[0] * 100 + compute_capability[1] * 10
    libraries = [
        toolchain.kernel_library(s, checked=checked, architecture=architecture) for s in kernels if kernels_of(s)
    ]
    major, minor = compute_capability
    settings = f"count={count};major={major};minor={minor};driver={driver};memory={memory};name={name}"
    paths = [str(toolchain.fake_driver_folder()), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(p for p in paths if p),
        "PYTHONPATH": ":".join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p),
        "TT_FAKE_GPU": settings,
        "TT_FAKE_GPU_KERNELS": ":".join(map(str, libraries)),
        toolchain.FOLDER: str(toolchain.folder()),
    }


def python(code: str, env: Mapping[str, str], *arguments: object) -> str:
    """Run Python code in a process of its own and return what it printed.

    Raises
    ------
    EmulatorError
        If it fails; with what it wrote to standard error.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=dict(env), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise EmulatorError(f"exit status {done.returncode}\n{explain(done.stderr)}")
    return done.stdout


def explain(text: str) -> str:
    """Give the reports in a text their source lines, where they name the library that they are about."""
    library = re.search(r" <in (\S+?)>", text)
    if library is None:
        return text
    return toolchain.with_source_lines(text.replace(library[0], ""), Path(library[1]))


def counters(names: Sequence[str]) -> dict[str, int]:
    """In a process with the fake driver: how often it launched and copied since the last `reset_counters`.

    Names: launches (of kernels, outside of graphs), graphs (instantiated), graph_launches, graph_kernels (launches
    inside of graphs), copies_to_device, copies_from_device, copies_on_device, allocations, modules.
    """
    import ctypes

    library = ctypes.CDLL("libtt_device.so")
    library.tt_fake_counter.restype = ctypes.c_int64
    return {name: library.tt_fake_counter(name.encode()) for name in names}


def reset_counters() -> None:
    """In a process with the fake driver: start to count from 0."""
    import ctypes

    ctypes.CDLL("libtt_device.so").tt_fake_reset_counters()
