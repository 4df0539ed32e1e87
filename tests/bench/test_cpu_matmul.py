"""The script of the whole benchmark, on a tiny shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tvm_ternary.bench.lines import read_lines

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "cpu_matmul.py"


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--shapes", "64x256", "--rows", "9", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_lines_tables_and_pictures_of_all_parts(tmp_path: Path) -> None:
    first = script("--threads", "1", "--output", tmp_path)
    assert first.returncode == 0, first.stderr
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert files.keys() == {".jsonl", ".md", ".png", ".svg"}
    alone = read_lines(files[".jsonl"])
    assert {one.threads for one in alone.measurements} == {1}
    assert {one.scheme for one in alone.measurements} >= {"t1a8", "t1a8g128", "t2a8", "t1a32", "t1a1"}
    # Another part leaves the first as it was.
    second = script("--threads", "1,2", "--only", "threads-2", "--output", tmp_path)
    assert second.returncode == 0, second.stderr
    both = read_lines(files[".jsonl"])
    assert [one for one in both.measurements if one.threads == 1] == list(alone.measurements)
    assert {one.threads for one in both.measurements} == {1, 2}
    text = files[".md"].read_text()
    assert ", 1 thread\n" in text
    assert ", 2 threads\n" in text
    assert "best peer's" in text


def test_an_unknown_part_is_one_line(tmp_path: Path) -> None:
    result = script("--threads", "1", "--only", "gpu", "--output", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "--only: no part gpu; expected some of threads-1\n"
