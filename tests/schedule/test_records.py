"""Reading tuning logs: which record wins, what is refused, and what is skipped but named."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Trace
from tvm_ffi import structural_equal

from tvm_ternary.errors import OptionError
from tvm_ternary.schedule import records
from tvm_ternary.schedule.records import (
    ABOUT,
    ANNOTATION,
    RECORDS,
    Record,
    find_tuned,
    parse_lines,
    read_log,
    shipped_log,
    trace_decisions,
    workload_hash,
)

from ..tuning.logs import OTHER, TARGET, WORKLOAD, choice, failure, trace, trial, write_log
from ..tuning.toy import Toy

NAMES = ("rows", "blocks")


def test_the_fastest_trial_is_the_result(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path, [trial(3e-6, rows=1), trial(1e-6, rows=2), trial(2e-6, rows=4), failure()]))
    found = log.find(WORKLOAD, NAMES)
    assert found is not None
    assert (found.decisions, found.seconds) == ({"rows": 2, "blocks": 2}, 1e-6)
    assert found.source == f"{tmp_path}#{log.records[1].tag}"
    assert len({record.tag for record in log.records}) == len(log.records)
    assert log.find(OTHER, NAMES) is None


def test_the_last_choice_goes_before_faster_trials(tmp_path: Path) -> None:
    lines = [trial(1e-6, rows=1), choice(2e-6, rows=2), choice(3e-6, rows=4), trial(1e-7, rows=8)]
    found = read_log(write_log(tmp_path, lines)).find(WORKLOAD, NAMES)
    assert found is not None
    assert found.decisions["rows"] == 4


def test_a_record_of_other_decisions_is_no_hit(tmp_path: Path) -> None:
    older = Record(WORKLOAD, "a task", trace(rows=4), (1e-9,))
    log = read_log(write_log(tmp_path, [older, trial(1e-6, rows=2)]))
    assert log.find(WORKLOAD, ("rows",)) is not None
    found = log.find(WORKLOAD, NAMES)
    assert found is not None
    assert found.decisions == {"rows": 2, "blocks": 2}
    assert log.find(WORKLOAD, (*NAMES, "layout")) is None


def test_failures_alone_are_no_result(tmp_path: Path) -> None:
    assert read_log(write_log(tmp_path, [failure(), failure("RuntimeError: no")])).find(WORKLOAD, NAMES) is None


def test_the_first_log_with_a_hit_counts(tmp_path: Path) -> None:
    module = Toy().workload()
    key = workload_hash(module)
    logs = [
        read_log(write_log(tmp_path / name, [trial(seconds, workload=workload)]))
        for name, workload, seconds in (("none", OTHER, 1e-9), ("mine", key, 2e-6), ("shipped", key, 1e-6))
    ]
    found = find_tuned(workload_hash(module), NAMES, logs)
    assert found is not None
    assert found.seconds == 2e-6
    assert found.source.startswith(f"{tmp_path / 'mine'}#")
    assert find_tuned(workload_hash(Toy(rows=64).workload()), NAMES, logs) is None


def test_equal_workloads_share_a_hash_and_others_do_not() -> None:
    hashes = [workload_hash(Toy(rows).workload()) for rows in (32, 32, 64)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in hashes)


def test_a_record_survives_its_line() -> None:
    for record in (trial(1e-6), failure("OSError: é\n\u2028"), choice(1 / 3)):
        line = record.line().encode()
        assert line.count(b"\n") == 1
        assert parse_lines(line, lambda where, why: pytest.fail(why)) == [(line, record)]
    assert trial(1e-6).median == 1e-6
    assert failure().median == math.inf


def test_the_trace_is_one_of_metaschedule() -> None:
    module = Toy().workload()
    schedule = Schedule(module)
    text = json.dumps(trace(rows=4, columns=8))
    Trace.apply_json_to_schedule(json.loads(text), schedule)
    annotations = schedule.get(schedule.get_sblock("root")).annotations
    assert {name: int(value) for name, value in annotations.items()} == {
        f"{ANNOTATION}rows": 4,
        f"{ANNOTATION}columns": 8,
    }
    assert not structural_equal(schedule.mod, module)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe\n",
        b"[]\n",
        b"3\n",
        b'{"workload": "aa"}\n',
        trial(1e-6).line().encode()[:-20],
        trial(1e-6).line().replace("[0.25,", "[Infinity,").encode(),
        trial(1e-6).line().replace("[0.25,", "[1e999,").encode(),
        trial(1e-6).line().replace("1e-06", "NaN").encode(),
        trial(1e-6).line().replace('"seconds"', '"secs"').encode(),
        trial(1e-6).line().replace(WORKLOAD, "").replace('""', "7").encode(),
        failure().line().replace('"ValueError: no"', "null").encode(),
        Record(WORKLOAD, "t", [[], []], (1.0,)).line().encode(),
        Record(WORKLOAD, "t", trace(rows=1), (-1.0,)).line().encode(),
        json.dumps({"workload": "a", "task": "t", "trace": trace(rows=1), "seconds": []}).encode(),
        json.dumps({"workload": "a", "task": "t", "trace": trace(rows=1), "seconds": [1.0], "error": "x"}).encode(),
        json.dumps({"workload": "a", "task": "t", "trace": [[["SampleCategorical"]], []], "seconds": [1]}).encode(),
        json.dumps({"workload": "a", "task": "t", "trace": {"a": 1, "b": 2}, "seconds": [1]}).encode(),
        json.dumps({"workload": "a", "task": "t", "trace": trace(rows=1)[::-1], "seconds": [1]}).encode(),
    ],
)
def test_a_line_that_is_no_record_is_named_skipped_and_kept(tmp_path: Path, line: bytes) -> None:
    good = trial(1e-6).line().encode()
    content = good + (line if line.endswith(b"\n") else line + b"\n") + good
    write_log(tmp_path, [])
    (tmp_path / RECORDS).write_bytes(content)
    log = read_log(tmp_path)
    assert len(log.records) == 2
    (note,) = log.notes
    assert note.startswith(f"{tmp_path} line 2: not a record (")
    assert (tmp_path / RECORDS).read_bytes() == content


def test_a_torn_last_line_is_called_torn(tmp_path: Path) -> None:
    write_log(tmp_path, [trial(1e-6)])
    with (tmp_path / RECORDS).open("a") as stream:
        stream.write(trial(1e-7).line()[:50])
    log = read_log(tmp_path)
    assert len(log.records) == 1
    assert "line 2: not a record, torn (" in log.notes[0]


@given(st.binary(max_size=300), st.integers(0, 5))
def test_no_bytes_crash_the_reader(noise: bytes, place: int) -> None:
    lines = [trial(1e-6).line().encode()] * 5
    rejected: list[str] = []
    content = b"".join([*lines[:place], noise + b"\n", *lines[place:]])
    parsed = parse_lines(content, lambda where, why: rejected.append(where))
    assert [record for _, record in parsed] == [trial(1e-6)] * 5
    assert len(rejected) == len(content.splitlines()) - 5


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the parts of a JSON document are."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [place, *(found for key, part in inner for found in _places(part, (*place, key)))]


def _replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with another value in one place."""
    if not place:
        return value
    copy = json.loads(json.dumps(document))
    holder = copy
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return copy


@given(st.data())
@settings(max_examples=300)
def test_a_document_changed_anywhere_is_a_record_or_refused(data: st.DataObject) -> None:
    document = json.loads(choice(1e-6).line())
    changed = _replaced(document, data.draw(st.sampled_from(_places(document))), data.draw(_JSON))
    rejected: list[str] = []
    parsed = parse_lines(json.dumps(changed).encode(), lambda where, why: rejected.append(why))
    assert len(parsed) + len(rejected) == 1
    for _, record in parsed:
        # What was taken for a record can be used as one.
        assert all(isinstance(value, int) for value in record.decisions.values())
        assert record.median > 0
        assert parse_lines(record.line().encode(), lambda where, why: pytest.fail(why))


def test_trace_decisions_reads_what_was_decided() -> None:
    assert trace_decisions(trace(rows=4, blocks=2)) == {"rows": 4, "blocks": 2}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": 99}, "has format 99; expected 1"),
        ({"tvm": "0.1"}, "was made with TVM 0.1; this is "),
        ({"threads": "two"}, "expected keys format, target, threads, tvm"),
        ({"target": "amx"}, "holds records of target amx; expected x86-64-v2"),
    ],
)
def test_a_log_of_other_conditions_is_refused(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    write_log(tmp_path, [], **change)
    with pytest.raises(OptionError) as caught:
        read_log(tmp_path, target=TARGET)
    assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        (ABOUT, None, "log.json cannot be read (No such file or directory)"),
        (ABOUT, "{", "log.json is not JSON"),
        (ABOUT, "[]", "log.json is []"),
        (RECORDS, None, "records.jsonl cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, name: str, text: str | None, part: str) -> None:
    write_log(tmp_path, [])
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(OptionError) as caught:
        read_log(tmp_path)
    assert part in str(caught.value)


def test_shipped_logs_are_found_by_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_FOLDERS", (tmp_path / "no", tmp_path))
    write_log(tmp_path / TARGET, [trial(1e-6)])
    shipped_log.cache_clear()
    try:
        log = shipped_log(TARGET)
        assert log is not None
        found = log.find(WORKLOAD, NAMES)
        assert found is not None
        assert found.source == f"shipped:tuning_logs/{TARGET}#{log.records[0].tag}"
        assert shipped_log("x86-64-v3") is None
    finally:
        shipped_log.cache_clear()


def test_reading_changes_nothing(tmp_path: Path) -> None:
    write_log(tmp_path, [trial(1e-6)])
    (tmp_path / RECORDS).write_bytes(b"torn" + (tmp_path / RECORDS).read_bytes()[:-5])
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    time.sleep(0.01)
    read_log(tmp_path)
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
