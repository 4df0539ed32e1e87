"""What a model costs before its second run: time and memory of compiling, and time to the first result.

Each is measured in a process of its own, because a process that has compiled once keeps what it needed for it:

    python -m tvm_ternary.bench.model_costs compile OPTIONS.json
    python -m tvm_ternary.bench.model_costs first OPTIONS.json

prints a line of JSON. Peak memory is what the kernel counted for the process (``VmHWM``), less what it held once TVM
was imported and nothing compiled.

The first result is a call of `tvm_ternary.load` and one of `Module.run`, all of it: TVM's runtime library loaded, the
file checked, inputs copied, the run itself with its large batch, nothing warm but the file in the system's memory. What
reading that file takes, weights that lie beside it included, is measured before in the same process and taken off.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvm_ternary.errors import HostError, TernaryError

_STATUS = Path("/proc/self/status")
# One process may be given memory that a virtual machine has never touched, which takes it ten times as long to fill.
_PROCESSES = 3


@dataclass(frozen=True)
class Costs:
    """What compiling and loading took.

    Attributes
    ----------
    seconds : float
        Of compiling, from the model's file to the library.
    stages : dict of str to float
        Seconds by stage.
    peak_bytes, base_bytes : int
        Most memory of the compiling process, and what it held before it began.
    model_bytes : int
        All weights in float32, the yardstick for memory.
    library_bytes : int
        Size of the ``.so``.
    """

    seconds: float
    stages: dict[str, float]
    peak_bytes: int
    base_bytes: int
    model_bytes: int
    library_bytes: int

    @property
    def memory_ratio(self) -> float:
        """Peak memory beyond the base, over the float model."""
        return (self.peak_bytes - self.base_bytes) / max(self.model_bytes, 1)

    def as_json(self) -> dict[str, Any]:
        """All fields and the ratio."""
        return {**asdict(self), "memory_ratio": self.memory_ratio}


def compile_apart(model: Path, output: Path, options: Mapping[str, Any]) -> Costs:
    """Compile a model in a process of its own.

    Parameters
    ----------
    model, output : Path
    options : mapping
        What `tvm_ternary.compile` takes by keyword; values that JSON holds.

    Raises
    ------
    TernaryError
        What the compiler refuses, in its words.
    HostError
        If the process is killed.
    """
    return Costs(**_apart("compile", {"model": str(model), "output": str(output), "options": dict(options)}))


def first_result_apart(library: Path, inputs: Path, threads: int) -> float:
    """Seconds from loading a library to its first result, beyond reading its file: the median of three processes.

    Parameters
    ----------
    library : Path
    inputs : Path
        ``.npz`` with the inputs of one run.
    threads : int
    """
    options = {"library": str(library), "inputs": str(inputs), "threads": threads}
    found = [_apart("first", options) for _ in range(_PROCESSES)]
    return float(statistics.median(one["seconds"] - one["reading"] for one in found))


def _apart(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, task, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return found
    reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
    if result.returncode == _REFUSED:
        raise TernaryError(*json.loads(reason))
    raise HostError(f"the process for {task!r}", f"ended early ({reason})", "look at the memory that is left")


_REFUSED = 2


def _compile(model: str, output: str, options: dict[str, Any]) -> dict[str, Any]:
    from tvm_ternary import compiler

    base = _memory("VmHWM")
    started = time.perf_counter()
    artifact = compiler.compile(model, output, **options)
    seconds = time.perf_counter() - started
    costs = Costs(
        seconds=seconds,
        stages=artifact.seconds,
        peak_bytes=_memory("VmHWM"),
        base_bytes=base,
        model_bytes=artifact.manifest.sizes.weights_before,
        library_bytes=artifact.path.stat().st_size,
    )
    return asdict(costs)


def _first(library: str, inputs: str, threads: int) -> dict[str, Any]:
    import numpy as np

    from tvm_ternary.runtime.artifact import read_artifact
    from tvm_ternary.runtime.module import load

    with np.load(inputs) as arrays:
        feeds = dict(arrays)
    files = [Path(library)]
    if beside := read_artifact(library).manifest.weights.file:
        files.append(files[0].with_name(beside))
    started = time.perf_counter()
    for file in files:
        file.read_bytes()
    reading = time.perf_counter() - started
    started = time.perf_counter()
    load(library, threads=threads).run(None, feeds)
    return {"seconds": time.perf_counter() - started, "reading": reading}


def _memory(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _main(task: str, options: str) -> int:
    try:
        work = _compile if task == "compile" else _first
        print(json.dumps(work(**json.loads(options))))
    except TernaryError as error:
        print(json.dumps([error.subject, error.problem, error.hint]), file=sys.stderr)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
