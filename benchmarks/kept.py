"""Rows that take minutes each: finished ones are kept as lines of JSON and not measured again."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def measure_missing(
    results: Path, rows: Iterable[str], only: Sequence[str] | None, measure: Callable[[str], list[Line]]
) -> list[Line]:
    """Measure the rows that have no lines yet, or those named again, and keep all lines of known rows.

    Parameters
    ----------
    results : Path
        A file of lines, whose ``row`` says where they belong; written after every row.
    rows : iterable of str
    only : sequence of str, optional
    measure : callable
        Name of a row -> its lines.
    """
    lines = list(map(json.loads, results.read_text().splitlines())) if results.exists() else []
    done = {name: [line for line in lines if line["row"] == name] for name in rows}
    for name in only or [name for name, own in done.items() if not own]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        done[name] = [{"row": name, **line} for line in measure(name)]
        results.write_text("".join(json.dumps(line) + "\n" for own in done.values() for line in own))
    return [line for own in done.values() for line in own]


def bench_lines(*arguments: str) -> list[Line]:
    """What ``tvm-ternary bench`` appends with ``--json``. A failure is said; what was written until then counts."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "lines.jsonl"
        command = [sys.executable, "-m", "tvm_ternary", "bench", *arguments, "--json", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            print(f"  {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return list(map(json.loads, output.read_text().splitlines())) if output.exists() else []
