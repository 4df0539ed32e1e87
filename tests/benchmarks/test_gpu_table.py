"""The table of figures, and the document's table of floors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import floors
from benchmarks.gpu.cases import ALL, ASKED_CACHE, REQUIRED, TIMED_SCHEMES, TIMED_SHAPES, cache_name, timed
from benchmarks.gpu.table import render

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"gpu": "H100", "torch": "2", "commit": "0", "date": "today", "card": {"driver_version": "580"}}
TIMES = {"seconds": 1e-5, "seconds_with_rows": 2e-5, "torch_bf16": 9e-5, "weight_bytes": 20e6, "spread": 0.01}


def rendered(tmp_path: Path, *lines: dict[str, Any]) -> str:
    path = tmp_path / "cuda-h100.jsonl"
    path.write_text("".join(json.dumps({**line, **FACTS}) + "\n" for line in lines))
    return render(path)


def test_the_committed_table_says_what_was_not_measured() -> None:
    text = render(None)
    assert (ROOT / "benchmarks" / "results" / "cuda.md").read_text() == text
    assert text.count("not measured") == len(REQUIRED)


def test_the_figures_of_made_up_lines(tmp_path: Path) -> None:
    text = rendered(
        tmp_path,
        {"kind": "ceilings", "copy_bytes_per_second": 3e12, "torch_bf16_operations_per_second": 7e14},
        {"kind": "time", "case": "t1a8_4096x4096", "m": 1, **TIMES},
        {"kind": "time", "case": "t1a16_4096x4096", "m": 1, **TIMES, "torch_bf16": 18e-5, "floor": 9e-6},
        {"kind": "time", "case": "t1a8_4096x4096", "m": 4096, **TIMES, "torch_bf16": 1e-5, "torch_int8": 2e-5},
        {"kind": "model check", "case": "demo", "error": 1e-3, "most": 1e-2},
        {"kind": "model", "case": "demo", "fixed": True, "seconds": 1e-4, "torch_bf16_eager": 3e-4}
        | {"torch_bf16_graph": 2e-4},
        {"kind": "model", "case": "any", "fixed": False, "seconds": 1e-3, "torch_bf16_eager": 3e-4},
        {"kind": "attention", "case": cache_name(ASKED_CACHE), "seconds": 1e-5, "append": 5e-6, "bytes": 36.7e6}
        | {"torch_bf16_rows": 4e-5, "torch_bf16_grouped": 5e-5, "spread": 0.02},
        {"kind": "prompt", "case": "32x8x128_4096_causal", "seconds": 1e-3, "torch_bf16": 8e-4, "operations": 14e10}
        | {"spread": 0.01},
        {"kind": "peer", "peer": "gemlite", "case": "t1a8_4096x4096", "m": 1, "seconds": 5e-5},
        {"kind": "peer", "peer": "bitblas", "reason": "not installed"},
        {"kind": "left out", "case": "t1a1_4096x4096", "m": 8},
    )
    for row in (
        "| 0.8 | 0.67 | 0.67 | not met |",
        "| 4 | 4.50 | 6.36 | met |",
        "| 1.5 | not measured |  |  |",
        "| 1 | 0.50 | 0.50 | not met |",
        "| 2 | 3.00 | 3.00 | met |",
        "| over gemlite, the same shapes | 1 | 2.50 | 2.50 | met |",
        "| over bitblas, the same shapes | 1 | not measured |  |  |",
        "| 3 | 4.00 | 4.00 | met |",
        "| t2kv_32x8x128_32768 | 10.0 | 5.0 | 40.0 | 4.00 | 3670 | 2.0% |",
        "| 0.7 | 0.80 | 0.80 | met |",
        "| 32x8x128_4096_causal | 1000.0 | 800.0 | 0.80 | 140 | 1.0% |",
        "| demo | 1.0e-03 | 100.0 | 300.0 | 200.0 |",
        "| t1a16_4096x4096 | 1 | 10.0 | 20.0 | 9.0 | 180.0 |  | 2000 | 1.0% |",
        "bitblas: not installed (all that is missing).",
        "Left out for want of time: t1a1_4096x4096 M=8.",
        "H100, driver 580, torch 2, commit 0, today.",
    ):
        assert row in text


def test_what_failed_is_in_the_table(tmp_path: Path) -> None:
    text = rendered(
        tmp_path,
        {"kind": "check", "case": "t1a8_96x256", "m": 3, "wrong": 7},
        {"kind": "error", "step": "times", "error": "its process ended with status -11"},
        {"kind": "model check", "case": "demo", "error": None, "most": 1e-2},
        {"kind": "sanitizer", "tool": "racecheck", "status": "exit status 9", "said": "", "wrong": True},
    )
    assert "wrong: t1a8_96x256 M=3 (7 results)" in text
    assert "Error in times: its process ended with status -11." in text
    assert "| demo | failed | not measured | not measured | not measured |" in text
    assert "compute-sanitizer racecheck: exit status 9." in text


def test_the_command_writes_a_table_beside_the_lines(tmp_path: Path) -> None:
    rendered(tmp_path, {"kind": "check", "case": "t1a8_96x256", "m": 3, "wrong": 0})
    command = [sys.executable, "-m", "benchmarks.gpu.table", str(tmp_path / "cuda-h100.jsonl")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert "1 products by 1 kernels; wrong: none" in (tmp_path / "cuda-h100.md").read_text()


def test_what_is_asked_for_is_timed_first_and_everything_once() -> None:
    order = timed()
    assert len(set(order)) == len(order) == len(TIMED_SHAPES) * len(TIMED_SCHEMES)
    assert {scheme for *_, scheme in order[: 2 * len(TIMED_SHAPES)]} == {"t1a8", "t1a16"}
    assert ALL.timed == order


def test_the_document_holds_the_floors_that_the_code_counts() -> None:
    text = (ROOT / floors.DOCUMENT).read_text()
    assert floors.document(text) == text
    assert floors.floor(4096, 4096, "t1a8", 1) == pytest.approx(1.27, abs=0.02)
    assert floors.dense(4096, 4096, 1) == pytest.approx(10.0, abs=0.1)
