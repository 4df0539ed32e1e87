"""The table of figures, from result lines: ``python -m benchmarks.gpu.table [LINES]``; without any, not measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.gpu.cases import REQUIRED

NOT_MEASURED = "not measured"
Line = dict[str, Any]


def render(lines: Path | None) -> str:
    """Markdown: what is asked, what was measured, whether it is met; then every time."""
    rows = [json.loads(text) for text in lines.read_text().splitlines()] if lines is not None else []
    head = "No GPU was at hand." if not rows else _machine(rows[-1])
    table = ["| asked on an H100, device time | at least | measured | |", "|---|---|---|---|"]
    for key, text, least in REQUIRED:
        found = _FIGURES[key](rows)
        cells = (NOT_MEASURED, "") if found is None else (f"{found:.2f}", "met" if found >= least else "not met")
        table.append(f"| {text} | {least:g} | {cells[0]} | {cells[1]} |")
    return "\n".join([f"# CUDA\n\n{head}\n", *table, "", *_times(rows)]) + "\n"


def _machine(line: Line) -> str:
    return f"{line['gpu']}, torch {line.get('torch', 'not used')}, commit {line['commit']}."


def _of(rows: Sequence[Line], kind: str) -> list[Line]:
    return [row for row in rows if row["kind"] == kind]


def _scheme(row: Line) -> str:
    return str(row["case"]).partition("_")[0]


def _copy_share(rows: Sequence[Line]) -> float | None:
    """The smallest share: bytes of weights a second over what a copy moves."""
    copies = [row["bytes_per_second"] for row in _of(rows, "copy")]
    large = [
        row["weight_bytes"] / row["seconds"]
        for row in _of(rows, "time")
        if row["m"] == 1 and _scheme(row) in ("t1a8", "t1a16") and row["weight_bytes"] > 16e6
    ]
    return min(large) / copies[0] if copies and large else None


def _over_torch(schemes: Sequence[str], m: Sequence[int]) -> Callable[[Sequence[Line]], float | None]:
    """Geometric mean over the shapes of torch's time over ours, rows prepared."""

    def figure(rows: Sequence[Line]) -> float | None:
        chosen = [row for row in _of(rows, "time") if row["m"] in m and _scheme(row) in schemes]
        return geometric_mean([row["torch_bf16"] / row["seconds_with_rows"] for row in chosen]) if chosen else None

    return figure


def _models(rows: Sequence[Line]) -> float | None:
    found = [row["torch_bf16_eager"] / row["seconds"] for row in _of(rows, "model")]
    return min(found) if found else None


def _peer(rows: Sequence[Line]) -> float | None:
    """There is no comparison yet: neither package was ever at hand."""
    return None


_FIGURES: dict[str, Callable[[Sequence[Line]], float | None]] = {
    "copy": _copy_share,
    "rows1": _over_torch(("t1a8", "t1a16"), (1,)),
    "rows8": _over_torch(("t1a8", "t1a16"), (8, 16)),
    "rows128": _over_torch(("t1a8",), (128,)),
    "rows4096": _over_torch(("t1a8",), (4096,)),
    "model": _models,
    "gemlite": _peer,
    "bitblas": _peer,
}


def _times(rows: Sequence[Line]) -> list[str]:
    found = _of(rows, "time")
    if not found:
        return []
    table = ["| matrix | M | us | with rows | torch bf16 | weights, GB/s |", "|---|---|---|---|---|---|"]
    for row in found:
        times = (row["seconds"], row["seconds_with_rows"], row["torch_bf16"])
        cells = " | ".join(f"{1e6 * value:.1f}" for value in times)
        table.append(f"| {row['case']} | {row['m']} | {cells} | {row['weight_bytes'] / row['seconds'] / 1e9:.0f} |")
    left = [f"{row['case']} M={row['m']}" for row in _of(rows, "left out")]
    return [*table, "", f"Left out for want of time: {', '.join(left)}."] if left else table


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    target = given.with_suffix(".md") if given else Path("benchmarks/results/cuda.md")
    target.write_text(render(given))
    print(target)
