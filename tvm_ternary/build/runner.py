"""The C++ runner: its source travels in the wheel, its binary is built where there is a compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from tvm_ternary.errors import HostError

SOURCES = Path(__file__).parent / "_runner"
BINARY = "runner"
# In the package's folder, which holds the libraries and headers. The binary looks for libraries where it lies itself.
_ARGUMENTS = (
    *("-std=c++17", "-O2", "-Wall", "-Wextra", "-isystem", "include", "runner.cpp", "-o", BINARY, "-L."),
    *("-Wl,--no-as-needed", "-ltvm_ffi", "-ltvm_runtime", "-ldl", "-Wl,-rpath,$ORIGIN"),
)
_COMPILERS = ("g++", "c++", "clang++")


def find_compiler() -> list[str] | None:
    """Give the command of a C++ compiler: that of the variable ``CXX``, or one on the ``PATH``; None if there is none.

    Raises
    ------
    HostError
        If ``CXX`` names none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named and not shutil.which(named[0]):
        raise HostError("CXX", f"names {named[0]!r}, which is not on the PATH", "name a C++ compiler, or unset it")
    for name in named[:1] or _COMPILERS:
        if path := shutil.which(name):
            return [path, *named[1:]]
    return None


def build_command(compiler: list[str]) -> list[str]:
    """Give the command that builds the runner in a package's folder."""
    return [*compiler, *_ARGUMENTS]


def build_runner(folder: Path, compiler: list[str]) -> None:
    """Build the runner of a package.

    Parameters
    ----------
    folder : Path
        With ``runner.cpp``, ``include`` and the libraries.
    compiler : list of str
        As `find_compiler` gives it.

    Raises
    ------
    HostError
        If the compiler fails.
    """
    command = build_command(compiler)
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        telling = next((line for line in lines if "error" in line), lines[0])
        raise HostError(shlex.join(compiler), f"could not build the runner ({telling})", "name another compiler in CXX")
