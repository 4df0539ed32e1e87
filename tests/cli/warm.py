"""The command line in processes forked from one that has TVM already: importing it is most of what a short call takes.

They are processes of their own in all else: they have their own environment, folder, output, signals and exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["onnxruntime", "tvm_ternary.compiler", "tvm_ternary.evaluation", "tvm_ternary.tuning"])


def run(arguments: Sequence[str], environment: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end.

    Raises
    ------
    subprocess.TimeoutExpired
        It takes more than ``timeout`` seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _CONTEXT.Process(target=_answer, args=(list(arguments), dict(environment), out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read_text(), err.read_text())


def _answer(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """Be the process: what it writes lies in two files, as its exit status says how it ended."""
    for path, stream in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    from tvm_ternary.cli import main

    sys.exit(main(arguments))
