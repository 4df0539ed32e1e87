"""Functions compiled by TVM, linked with ``harness.c`` to a program of their own, and run there on numpy arrays."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi.libinfo

from tests.ternary_matmul import build
from tvm_ternary.target import Target

SOURCES = Path(__file__).parent
_TYPE_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's


class ProgramError(Exception):
    """The program ended with an error; the text is what it wrote to stderr."""


class Program:
    """A statically linked program that holds compiled functions and none of TVM's runtime.

    Parameters
    ----------
    functions : mapping of str to PrimFunc
        Each is linked in under its name.
    target : Target
        What they are compiled for.
    folder : Path
        Where the object file, the program and the arrays that it reads and writes are put.
    compiler : str
        A C compiler for the target.
    runner : sequence of str
        What to put before the program's name, such as an emulator.
    sources : sequence of str
        Further C files of this folder to link in.
    """

    def __init__(
        self,
        functions: Mapping[str, tvm.tirx.PrimFunc],
        target: Target,
        folder: Path,
        *,
        compiler: str = "cc",
        runner: Sequence[str] = (),
        sources: Sequence[str] = (),
    ) -> None:
        self.folder, self.runner, self.path = folder, tuple(runner), folder / "program"
        self.library = build(functions, target)
        self.library.mod.write_to_file(str(folder / "functions.o"), "o")
        names = " ".join(f"F({name})" for name in functions)
        includes = {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}
        compile_sources(
            compiler,
            [SOURCES / name for name in ("harness.c", *sources)],
            self.path,
            f"-DFUNCTIONS={names}",
            *(f"-I{path}" for path in sorted(includes)),
            str(folder / "functions.o"),
        )

    def __call__(self, name: str, *arrays: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """What all arrays hold after the function was called with them.

        Raises
        ------
        ProgramError
            If it ended with an error.
        """
        operands, results = self.folder / "operands", self.folder / "results"
        with operands.open("wb") as file:
            file.write(np.int32(len(arrays)).tobytes())
            for array in arrays:
                kind, bits = _TYPE_CODES[array.dtype.kind], 8 * array.dtype.itemsize
                file.write(np.array([kind, bits, array.ndim], np.int32).tobytes())
                file.write(np.array(array.shape, np.int64).tobytes())
                file.write(array.tobytes())
        run_program([*self.runner, str(self.path), name, str(operands), str(results)])
        data, start, after = results.read_bytes(), 0, []
        for array in arrays:
            after.append(np.frombuffer(data, array.dtype, array.size, start).reshape(array.shape))
            start += array.nbytes
        assert start == len(data)
        return after


def compile_sources(compiler: str, sources: Sequence[Path], program: Path, *flags: str) -> None:
    """Compile and link C files, statically: then a foreign architecture's libraries need not be found to run it."""
    paths = [str(source) for source in sources]
    run_program([compiler, "-std=gnu11", "-O2", "-Wall", "-static", "-pthread", *paths, *flags, "-o", str(program)])


def run_program(command: Sequence[str]) -> None:
    """Run a program that must succeed.

    Raises
    ------
    ProgramError
        If it did not.
    """
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=300)
    if result.returncode != 0:
        raise ProgramError(f"{command[0]}: status {result.returncode}: {result.stderr.strip()}")
