"""No kernel reads or writes outside its arrays: they run with unreadable memory right behind each."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.kernels.guard_pages", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_kernels_stay_within_their_arrays() -> None:
    done = run()
    assert done.stdout.endswith("done\n"), f"exit {done.returncode} in: {done.stdout.splitlines()[-1:]}\n{done.stderr}"


def test_a_read_past_the_end_would_be_noticed() -> None:
    done = run("overrun")
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout == "reading past the end\n"
