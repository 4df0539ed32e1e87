"""Writing tuning logs: nothing is lost, whatever ended the last job, and no two jobs write at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import OptionError, OutputError
from tvm_ternary.schedule.records import RECORDS, About, Record, read_log
from tvm_ternary.tuning.log import SET_ASIDE, LogWriter, open_log, prune

from .logs import OTHER, TARGET, WORKLOAD, choice, failure, trial, write_log

ABOUT = About(TARGET, 1)


def append(folder: Path, *records: Record) -> tuple[list[Record], list[str]]:
    """Open, append and close; what the log held before, and what was said."""
    notes: list[str] = []
    with open_log(folder, ABOUT, notes.append) as log:
        held = list(log.records)
        for record in records:
            log.append(record)
    return held, notes


def test_a_new_log_is_one_that_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert append(folder, trial(1e-6), failure()) == ([], [])
    assert append(folder, choice(2e-6)) == ([trial(1e-6), failure()], [])
    log = read_log(folder, target=TARGET)
    assert log.about == ABOUT
    assert log.records == (trial(1e-6), failure(), choice(2e-6))
    assert sorted(path.name for path in folder.iterdir()) == ["log.json", RECORDS]


@pytest.mark.parametrize("length", [1, 50, -1])
def test_a_torn_last_line_is_moved_aside(tmp_path: Path, length: int) -> None:
    append(tmp_path, trial(1e-6), trial(2e-6))
    torn = trial(3e-6).line().encode()[:length]
    with (tmp_path / RECORDS).open("ab") as stream:
        stream.write(torn)
    held, notes = append(tmp_path, trial(4e-6))
    if length == -1:  # only the line break is missing: the record is whole
        assert (held, notes) == ([trial(1e-6), trial(2e-6), trial(3e-6)], [])
    else:
        assert held == [trial(1e-6), trial(2e-6)]
        (note,) = notes
        assert note.startswith(f"{tmp_path / RECORDS} line 3: not a record, torn")
        assert note.endswith(f"skipped, kept in {tmp_path / SET_ASIDE}")
        assert (tmp_path / SET_ASIDE).read_bytes() == torn + b"\n"
    assert read_log(tmp_path).notes == ()
    assert read_log(tmp_path).records == (*held, trial(4e-6))
    assert append(tmp_path)[1] == []


def test_foreign_lines_are_moved_aside_and_join_those_of_before(tmp_path: Path) -> None:
    append(tmp_path, trial(1e-6))
    (tmp_path / SET_ASIDE).write_bytes(b"older\n")
    foreign = b'{"some": "log"}\n\xff\n'
    (tmp_path / RECORDS).write_bytes(foreign + (tmp_path / RECORDS).read_bytes())
    held, notes = append(tmp_path)
    assert held == [trial(1e-6)]
    assert [note.partition(": ")[0].rpartition(" ")[2] for note in notes] == ["1", "2"]
    assert (tmp_path / SET_ASIDE).read_bytes() == b"older\n" + foreign


@given(st.integers(0, 3), st.data())
def test_cut_anywhere_only_the_cut_line_is_lost(count: int, data: st.DataObject) -> None:
    lines = [trial(1e-6 * (i + 1), rows=i + 1).line().encode() for i in range(4)]
    cut = data.draw(st.integers(0, len(lines[count]) - 2))
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = write_log(Path(name), [])
        patch.setattr(os, "fsync", lambda handle: None)
        (folder / RECORDS).write_bytes(b"".join(lines[:count]) + lines[count][:cut])
        held, notes = append(folder, trial(1.0))
        assert [record.line().encode() for record in held] == lines[:count]
        assert len(notes) == (cut > 0)
        assert read_log(folder).notes == ()


@pytest.mark.parametrize(
    ("about", "part"),
    [
        (About("amx", 1), "holds records of target x86-64-v2 on 1 thread; expected target amx on 1 thread"),
        (About(TARGET, 2), "expected target x86-64-v2 on 2 threads"),
    ],
)
def test_a_log_of_other_conditions_is_left_alone(tmp_path: Path, about: About, part: str) -> None:
    append(tmp_path, trial(1e-6))
    (tmp_path / RECORDS).write_bytes(b"torn" + (tmp_path / RECORDS).read_bytes())
    before = (tmp_path / RECORDS).read_bytes()
    with pytest.raises(OptionError, match="expected target") as caught, open_log(tmp_path, about, pytest.fail):
        pass
    assert part in str(caught.value)
    assert (tmp_path / RECORDS).read_bytes() == before


def test_records_without_conditions_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text("what may this be\n")
    with pytest.raises(OptionError, match=r"holds records\.jsonl but no log\.json"):
        append(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS]


def test_two_jobs_do_not_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.tuning.test_log import append\n"
        "from tvm_ternary.errors import OptionError\n"
        "try: append(Path(sys.argv[1]))\n"
        "except OptionError as error: print(error)"
    )
    with open_log(tmp_path, ABOUT, pytest.fail):
        result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "another tuning job is writing there; wait for it" in result.stdout
    append(tmp_path)


@pytest.mark.parametrize("reason", ["full", "half"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    append(tmp_path, trial(1e-6))
    write = os.write

    def fail(handle: int, data: bytes) -> int:
        if reason == "full":
            raise OSError(28, "No space left on device")
        return write(handle, data[:30])

    with open_log(tmp_path, ABOUT, pytest.fail) as log:
        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(OutputError, match=r"cannot be written .*o space left.*what was measured is kept"):
            log.append(trial(2e-6))
        assert log.records == [trial(1e-6)]
    monkeypatch.undo()
    held, notes = append(tmp_path)
    assert held == [trial(1e-6)]
    assert len(notes) == (reason == "half")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot hold a tuning log"):
        append(tmp_path / "file" / "log")
    (tmp_path / "log" / RECORDS).mkdir(parents=True)
    write_log_about_only(tmp_path / "log")
    with pytest.raises(OutputError, match="Is a directory"):
        append(tmp_path / "log")


def write_log_about_only(folder: Path) -> None:
    (folder / RECORDS).rmdir()
    write_log(folder, [])
    (folder / RECORDS).unlink()
    (folder / RECORDS).mkdir()


def test_every_record_is_synced_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fsync
    with open_log(tmp_path, ABOUT, pytest.fail) as log:
        assert isinstance(log, LogWriter)
        monkeypatch.setattr(os, "write", lambda *a: (calls.append("write"), write(*a))[1])
        monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("sync"), sync(*a))[1])
        log.append(trial(1e-6))
        log.append(failure())
    assert calls == ["write", "sync"] * 2


def test_prune_keeps_the_result_of_each_workload(tmp_path: Path) -> None:
    here = write_log(tmp_path / "here", [trial(1e-6), failure(), choice(3e-6, rows=2), trial(5e-6, workload=OTHER)])
    there = write_log(tmp_path / "there", [choice(2e-6, rows=4), choice(9e-6, workload=OTHER), failure(workload="cc")])
    notes: list[str] = []
    assert prune([here, there], tmp_path / "out", notes.append) == 2
    log = read_log(tmp_path / "out", target=TARGET)
    assert {record.workload: record for record in log.records} == {
        WORKLOAD: choice(2e-6, rows=4),
        OTHER: trial(5e-6, workload=OTHER),
    }
    assert notes == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.json", RECORDS]


def test_prune_can_replace_its_source_and_keeps_its_order(tmp_path: Path) -> None:
    write_log(tmp_path, [trial(2e-6, workload=OTHER), trial(2e-6), trial(1e-6, rows=8)])
    for _ in range(2):
        assert prune([tmp_path], tmp_path, pytest.fail) == 2
        assert read_log(tmp_path).records == (trial(1e-6, rows=8), trial(2e-6, workload=OTHER))


def test_prune_refuses_logs_of_different_conditions(tmp_path: Path) -> None:
    one, other = write_log(tmp_path / "one", []), write_log(tmp_path / "other", [], target="amx")
    with pytest.raises(OptionError, match=r"is of target amx on 1 thread; .*one of target x86-64-v2 on 1 thread"):
        prune([one, other], tmp_path / "out", pytest.fail)
    with pytest.raises(OptionError, match="holds records of target amx"):
        prune([one], other, pytest.fail)


def test_prune_names_the_lines_it_skips(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [trial(1e-6)])
    with (tmp_path / "log" / RECORDS).open("a") as stream:
        stream.write("?\n")
    notes: list[str] = []
    assert prune([tmp_path / "log"], tmp_path / "out", notes.append) == 1
    assert len(notes) == 1
    assert "line 2" in notes[0]
