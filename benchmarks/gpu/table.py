"""The table of figures, from result lines: ``python -m benchmarks.gpu.table [LINES]``; without any, not measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.gpu.cases import ASKED_CACHE, REQUIRED, cache_name

NOT_MEASURED = "not measured"
Line = dict[str, Any]


def render(lines: Path | None) -> str:
    """Markdown: what is asked, what was measured, whether it is met; then every check and time."""
    rows = [json.loads(text) for text in lines.read_text().splitlines()] if lines is not None else []
    table = [
        "| asked on an H100, device time | at least | least measured | geometric mean | |",
        "|---|---|---|---|---|",
    ]
    for key, text, least in REQUIRED:
        found = _FIGURES[key](rows)
        cells = [NOT_MEASURED, "", ""]
        if found:
            met = "met" if min(found) >= least else "not met"
            cells = [f"{min(found):.2f}", f"{geometric_mean(found):.2f}", met]
        table.append(f"| {text} | {least:g} | {' | '.join(cells)} |")
    parts = [
        ["# CUDA"],
        _machine(rows),
        table,
        _checks(rows),
        _models(rows),
        _times(rows),
        _attention(rows),
        _prompts(rows),
        _peers(rows),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _machine(rows: Sequence[Line]) -> list[str]:
    if not rows:
        return ["No GPU was at hand."]
    line = rows[-1]
    card, ceilings = line.get("card", {}), _of(rows, "ceilings")
    said = [line["gpu"], f"driver {card.get('driver_version', 'unknown')}"]
    said += [f"torch {line['torch']}"] if "torch" in line else []
    text = [", ".join([*said, f"commit {line['commit']}", line["date"]]) + "."]
    if ceilings:
        copied, peak = (ceilings[0][f"{key}_per_second"] / 1e12 for key in ("copy_bytes", "torch_bf16_operations"))
        text.append(f"Measured: copies {copied:.2f} TB/s, read and written; torch bf16 {peak:.0f} T operations/s.")
    return text


def _of(rows: Sequence[Line], kind: str) -> list[Line]:
    return [row for row in rows if row["kind"] == kind]


def _scheme(row: Line) -> str:
    return str(row["case"]).partition("_")[0]


def _copy_shares(rows: Sequence[Line]) -> list[float]:
    """Bytes of weights a second over what a copy moves."""
    copies = [row["copy_bytes_per_second"] for row in _of(rows, "ceilings")]
    large = [
        row["weight_bytes"] / row["seconds"]
        for row in _of(rows, "time")
        if row["m"] == 1 and _scheme(row) in ("t1a8", "t1a16") and row["weight_bytes"] > 16e6
    ]
    return [rate / copies[0] for rate in large] if copies else []


def _over_torch(schemes: Sequence[str], m: Sequence[int]) -> Callable[[Sequence[Line]], list[float]]:
    """torch's time over ours, the preparation of the rows counted, of each shape."""
    return lambda rows: [
        row["torch_bf16"] / row["seconds_with_rows"]
        for row in _of(rows, "time")
        if row["m"] in m and _scheme(row) in schemes
    ]


def _over_eager(rows: Sequence[Line]) -> list[float]:
    return [row["torch_bf16_eager"] / row["seconds"] for row in _of(rows, "model") if row["fixed"]]


def _best_of_torch(row: Line) -> float:
    return float(min(row["torch_bf16_rows"], row["torch_bf16_grouped"]))


def _over_attention(rows: Sequence[Line]) -> list[float]:
    """torch's time over ours, of the cache that is asked for."""
    asked = cache_name(ASKED_CACHE)
    return [_best_of_torch(row) / row["seconds"] for row in _of(rows, "attention") if row["case"] == asked]


def _over_prompts(rows: Sequence[Line]) -> list[float]:
    asked = [row for row in _of(rows, "prompt") if str(row["case"]).startswith("32x8x128_")]
    return [row["torch_bf16"] / row["seconds"] for row in asked]


def _over_peer(name: str) -> Callable[[Sequence[Line]], list[float]]:
    def figure(rows: Sequence[Line]) -> list[float]:
        ours = {(row["case"], row["m"]): row["seconds_with_rows"] for row in _of(rows, "time")}
        theirs = [row for row in _of(rows, "peer") if row["peer"] == name and "seconds" in row]
        return [row["seconds"] / ours[key] for row in theirs if (key := (row["case"], row["m"])) in ours]

    return figure


_FIGURES: dict[str, Callable[[Sequence[Line]], list[float]]] = {
    "copy": _copy_shares,
    "rows1": _over_torch(("t1a8", "t1a16"), (1,)),
    "rows8": _over_torch(("t1a8", "t1a16"), (8, 16)),
    "rows128": _over_torch(("t1a8",), (128,)),
    "rows512": _over_torch(("t1a8",), (512,)),
    "rows4096": _over_torch(("t1a8",), (4096,)),
    "model": _over_eager,
    "attention": _over_attention,
    "prompt": _over_prompts,
    "gemlite": _over_peer("gemlite"),
    "bitblas": _over_peer("bitblas"),
}


def _checks(rows: Sequence[Line]) -> list[str]:
    checks = _of(rows, "check")
    if not rows:
        return []
    wrong = [f"{row['case']} M={row['m']} ({row['wrong']} results)" for row in checks if row["wrong"]]
    kernels = len({row["case"] for row in checks})
    text = [f"Checked: {len(checks)} products by {kernels} kernels; wrong: {', '.join(wrong) or 'none'}."]
    text += [f"compute-sanitizer {row['tool']}: {row['status']}." for row in _of(rows, "sanitizer")]
    text += [f"Error in {row['step']}: {row['error']}." for row in _of(rows, "error")]
    left = [f"{row['case']} M={row['m']}" for row in _of(rows, "left out")]
    return [*text, f"Left out for want of time: {', '.join(left)}."] if left else text


def _models(rows: Sequence[Line]) -> list[str]:
    if not _of(rows, "model check"):
        return []
    times = {row["case"]: row for row in _of(rows, "model")}
    table = [
        "| demo model | relative error | us | torch bf16 eager | torch bf16, CUDA graph |",
        "|---|---|---|---|---|",
    ]
    for row in _of(rows, "model check"):
        error = "failed" if row["error"] is None else f"{row['error']:.1e}"
        line = times.get(row["case"])
        keys = ("seconds", "torch_bf16_eager", "torch_bf16_graph")
        cells = [NOT_MEASURED] * 3 if line is None else [_us(line[key]) for key in keys]
        table.append(f"| {row['case']} | {error} | {' | '.join(cells)} |")
    return table


def _times(rows: Sequence[Line]) -> list[str]:
    found = _of(rows, "time")
    if not found:
        return []
    head = ("matrix", "M", "us", "with rows", "an H100's floor", "torch bf16", "torch int8", "weights, GB/s", "spread")
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found:
        keys = ("seconds", "seconds_with_rows", "floor", "torch_bf16", "torch_int8")
        times = [_us(row[key]) if row.get(key) is not None else "" for key in keys]
        rate = f"{row['weight_bytes'] / row['seconds'] / 1e9:.0f}"
        table.append("| " + " | ".join((row["case"], str(row["m"]), *times, rate, f"{row['spread']:.1%}")) + " |")
    return table


def _attention(rows: Sequence[Line]) -> list[str]:
    found = _of(rows, "attention")
    if not found:
        return []
    head = ("a token over a cache", "us", "to append it", "torch SDPA bf16", "times as fast", "cache, GB/s", "spread")
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found:
        best = _best_of_torch(row)
        times = [_us(row["seconds"]), _us(row["append"]), _us(best), f"{best / row['seconds']:.2f}"]
        rate = f"{row['bytes'] / row['seconds'] / 1e9:.0f}"
        table.append("| " + " | ".join((row["case"], *times, rate, f"{row['spread']:.1%}")) + " |")
    return table


def _prompts(rows: Sequence[Line]) -> list[str]:
    found = _of(rows, "prompt")
    table = [
        "| a prompt | us | torch SDPA bf16 | times as fast | T operations/s | spread |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        ratio, rate = row["torch_bf16"] / row["seconds"], row["operations"] / row["seconds"] / 1e12
        cells = (row["case"], _us(row["seconds"]), _us(row["torch_bf16"]), f"{ratio:.2f}", f"{rate:.0f}")
        table.append("| " + " | ".join((*cells, f"{row['spread']:.1%}")) + " |")
    return table if found else []


def _peers(rows: Sequence[Line]) -> list[str]:
    found = _of(rows, "peer")
    if not found:
        return []
    timed = [row for row in found if "seconds" in row]
    table = ["| peer | matrix | M | us |", "|---|---|---|---|"] if timed else []
    table += [f"| {row['peer']} | {row['case']} | {row['m']} | {_us(row['seconds'])} |" for row in timed]
    why: dict[str, list[str]] = {}
    for row in found:
        if "reason" in row:
            where = f"{row['case']} M={row['m']}" if "case" in row else "all that is missing"
            why.setdefault(f"{row['peer']}: {row['reason']}", []).append(where)
    return [*table, *([""] if table else []), *(f"{reason} ({', '.join(places)})." for reason, places in why.items())]


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    target = given.with_suffix(".md") if given else Path("benchmarks/results/cuda.md")
    target.write_text(render(given))
    print(target)
