"""``tvm-ternary bench``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest

from tests.models import mlp

from .conftest import cli, error_line

TINY = ("bench", "matmul", "--shapes", "32x128", "--rows", "1,2", "--schemes", "t1a8", "--turns", "2")


def test_prints_tables_appends_lines_and_draws(tmp_path: Path) -> None:
    lines, picture, again = tmp_path / "bench.jsonl", tmp_path / "a.svg", tmp_path / "b.svg"
    result = cli(*TINY, "--peers", "ort-2bit,ort-float32", "--json", lines, "--plot", picture)
    assert result.returncode == 0, result.stderr
    facts, limits, table, means = result.stdout.split("\n\n")
    assert facts.startswith("cpu  ")
    assert {line.split()[1] for line in limits.splitlines()[2:]} >= {"int8", "float32", "trits"}
    assert table.split()[:3] == ["N", "x", "K"]
    assert [line.split()[:6] for line in table.splitlines()[2:]] == [
        ["32", "x", "128", m, "warm", "t1a8"] for m in ("1", "2")
    ]
    assert means.count("t1a8") == 2
    roofline, *rows = map(json.loads, lines.read_text().splitlines())
    assert roofline["benchmark"] == "roofline"
    assert {"bandwidths_gbs", "peaks_gops", "cpu", "target", "threads"} <= roofline.keys()
    assert [(row["n"], row["k"], row["m"], row["scheme"], row["cache"]) for row in rows] == [
        (32, 128, 1, "t1a8", "warm"),
        (32, 128, 2, "t1a8", "warm"),
    ]
    for row in rows:
        assert row["benchmark"] == "matmul"
        assert row["peers_us"].keys() == row["ratios"].keys() == {"ort-2bit", "ort-float32"}
        assert {"cpu", "caches", "versions", "commit", "threads", "target", "us", "floor_us", "ratio"} <= row.keys()
        assert 0 < row["error"] < 0.01
    assert cli("bench", "plot", lines, "-o", again).returncode == 0
    assert again.read_text() == picture.read_text()


def test_several_threads_and_what_a_peer_refuses() -> None:
    options = ("--shapes", "32x100", "--rows", "1", "--schemes", "t1a8", "--turns", "1", "--threads", "2")
    result = cli("bench", "matmul", *options)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^threads +2$", result.stdout, re.MULTILINE)
    assert "ort-2bit" in result.stdout
    assert "ort-int8" in result.stdout
    # Either the package is not here, or it cannot take this K.
    assert result.stdout.count("no llama-tq2_0") + result.stdout.count("TQ2_0 needs K divisible by 256") == 1


def test_without_peers_there_are_no_ratios() -> None:
    result = cli(*TINY, "--peers", "none")
    assert result.returncode == 0, result.stderr
    assert "ratio" not in result.stdout
    assert "over best peer" not in result.stdout
    assert "reached" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--peers", "fast"), "peer 'fast': does not exist"),
        (("--schemes", "t1a7"), "scheme 't1a7': unknown"),
        (("--shapes", "32"), "--shapes: got '32'; expected NxK"),
        (("--rows", "1,x"), "--rows: M is 'x'"),
        (("--turns", "0"), "turns: is [0]"),
        (("--cold", "--rows", "9"), "cold: is for M up to 8; rows are [9]"),
        (("--plot", "a.jpg"), "a.jpg: ends in '.jpg'; expected .png or .svg"),
        (("--threads", "0"), "threads: is 0"),
        (("--cold", "--peers", "none"), "cold: a weight of"),
        (("--target", "vax"), "target vax: no such target"),
        (("--json", "/nowhere/at/all"), "its folder /nowhere/at does not exist"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], part: str) -> None:
    assert part in error_line(cli(*TINY, *arguments))


@pytest.mark.parametrize(
    ("lines", "picture", "part"),
    [
        ("missing", "a.png", "missing: cannot be read"),
        ("lines", "a.pdf", "a.pdf: ends in '.pdf'"),
        ("lines", "a.png", "lines, line 1: is not a benchmark's"),
    ],
)
def test_bad_plots_are_one_line(tmp_path: Path, lines: str, picture: str, part: str) -> None:
    (tmp_path / "lines").write_text("{}")
    assert part in error_line(cli("bench", "plot", tmp_path / lines, "-o", tmp_path / picture))


def test_the_kind_of_benchmark_must_be_named() -> None:
    assert "WHAT" in error_line(cli("bench"))


def test_a_model(tmp_path: Path) -> None:
    model, lines = tmp_path / "mlp.onnx", tmp_path / "lines.jsonl"
    onnx.save(mlp(), model)
    options = ("--schemes", "float", "--turns", "1", "--json", lines)
    result = cli("bench", "model", model, "--dim", "batch=1,2", *options)
    assert result.returncode == 0, result.stderr
    facts, ratios, costs = result.stdout.split("\n\n")
    assert facts.startswith("cpu  ")
    assert [line.split()[:3] for line in ratios.splitlines()[2:]] == [["mlp.onnx", f"batch={m}", "1"] for m in "12"]
    assert costs.splitlines()[2].split()[:2] == ["mlp.onnx", "float"]
    rows = list(map(json.loads, lines.read_text().splitlines()))
    assert [row["dims"] for row in rows] == [{"batch": 1}, {"batch": 2}]
    for row in rows:
        assert row["ratios"].keys() == {"ort-float32", "ort-int8"}
        assert {
            "cpu",
            "commit",
            "versions",
            "threads",
            "scheme",
            "time",
            "error",
            "first_seconds",
            "costs",
        } <= row.keys()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--dim", "batch=1,2", "--dim", "length=1,2,3"), "--dim: batch has 2 sizes, another 3"),
        (("--dim", "batch=x"), "--dim: batch is 'x'"),
        (("--threads", "0"), "threads: is 0"),
        (("--data", "none.npz"), "--data: none.npz is no .npz file"),
        ((), "none.onnx: no such file"),
    ],
)
def test_bad_options_of_a_model(arguments: tuple[str, ...], part: str) -> None:
    assert part in error_line(cli("bench", "model", "none.onnx", *arguments))
