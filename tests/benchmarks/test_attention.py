"""The tables of attention, from lines that a tiny run wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import attention
from tvm_ternary.cli import bench_attention


def test_writes_lines_tables_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = ("--shapes", "2x8", "--window", "64", "--peers", "none")
    rows = {
        "steps": (*common, "--cached", "128,200", "--prompts", "none", "--schemes", "full,t2a8"),
        "prompts": (*common, "--cached", "none", "--prompts", "5"),
    }
    results = tmp_path / "attention.jsonl"
    monkeypatch.setattr(attention, "ROWS", rows)
    monkeypatch.setattr(attention, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["attention", "--turns", "1", "--threads", "1"])
    attention.main()
    text = results.with_suffix(".md").read_text()
    assert "| 2x8 | step | 200 | 1 | t2a8 |" in text
    assert "| 2x8 | prompt, causal | 5 | 1 | full |" in text
    assert "| 2 planes |" in text
    assert "![steps](attention.png)" in text
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert attention.markdown([]) == ""


@pytest.mark.parametrize("row", attention.ROWS)
def test_rows_are_understood(row: str) -> None:
    parser = argparse.ArgumentParser()
    bench_attention.add_parser(parser.add_subparsers())
    args = parser.parse_args(["attention", *attention.ROWS[row]])
    assert (args.cached == "none") is row.startswith("prompts")
    assert args.shapes in row
