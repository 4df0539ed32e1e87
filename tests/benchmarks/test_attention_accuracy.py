"""Figures of rounded keys and values: rows of a tiny model, their table and picture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import attention_accuracy
from benchmarks.attention_accuracy_report import markdown
from tests.attention_model import attention_model, outputs_of, sample


def figure(samples, outputs):  # type: ignore[no-untyped-def]
    """A perplexity of nothing: 2, and how far the outputs are from what they should be."""
    moved = sum(np.square(y["y"][0] - outputs_of(x)[-1]).sum() for x, y in zip(samples, outputs, strict=True))
    return {"perplexity": 2 + float(moved > 1e-6)}


def test_writes_lines_a_table_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def samples(specs):  # type: ignore[no-untyped-def]
        assert [spec.name for spec in specs] == ["x", "mask"]
        return [sample(130), sample(3)]

    roundings = {"ternary-keys 2 window 64", "ternary-keys-values 2 window 0", "errors", "adaptive"}
    subject = attention_accuracy.Subject(tmp_path / "model", samples, samples, figure)
    results = tmp_path / "attention_accuracy.jsonl"
    monkeypatch.setattr(attention_accuracy, "SUBJECTS", {"tiny": subject})
    monkeypatch.setattr(attention_accuracy, "ROWS", {f"tiny {name}": ("tiny", name) for name in sorted(roundings)})
    monkeypatch.setattr(attention_accuracy, "RESULTS", results)
    monkeypatch.setattr(attention_accuracy, "import_model", lambda path: attention_model())
    monkeypatch.setattr(sys, "argv", ["attention_accuracy"])
    attention_accuracy.main()
    text = results.with_suffix(".md").read_text()
    share = f"{3 * 64 / (130 * 131 / 2 + 6):.1%}"
    assert f"| perplexity: at most 1% more | tiny | ternary-keys | 64 | {share} | +50.00% | no |" in text
    assert "| tiny | ternary-keys-values | 2 | 0 |" in text
    assert "| tiny | adaptive 0.2 |" in text
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert markdown([]) == ""


def test_what_a_library_gives_stands_beside() -> None:
    figure = {"model": "d", "kind": "figure", "mode": "ternary-keys", "planes": 1, "window": 0, "rotated": False}
    figure |= {"metrics": {"perplexity": [4.0, 4.1]}, "output_error": 0.1, "packed_share": 0.5}
    library = {"model": "d", "kind": "library", "planes": 1, "window": 64, "texts": 4}
    text = markdown([figure, library | {"float": 4.0, "measure": 4.25, "library": 4.5}])
    assert "| d | 1 | 64 | 4.0000 | 4.2500 | 4.5000 |" in text


def test_rows_are_of_known_models() -> None:
    models = {model for model, _ in attention_accuracy.ROWS.values()}
    assert models == set(attention_accuracy.SUBJECTS)
    assert all(rounding.window in attention_accuracy.WINDOWS for rounding in attention_accuracy.ROUNDINGS.values())
