"""Records made by hand, and logs of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm_ternary.schedule.records import ABOUT, FORMAT, RECORDS, About, Record

WORKLOAD = "00000000000000aa"
OTHER = "00000000000000bb"
TARGET = "x86-64-v2"


def trace(**decisions: int) -> Any:
    """The trace that sampling ``decisions`` leaves; each is the second of three candidates."""
    steps: list[Any] = [["GetSBlock", [], ["root", "main"], ["b0"]]]
    decided = []
    for number, (name, value) in enumerate(decisions.items(), 1):
        decided.append([len(steps), 1])
        steps.append(["SampleCategorical", [], [[-1, value, -2], [0.25, 0.5, 0.25]], [f"v{number}"]])
        steps.append(["Annotate", ["b0", f"v{number}"], [f"ternary.{name}"], []])
    return [steps, decided]


def trial(seconds: float, *, workload: str = WORKLOAD, rows: int = 1) -> Record:
    return Record(workload, "a task", trace(rows=rows, blocks=2), (seconds * 0.9, seconds, seconds * 2))


def failure(reason: str = "ValueError: no", *, workload: str = WORKLOAD) -> Record:
    return Record(workload, "a task", trace(rows=9, blocks=2), error=reason)


def choice(seconds: float, *, before: float = 1.0, workload: str = WORKLOAD, rows: int = 1) -> Record:
    return Record(workload, "a task", trace(rows=rows, blocks=2), (seconds,), (before,))


def write_log(folder: Path, records: Sequence[Record], *, target: str = TARGET, threads: int = 1, **about: Any) -> Path:
    """Write a log without the code that writes logs."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "target": target, "threads": threads, "tvm": About(target, threads).tvm, **about}
    (folder / ABOUT).write_text(json.dumps(document))
    (folder / RECORDS).write_text("".join(record.line() for record in records))
    return folder
