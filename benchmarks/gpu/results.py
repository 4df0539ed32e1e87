"""Result lines: one JSON object each, written as they come, the machine, the versions and the commit in every one."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Cases
from tvm_ternary.bench.machine import cpu_name

FACTS = "facts.json"
_VERSIONS = ("numpy", "triton", "gemlite", "bitblas")


class Results:
    """A file of lines about one GPU.

    Parameters
    ----------
    out : Path
        Folder.
    gpu : str
        As the driver names it; the file's name is made of it.
    facts : dict
        Of the folder, from `known_facts`; each line says them, and more may be added.
    """

    def __init__(self, out: Path, gpu: str, facts: dict[str, Any]) -> None:
        short = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.table = out / f"cuda-{short}.jsonl", out / f"cuda-{short}.md"
        built = {key: value for key, value in facts.items() if key not in ("floors", "cases")}
        self.facts = {"gpu": gpu, **host_facts(), **built}

    def begin(self) -> None:
        """Empty the file."""
        self.path.write_text("")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind that were written so far."""
        lines = map(json.loads, self.path.read_text().splitlines()) if self.path.exists() else ()
        return [line for line in lines if line["kind"] == kind]

    def add(self, kind: str, **values: Any) -> None:
        """Add a line; it counts even if the next step brings the process down."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"kind": kind, **values, **self.facts}) + "\n")


def known_facts(folder: Path) -> dict[str, Any]:
    """What the builder wrote down: commit, versions, cases, and floors by case and number of rows."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return facts


def known_cases(folder: Path) -> Cases:
    """What was built to be done."""
    lists = known_facts(folder)["cases"]
    checked, timed, models = (tuple((a, b, t) for a, b, t in lists[key]) for key in ("checked", "timed", "models"))
    sizes, words = tuple((batch, length) for batch, length in lists["free_sizes"]), lists["words"]
    rows, timed_rows = (tuple(lists[key]) for key in ("checked_rows", "timed_rows"))
    attention = (tuple(map(tuple, lists[key])) for key in ("caches", "prompts", "chunks"))
    return Cases(checked, rows, timed, timed_rows, models, sizes, words, *attention)


def host_facts() -> dict[str, Any]:
    """When, on what processor and system, with which packages."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
