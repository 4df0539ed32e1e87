"""compute-sanitizer over each kind of kernel, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck", "initcheck")
_FOUND = 9
_MOST_SECONDS = 100.0
_TOOLKIT = Path("/usr/local/cuda/bin")


def find() -> str | None:
    """The program: on the ``PATH``, or in CUDA's own folder."""
    return shutil.which(TOOL) or shutil.which(TOOL, path=str(_TOOLKIT))


def sanitize(folder: Path, out: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """A line for each check: its status, what it said, whether something is wrong.

    Parameters
    ----------
    folder : Path
        What was built.
    out : Path
        Where results go; those of these runs go to a folder that is removed.
    seconds : float
        For all of them. A check that does not come to its end says so; that is nothing wrong.
    """
    program = find()
    if program is None:
        yield {"tool": "all", "status": "not installed", "said": "", "wrong": False}
        return
    share = min(_MOST_SECONDS, seconds / len(CHECKS))
    for check in CHECKS:
        if share < 1:
            yield {"tool": check, "status": "no time was left", "said": "", "wrong": False}
            continue
        with tempfile.TemporaryDirectory(dir=out) as temporary:
            command = [program, "--tool", check, "--error-exitcode", str(_FOUND), sys.executable]
            command += ["-m", "benchmarks.gpu.phases", "small-kernels", str(folder), temporary, str(share)]
            yield {"tool": check, **_run(command, share)}


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"status": f"not finished in {seconds:.0f} s", "said": "", "wrong": False}
    said = (done.stdout + done.stderr).strip()[-400:]
    if done.returncode == 0:
        return {"status": "nothing found", "said": said, "wrong": False}
    # Where it does not know the device it ends before the checks; then nothing can be said.
    refused = "not supported" in said.lower()
    status = "refused the device" if refused else f"exit status {done.returncode}"
    return {"status": status, "said": said, "wrong": not refused}
