"""The tables of attention, from lines that a tiny run wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import attention
from tvm_ternary.bench.attention import AttentionMeasurement
from tvm_ternary.bench.attention_case import Case, HeadShape
from tvm_ternary.bench.attention_engines import CacheScheme
from tvm_ternary.bench.timing import Spread
from tvm_ternary.cli import bench_attention


def test_writes_lines_tables_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = ("--shapes", "2x8", "--window", "64", "--peers", "none")
    rows = {
        "steps": (*common, "--cached", "128,200", "--prompts", "none", "--schemes", "full,t2a8"),
        "prompts": (*common, "--cached", "none", "--prompts", "5", "--prompt-schemes", "full"),
    }
    results = tmp_path / "attention.jsonl"
    monkeypatch.setattr(attention, "ROWS", rows)
    monkeypatch.setattr(attention, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["attention", "--only", "steps", "prompts", "--turns", "1", "--threads", "1"])
    attention.main()
    text = results.with_suffix(".md").read_text()
    assert "| 2x8 | step | 200 | 1 | t2a8 |" in text
    assert "| 2x8 | prompt, causal | 5 | 1 | full |" in text
    assert "| 2 planes |" in text
    assert "| 2x8 | prompt | 5 | 1 | full |" in text.partition("| met |")[2]
    assert "![steps](attention.png)" in text
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert attention.markdown([]) == ""


def measurement(
    queries: int, keys: int, scheme: str, ratios: dict[str, float], *, causal: bool = False, share: float | None = None
) -> AttentionMeasurement:
    """Only what the table of aims reads has a meaning."""
    return AttentionMeasurement(
        case=Case(HeadShape(2, 2, 8), queries, keys, causal),
        scheme=CacheScheme.parse(scheme),
        window=64,
        threads=1,
        target="",
        time=Spread(1000, 1000, 1000),
        error=0,
        loss=0,
        bytes=1,
        token_bytes=1,
        cache_bytes=1,
        bandwidth=1,
        peak=1,
        ratios=ratios,
        causal_share=share,
    )


def test_each_row_says_whether_its_aim_is_met() -> None:
    both = {"ort-gqa": 9.0, "torch-float32": 3.1, "torch-bf16": 1.6}
    measured = [
        measurement(1, 4096, "t2a8", both),
        measurement(1, 4096, "t1a8", both),
        measurement(1, 32768, "t2a8", {"ort-gqa": 9.0}),
        measurement(512, 512, "full", {"ort-mha": 1.2, "torch-float32": 1.0}),
        measurement(512, 512, "full", {"ort-gqa": 1.2}, causal=True, share=0.65),
        measurement(512, 512, "t2a8", {"ort-gqa": 1.6}, causal=True),
    ]
    # Nothing is promised of these.
    others = [
        measurement(1, 1024, "t2a8", both),
        measurement(1, 4096, "full", both),
        measurement(1, 4096, "t3a8", both),
    ]
    table = attention.aims_table([*measured, *others])
    assert [row[-4:] for row in table.rows] == [
        ("3.10 (3)", "1.60 (1.5)", "", "yes"),
        ("3.10 (5)", "1.60 (2.5)", "", "**no**"),
        ("9.00 (3)", "(1.5)", "", "**not measured**"),
        ("1.00 (1)", "", "", "yes"),
        ("1.20 (1)", "", "0.65 (0.6)", "**no**"),
        ("1.60 (1.5)", "", "(0.6)", "**not measured**"),
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)


@pytest.mark.parametrize("row", attention.ROWS)
def test_rows_are_understood(row: str) -> None:
    parser = argparse.ArgumentParser()
    bench_attention.add_parser(parser.add_subparsers())
    args = parser.parse_args(["attention", *attention.ROWS[row]])
    assert (args.cached == "none") is row.startswith("prompts")
    assert args.shapes in row
