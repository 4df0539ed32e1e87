"""``tvm-ternary bench``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import cli, error_line

TINY = ("bench", "matmul", "--shapes", "32x128", "--rows", "1,2", "--schemes", "t1a8", "--repeat", "2")


def test_prints_tables_and_appends_lines(tmp_path: Path) -> None:
    lines = tmp_path / "bench.jsonl"
    lines.write_text('{"an": "older line"}\n')
    result = cli(*TINY, "--peers", "ort-2bit,ort-float32", "--json", lines)
    assert result.returncode == 0, result.stderr
    facts, table, means = result.stdout.split("\n\n")
    assert facts.startswith("cpu  ")
    assert table.split()[:3] == ["N", "x", "K"]
    assert [line.split()[:6] for line in table.splitlines()[2:]] == [
        ["32", "x", "128", m, "warm", "t1a8"] for m in ("1", "2")
    ]
    assert means.count("t1a8") == 2
    _, *rows = map(json.loads, lines.read_text().splitlines())
    assert [(row["n"], row["k"], row["m"], row["scheme"], row["cache"]) for row in rows] == [
        (32, 128, 1, "t1a8", "warm"),
        (32, 128, 2, "t1a8", "warm"),
    ]
    for row in rows:
        assert row["benchmark"] == "matmul"
        assert row["peers_us"].keys() == {"ort-2bit", "ort-float32"}
        assert {"cpu", "caches", "versions", "commit", "threads", "target", "us", "floor_us", "ratio"} <= row.keys()
        assert 0 < row["error"] < 0.01


def test_without_peers_there_are_no_ratios() -> None:
    result = cli(*TINY, "--peers", "none")
    assert result.returncode == 0, result.stderr
    assert "ratio" not in result.stdout
    assert "geometric mean" not in result.stdout


def test_several_threads() -> None:
    result = cli(*TINY, "--peers", "ort-2bit,ort-int8", "--threads", "2")
    assert result.returncode == 0, result.stderr
    assert "threads    2\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--peers", "fast"), "peer 'fast': does not exist"),
        (("--schemes", "t1a7"), "scheme 't1a7': unknown"),
        (("--shapes", "32"), "--shapes: got '32'; expected NxK"),
        (("--rows", "1,x"), "--rows: M is 'x'"),
        (("--repeat", "0"), "repeat: is [0]"),
        (("--threads", "0"), "threads: is 0"),
        (("--cold", "--peers", "none"), "cold: a weight of"),
        (("--target", "vax"), "target vax: no such target"),
        (("--json", "/nowhere/at/all"), "its folder /nowhere/at does not exist"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], part: str) -> None:
    assert part in error_line(cli(*TINY, *arguments))
