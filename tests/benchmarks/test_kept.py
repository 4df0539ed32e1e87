"""Rows that are kept, and measured again only when named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kept import bench_lines, measure_missing


def test_finished_rows_are_kept(tmp_path: Path) -> None:
    results, asked = tmp_path / "lines.jsonl", list[str]()

    def measure(row: str) -> list[dict[str, Any]]:
        asked.append(row)
        return [] if row == "fails" else [{"value": len(asked)}]

    assert measure_missing(results, ["a", "fails"], None, measure) == [{"row": "a", "value": 1}]
    # One that failed is tried again; "a" is kept, in the order of the rows.
    assert measure_missing(results, ["b", "a", "fails"], None, measure) == [
        {"row": "b", "value": 3},
        {"row": "a", "value": 1},
    ]
    assert measure_missing(results, ["a", "b"], ["a"], measure)[0] == {"row": "a", "value": 5}
    assert asked == ["a", "fails", "b", "fails", "a"]
    assert [json.loads(line)["row"] for line in results.read_text().splitlines()] == ["a", "b"]


def test_a_failure_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert bench_lines("attention", "--shapes", "1") == []
    assert "error: shapes: got '1'" in capfd.readouterr().err
