"""Read tuning logs: what was measured on a target, and which decisions came out best for a workload.

A log is a folder of two files. ``log.json`` says what it was measured for. ``records.jsonl`` holds a line a record,
which is only ever appended, so that whatever ends a tuning job leaves at most one torn line at the end. A line names
its workload by TVM's structural hash and holds a MetaSchedule trace, so a log is of use as long as the workload's
definition stays the same, and is silently (and rightly) without a hit once it changed. There are three kinds of lines:

a trial
    has ``seconds``: run times of one candidate;
a failure
    has ``error``: why a candidate could not be built or run;
a choice
    has ``seconds`` and ``default_seconds``: the best candidate measured once more, in turns with the default schedule.
    The last choice of a workload is its result; where none was made yet, the trial with the lowest median is.

A trace samples numbers and writes each to the root block as ``ternary.<decision>``; the schedule knows what they mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from tvm_ternary.errors import OptionError

ABOUT = "log.json"
RECORDS = "records.jsonl"
FORMAT = 1
ANNOTATION = "ternary."
"""Prefix of the root block's annotations that hold the decisions."""

PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (PACKAGE / "_tuning_logs", PACKAGE.parent / "tuning_logs")  # inside a wheel; in a source tree
_HASH_MASK = 2**64 - 1
# What reading a document of any other shape can raise.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
_KEYS = {"workload", "task", "trace"}
_KINDS: tuple[set[str], ...] = ({"seconds"}, {"error"}, {"seconds", "default_seconds"})


@dataclass(frozen=True)
class About:
    """What a log was measured for; records of different conditions never share a folder.

    Attributes
    ----------
    target : str
    threads : int
    tvm : str
        TVM's version, whose structural hashes the records carry.
    """

    target: str
    threads: int
    tvm: str = field(default_factory=cache(lambda: version("apache-tvm")))


@dataclass(frozen=True)
class Record:
    """One line of a log.

    Attributes
    ----------
    workload : str
        As `workload_hash` gives it.
    task : str
        Its name, for people.
    trace : list
        A MetaSchedule trace as JSON: the instructions, then the decisions.
    seconds, default_seconds : tuple of float
        Run times, and those of the default schedule; empty where the kind of line has none.
    error : str or None
        Why the candidate failed.
    """

    workload: str
    task: str
    trace: Any = field(hash=False)
    seconds: tuple[float, ...] = ()
    default_seconds: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median(self) -> float:
        """Median of the run times in seconds, infinity for a failure."""
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def decisions(self) -> dict[str, int]:
        """What the trace decided, by name."""
        return trace_decisions(self.trace)

    @property
    def tag(self) -> str:
        """Eight hexadecimal digits that tell this record from others: of its workload and trace."""
        return hashlib.sha256(json.dumps([self.workload, self.trace]).encode()).hexdigest()[:8]

    def line(self) -> str:
        """The record as a line of a log, line break included."""
        document: dict[str, Any] = {"workload": self.workload, "task": self.task, "trace": self.trace}
        if self.error is not None:
            document["error"] = self.error
        else:
            document["seconds"] = self.seconds
            if self.default_seconds:
                document["default_seconds"] = self.default_seconds
        return json.dumps(document, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Tuned:
    """What a log knows of a workload: decisions, median seconds, and where they are from.

    ``source`` says which record of which log: ``shipped:tuning_logs/avx512-vnni#1f0c2d3e``.
    """

    decisions: dict[str, int] = field(hash=False)
    seconds: float
    source: str


@dataclass(frozen=True)
class TuningLog:
    """A log that was read.

    Attributes
    ----------
    name : str
        How messages and manifests call it.
    about : About
    records : tuple of Record
        In the order of their lines.
    notes : tuple of str
        A sentence for each line that was skipped.
    """

    name: str
    about: About
    records: tuple[Record, ...]
    notes: tuple[str, ...]
    _by_workload: dict[str, list[Record]] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        by_workload: dict[str, list[Record]] = {}
        for record in self.records:
            by_workload.setdefault(record.workload, []).append(record)
        object.__setattr__(self, "_by_workload", by_workload)

    def find(self, workload: str, names: Collection[str]) -> Tuned | None:
        """Give the result for a workload's hash, None if there is none that decides exactly what ``names`` says."""
        known = self._by_workload.get(workload, [])
        record = results(one for one in known if one.decisions.keys() == set(names)).get(workload)
        return Tuned(record.decisions, record.median, f"{self.name}#{record.tag}") if record is not None else None


def results(records: Iterable[Record]) -> dict[str, Record]:
    """Give each workload's result: its last choice, or without one its fastest trial."""
    found: dict[str, Record] = {}
    for record in records:
        known = found.get(record.workload)
        faster = known is None or (not known.default_seconds and record.median < known.median)
        if record.error is None and (record.default_seconds or faster):
            found[record.workload] = record
    return found


def read_log(folder: str | Path, *, target: str | None = None, name: str | None = None) -> TuningLog:
    """Read a log, changing nothing.

    Parameters
    ----------
    folder : path
    target : str, optional
        What it must be of.
    name : str, optional
        How messages shall call it; the folder's path by default.

    Raises
    ------
    OptionError
        If there is no log, or it is one of another target, TVM or format.
    """
    path, called = Path(folder), name or str(folder)
    about = read_about(path, called)
    if target is not None and about.target != target:
        raise OptionError(called, f"holds records of target {about.target}; expected {target}", "name another folder")
    try:
        content = (path / RECORDS).read_bytes()
    except OSError as error:
        raise OptionError(called, f"{RECORDS} cannot be read ({error.strerror or error})") from error
    notes: list[str] = []
    parsed = parse_lines(content, lambda line, why: notes.append(f"{called} {line}: {why}"))
    return TuningLog(called, about, tuple(record for _, record in parsed), tuple(notes))


@cache
def shipped_log(target: str) -> TuningLog | None:
    """Read the log that comes with this package for a target, None if there is none."""
    root = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    if not (root / target / ABOUT).is_file():
        return None
    return read_log(root / target, target=target, name=f"shipped:tuning_logs/{target}")


def open_logs(target: str, folder: str | Path | None = None) -> tuple[TuningLog, ...]:
    """Open the logs that a compilation for ``target`` asks, in order of precedence: ``folder``, then the shipped one.

    Raises
    ------
    OptionError
        If ``folder`` is no log of that target.
    """
    shipped = shipped_log(target)
    own = () if folder is None else (read_log(folder, target=target),)
    return own if shipped is None else (*own, shipped)


def find_tuned(workload: str, names: Collection[str], logs: Sequence[TuningLog]) -> Tuned | None:
    """Give the result for a workload from the first log that has one.

    Parameters
    ----------
    workload : str
        Its `workload_hash`.
    names : collection of str
        The decisions that its schedule asks for. A record of a time when they were others is no hit.
    logs : sequence of TuningLog
        In order of precedence: the user's, then the shipped one.
    """
    return next((found for log in logs if (found := log.find(workload, names)) is not None), None)


def workload_hash(module: tvm.IRModule) -> str:
    """Sixteen hexadecimal digits that two modules share if they are structurally equal."""
    return f"{tvm_ffi.structural_hash(module) & _HASH_MASK:016x}"


def read_about(folder: Path, name: str) -> About:
    """Read what a log was measured for.

    Raises
    ------
    OptionError
        If ``folder`` holds no log, or one of another TVM or format.
    """
    hint = "name a folder that 'tvm-ternary tune' has written"
    try:
        document = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(name, f"holds no tuning log: {ABOUT} cannot be read ({error.strerror})", hint) from error
    except ValueError as error:
        raise OptionError(name, f"{ABOUT} is not JSON ({error})", hint) from error
    types = {"format": int, "target": str, "threads": int, "tvm": str}
    if not isinstance(document, dict) or any(type(document.get(key)) is not kind for key, kind in types.items()):
        raise OptionError(name, f"{ABOUT} is {json.dumps(document)[:80]}; expected keys {', '.join(types)}", hint)
    if document["format"] != FORMAT:
        raise OptionError(name, f"has format {document['format']}; expected {FORMAT}", "tune into another folder")
    about = About(document["target"], document["threads"], document["tvm"])
    ours = About(about.target, about.threads)
    if about != ours:
        raise OptionError(name, f"was made with TVM {about.tvm}; this is {ours.tvm}", "tune into another folder")
    return about


def parse_lines(content: bytes, reject: Callable[[str, str], None]) -> list[tuple[bytes, Record]]:
    """Give the lines that are records, line break included, each with its record.

    ``reject`` is told of every other line: where it is, and what is wrong with it.
    """
    parsed = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            parsed.append((line, _record(line)))
        except _MALFORMED as error:
            torn = "" if line.endswith(b"\n") else ", torn"
            reject(f"line {number}", f"not a record{torn} ({error}); skipped")
    return parsed


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number that a record can hold")
    return value


# Python's own takes NaN and infinity, which cannot be written again.
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _record(line: bytes) -> Record:
    document = _DECODER.decode(line.decode())
    if not isinstance(document, dict) or set(document) - _KEYS not in _KINDS or not set(document) >= _KEYS:
        raise ValueError(f"its keys are not {', '.join(sorted(_KEYS))} and those of a trial, a failure or a choice")
    for key in ("workload", "task", "error"):
        if not isinstance(document.get(key, ""), str):
            raise TypeError(f"{key} is no text")
    trace_decisions(document["trace"])
    seconds, default_seconds = (_seconds(document, key) for key in ("seconds", "default_seconds"))
    named = (document["workload"], document["task"], document["trace"])
    return Record(*named, seconds, default_seconds, document.get("error"))


def _seconds(document: Mapping[str, Any], key: str) -> tuple[float, ...]:
    if key not in document:
        return ()
    values = document[key]
    if not (
        isinstance(values, list) and values and all(isinstance(v, float | int) and 0 < v < math.inf for v in values)
    ):
        raise ValueError(f"{key} are not positive numbers")
    return tuple(map(float, values))


def trace_decisions(trace: Any) -> dict[str, int]:
    """Read the decisions off a trace.

    Parameters
    ----------
    trace : list
        As JSON: ``[[name, inputs, attributes, outputs], ...]``, then ``[[instruction, decision], ...]``.

    Raises
    ------
    ValueError, TypeError, LookupError, AttributeError, OverflowError
        If it is no such trace.
    """
    instructions, decided = trace
    chosen = {int(index): int(decision) for index, decision in decided}
    values: dict[str, int] = {}
    found: dict[str, int] = {}
    for index, (name, inputs, attributes, outputs) in enumerate(instructions):
        if name == "SampleCategorical":
            values[outputs[0]] = int(attributes[0][chosen[index]])
        elif name == "Annotate" and attributes[0].startswith(ANNOTATION):
            found[attributes[0].removeprefix(ANNOTATION)] = values[inputs[1]]
    if not found:
        raise ValueError("the trace decides nothing")
    return found
