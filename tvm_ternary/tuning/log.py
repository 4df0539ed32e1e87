"""Write a tuning log so that nothing measured is lost and no line is ever half a record to its reader.

MetaSchedule's own database appends to two files through C++ streams, workloads and records, whose lines refer to each
other by number; a line that is torn or missing in the first makes the second unreadable. Here a record is one line of
one file, written by one call and synced before the job goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tvm_ternary.errors import OptionError, OutputError
from tvm_ternary.files import atomic_path
from tvm_ternary.schedule.records import (
    ABOUT,
    FORMAT,
    RECORDS,
    About,
    Record,
    parse_lines,
    read_about,
    read_log,
    results,
)

SET_ASIDE = "set-aside.jsonl"
"""Lines that were found in ``records.jsonl`` and are no records."""


class LogWriter:
    """An open log; made by `open_log`.

    Attributes
    ----------
    folder : Path
    records : list of Record
        Those that the log held, then those appended.
    """

    def __init__(self, folder: Path, records: list[Record]) -> None:
        self.folder, self.records = folder, records
        try:
            self._handle = os.open(folder / RECORDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error

    def append(self, record: Record) -> None:
        """Bring a record to the disk.

        Raises
        ------
        OutputError
            If it cannot be written: the disk is full, for one.
        """
        line = record.line().encode()
        try:
            written = os.write(self._handle, line)
            os.fsync(self._handle)
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        if written != len(line):
            raise self._error("no space left")
        self.records.append(record)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _error(self, reason: str) -> OutputError:
        hint = "check space and permissions and call again; what was measured is kept"
        return OutputError(str(self.folder / RECORDS), f"cannot be written ({reason})", hint)


@contextmanager
def open_log(folder: str | Path, about: About, notice: Callable[[str], None]) -> Iterator[LogWriter]:
    """Open a log to go on with, or begin one. Only one process can have it open.

    Parameters
    ----------
    folder : path
        Made if it does not exist.
    about : About
        What will be measured.
    notice : callable
        Told, in a sentence each, of lines that are no records. They are moved to ``set-aside.jsonl``.

    Yields
    ------
    LogWriter

    Raises
    ------
    OptionError
        If the folder's log is of another target, number of threads, TVM or format, or in use.
    OutputError
        If the folder cannot be made or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(str(path), f"cannot hold a tuning log ({error.strerror or error})", "name another") from error
    try:
        _lock(lock, path)
        _begin(path, about)
        writer = LogWriter(path, _repair(path, notice))
        try:
            yield writer
        finally:
            writer.close()
    finally:
        os.close(lock)


def prune(sources: Iterable[str | Path], folder: str | Path, notice: Callable[[str], None]) -> int:
    """Write a log that holds the result of every workload of others, and nothing else.

    Parameters
    ----------
    sources : iterable of path
        Logs of one target and number of threads. Where several know a workload, the lowest median counts.
    folder : path
        The log to write. One that it holds is replaced; it may be one of ``sources``.
    notice : callable
        Told of lines that were skipped.

    Returns
    -------
    int
        How many records were kept.

    Raises
    ------
    OptionError
        If a source is no log, they are of different conditions, or ``folder`` holds a log of others.
    OutputError
        If the log cannot be written.
    """
    logs = [read_log(source) for source in sources]
    for log in logs:
        if log.about != logs[0].about:
            raise OptionError(
                log.name, f"is of {_conditions(log.about)}; {logs[0].name} of {_conditions(logs[0].about)}"
            )
        for note in log.notes:
            notice(note)
    best: dict[str, Record] = {}
    for record in (record for log in logs for record in results(log.records).values()):
        if record.workload not in best or record.median < best[record.workload].median:
            best[record.workload] = record
    with open_log(folder, logs[0].about, notice) as writer:
        kept = sorted(best.values(), key=lambda record: (record.task, record.workload))
        _write(writer.folder, "".join(record.line() for record in kept).encode())
    return len(best)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OptionError(str(path), "another tuning job is writing there", "wait for it, or name another") from error
    except OSError as error:
        raise OutputError(str(path), f"cannot be locked ({error.strerror})", "name a folder on a local disk") from error


def _begin(path: Path, about: About) -> None:
    """Check what the log is about, or write it down."""
    if not (path / ABOUT).exists():
        if (path / RECORDS).exists():
            raise OptionError(str(path), f"holds {RECORDS} but no {ABOUT} that says of what", "name another folder")
        with atomic_path(path / ABOUT) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **asdict(about)}, indent=2, sort_keys=True) + "\n")
    found = read_about(path, str(path))
    if found != about:
        problem = f"holds records of {_conditions(found)}; expected {_conditions(about)}"
        raise OptionError(str(path), problem, "name another folder, or tune for that")


def _conditions(about: About) -> str:
    return f"target {about.target} on {about.threads} thread{'s' if about.threads != 1 else ''}"


def _repair(path: Path, notice: Callable[[str], None]) -> list[Record]:
    """Give the records; move whatever else the file holds aside, and end its last line."""
    file = path / RECORDS
    if not file.exists():
        return []
    try:
        content = file.read_bytes()
        bad: list[str] = []
        good = parse_lines(content, lambda where, why: bad.append(f"{file} {where}: {why}, kept in {path / SET_ASIDE}"))
        if bad:
            keep = {line for line, _ in good}
            # Beside first: killed in between, the lines are there twice, not lost.
            _append(path / SET_ASIDE, [line for line in content.splitlines(keepends=True) if line not in keep])
    except OSError as error:
        raise OutputError(str(file), f"cannot be opened ({error.strerror or error})", "check permissions") from error
    if bad or (content and not content.endswith(b"\n")):
        _write(path, b"".join(line.removesuffix(b"\n") + b"\n" for line, _ in good))
    for note in bad:
        notice(note)
    return [record for _, record in good]


def _append(path: Path, lines: list[bytes]) -> None:
    with path.open("ab") as stream:
        stream.write(b"".join(line.removesuffix(b"\n") + b"\n" for line in lines))
        stream.flush()
        os.fsync(stream.fileno())


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path / RECORDS) as temporary:
        temporary.write_bytes(content)
