"""The table of whole models: aims beside figures, what is missed in bold. Nothing is measured here."""

from __future__ import annotations

from typing import Any

import pytest
from fetch_models import REAL

from benchmarks.models import ROWS, markdown
from tests.models import gpt2, llama

FILES = {name for package in REAL for name in package.files} | {"nanoguard/model.onnx"}


def line(row: str, scheme: str, ratio: float, **costs: float) -> dict[str, Any]:
    return {
        **{"row": row, "scheme": scheme, "dims": {"batch": 1, "length": 16}, "threads": 2, "time": {"median": 1234.0}},
        **{"ratios": {"ort-float32": ratio, "ort-int8": 1.1}, "error": 0.5, "first_seconds": 0.2, "cpu": "a cpu"},
        **{"load": 0.0, "versions": {"onnxruntime": "1.32.0"}, "commit": "abc"},
        "costs": {"seconds": 70.0, "memory_ratio": 3.0, **costs},
    }


def test_aims_and_what_is_missed() -> None:
    text = markdown([line("MiniLM-L6", "t1a8", 1.4), line("magika", "float", 0.9, memory_ratio=4.5)])
    assert "| MiniLM-L6 | 1 x 16 | 2 | t1a8 | 1.234 | **1.40 (1.5)** | 1.10 (1) |  | 5.0e-01 |" in text
    assert "| magika | 1 x 16 | 2 | float | 1.234 | 0.90 | 1.10 |  | 5.0e-01 |" in text, (
        "an aim for ternary layers only"
    )
    assert "| MiniLM-L6 | t1a8 | **70.0 (60)** | 3.0 (4) | **200 (150)** |" in text
    assert "| magika | float | 70.0 | **4.5 (4)** | **200 (150)** |" in text
    assert markdown([]) == ""


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    row = ROWS[name]
    assert row.aims.keys() <= set(row.schemes.split(","))
    assert row.model in FILES if isinstance(row.model, str) else callable(row.model)


def test_decoders_take_the_sizes_of_the_rows() -> None:
    """In small: the dimensions that the rows name are those of the graphs."""
    for build in (gpt2, llama):
        names = {d.dim_param for v in build(cache="both").graph.input for d in v.type.tensor_type.shape.dim}
        assert {"batch", "length", "past"} <= names
