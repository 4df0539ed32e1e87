"""Take what was measured elsewhere into a tuning log."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_ternary.errors import OptionError
from tvm_ternary.files import atomic_path
from tvm_ternary.schedule.records import About, Record
from tvm_ternary.tuning.batch.measure import CANDIDATES, Row, digest, read_rows
from tvm_ternary.tuning.log import LogWriter, open_log
from tvm_ternary.tuning.report import TuningReport, make_report

IMPORTS = "imports.json"
"""In a log's folder: which machines its records are from."""


@dataclass(frozen=True)
class Results:
    """What `read_results` has found to be sound.

    Attributes
    ----------
    about : About
        What the log must be of.
    machine, device : str
        Name of the host and of its GPU.
    digest : str
        Of the candidates.
    tasks : mapping of str to list of Record
        The records of each workload, the default's first.
    """

    about: About
    machine: str
    device: str
    digest: str
    tasks: Mapping[str, list[Record]]


def import_results(
    file: str | Path, work_dir: str | Path, notice: Callable[[str], None] = lambda text: None
) -> TuningReport:
    """Record results of exported candidates in a log, which may exist.

    Parameters
    ----------
    file : path
        ``results.jsonl``, beside the ``candidates.jsonl`` that it is of.
    work_dir : path
    notice : callable
        Told of lines of the log that are no records.

    Returns
    -------
    TuningReport
        Of the tasks that were measured. Importing the same file again adds nothing.

    Raises
    ------
    OptionError
        If a file cannot be read, the results are of other candidates, or the log is of another target or TVM.
    OutputError
        If the log cannot be written.
    """
    found = read_results(Path(file))
    with open_log(work_dir, found.about, notice) as log:
        before = len(log.records)
        known = set(map(Record.line, log.records))
        for records in found.tasks.values():
            for record in [*records, *_choice(records)]:
                if record.line() not in known:
                    log.append(record)
        _note_machine(Path(work_dir), found)
        tasks = {records[0].task: _of(log, workload) for workload, records in found.tasks.items()}
        return make_report(str(work_dir), tasks, len(log.records) - before)


def read_results(file: Path) -> Results:
    """Read results and check that they fit the candidates beside them.

    Raises
    ------
    OptionError
        If they do not, with what differs.
    """
    header, rows = read_rows(file)
    source = file.with_name(CANDIDATES)
    if not source.is_file():
        hint = "put the results into the folder that --export-candidates has made"
        raise OptionError(str(file), f"has no {CANDIDATES} beside it", hint)
    exported, candidates = read_rows(source)
    for key in ("target", "tvm"):
        if header.get(key) != exported.get(key):
            problem = f"is of {key} {header.get(key)}; {CANDIDATES} beside it is of {exported.get(key)}"
            raise OptionError(str(file), problem, "import it beside its own candidates")
    if header.get("candidates") != digest(source):
        raise OptionError(str(file), f"is of another {CANDIDATES}", "import it beside its own candidates")
    about = About(str(exported["target"]), 1)
    if exported["tvm"] != about.tvm:
        problem = f"is of candidates of TVM {exported['tvm']}; this is {about.tvm}"
        raise OptionError(str(file), problem, "export them anew")
    measured = {row.get("id"): row for row in rows}
    if unknown := sorted(map(str, measured.keys() - {row["id"] for row in candidates})):
        raise OptionError(str(file), f"has results of {', '.join(unknown[:3])}, which are no candidates")
    tasks: dict[str, list[Record]] = {}
    for row in candidates:
        # The first of a task is its default, which its others are compared with.
        if row["workload"] not in tasks and row["id"] not in measured:
            continue
        tasks.setdefault(row["workload"], [])
        if row["id"] in measured:
            tasks[row["workload"]].append(_record(file, row, measured[row["id"]]))
    machine, device = (str(header.get(key, "unknown")) for key in ("machine", "device"))
    return Results(about, machine, device, header["candidates"], tasks)


def _record(file: Path, candidate: Row, result: Row) -> Record:
    named = (candidate["workload"], candidate["task"], candidate["trace"])
    if isinstance(result.get("error"), str):
        return Record(*named, error=result["error"])
    seconds: Any = result.get("seconds")
    if not isinstance(seconds, list) or not seconds or not all(_is_time(value) for value in seconds):
        problem = f"{candidate['id']} has seconds {json.dumps(seconds)[:80]}; expected numbers above 0"
        raise OptionError(str(file), problem, "measure again")
    return Record(*named, tuple(map(float, seconds)))


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _choice(records: Sequence[Record]) -> list[Record]:
    """The best of a task, since all were measured in turns with the default, which comes first."""
    default = records[0]
    if not default.seconds:
        return []
    best = min((r for r in records if r.seconds), key=lambda record: statistics.median(record.seconds))
    return [Record(best.workload, best.task, best.trace, best.seconds, default.seconds)]


def _of(log: LogWriter, workload: str) -> list[Record]:
    return [record for record in log.records if record.workload == workload]


def _note_machine(folder: Path, found: Results) -> None:
    """Write down, beside the records, where they are from."""
    path = folder / IMPORTS
    try:
        notes = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        notes = []
    note = {"candidates": found.digest, "machine": found.machine, "device": found.device}
    if note not in notes:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps([*notes, note], indent=1) + "\n")
