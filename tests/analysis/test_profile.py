"""What a profile's calls cost at least, and the tables and the trace made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.analysis.test_report import MANIFEST
from tvm_ternary.analysis.profile import (
    Ceiling,
    Cost,
    activation_bits,
    as_document,
    layers_table,
    operators_table,
    write_trace,
)
from tvm_ternary.runtime.manifest import LayerInfo
from tvm_ternary.runtime.profile import Argument, Call, Profile

PRODUCT = Call(
    "f", "a", 2e-6, 4e-6, (Argument("int8", (2, 64)), Argument("uint32", (256,)), Argument("float32", (2, 16)))
)
OTHER = replace(PRODUCT, start=8e-6, seconds=2e-6)
ADD = Call("g", "", 12e-6, 1e-6, (Argument("float32", (2, 16)), Argument("float32", (2, 16))))
MACHINE = Call("vm.builtin.alloc_tensor", "", 1e-6, 5e-7, ())
PROFILE = Profile((MACHINE, PRODUCT, OTHER, ADD), 10e-6, 3)
CEILING = Ceiling(1e9, {8: 4e9, 32: 1e9})
TABLE = LayerInfo("words", (1000, 8), "int8", None, 8.0, None, None, "rule", 0.01, None)
ROWS = Call(
    "take", "words", 0.0, 1e-6, (Argument("int8", (1000, 8)), Argument("int64", (2, 3)), Argument("float32", (2, 3, 8)))
)


def test_a_product_is_two_operations_an_output_and_weight() -> None:
    cost = Cost.of(PRODUCT, MANIFEST.layers[0], CEILING)
    assert cost.operations == 2 * (2 * 16) * 64
    assert cost.bytes == 2 * 64 + 4 * 256 + 4 * 2 * 16
    assert cost.floor == max(cost.bytes / 1e9, cost.operations / 4e9)
    assert Cost.of(PRODUCT, MANIFEST.layers[0], None).floor == 0
    convolution = replace(
        PRODUCT, layer="b", arguments=(Argument("float32", (1, 3, 9)), Argument("float32", (1, 8, 8)))
    )
    assert Cost.of(convolution, MANIFEST.layers[1], CEILING).operations == 2 * (8 * 8) * (3 * 2)


def test_of_a_table_only_rows_are_read() -> None:
    cost = Cost.of(ROWS, TABLE, CEILING)
    assert (cost.operations, cost.bytes) == (0, 8 * 6 + 2 * 4 * 48)
    assert cost.floor == cost.bytes / 1e9


@pytest.mark.parametrize(("kernel", "bits"), [("matmul_a8", 8), ("matmul_a1", 1), ("matmul_a32", 32), (None, 32)])
def test_activation_bits(kernel: str | None, bits: int) -> None:
    assert activation_bits(replace(TABLE, kernel=kernel)) == bits


def test_operators() -> None:
    table = operators_table(PROFILE, MANIFEST, CEILING)
    assert [row[:4] for row in table.rows] == [
        ("f", "matmul_a8", "2", "0.006"),
        ("g", "", "1", "0.001"),
        ("virtual machine", "", "1", "0.003"),
    ]
    assert table.rows[0][4:] == ("60.0%", "1", "0.4", "43%")
    assert {row[-1] for row in operators_table(PROFILE, MANIFEST).rows} == {""}
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_layers() -> None:
    table = layers_table(PROFILE, MANIFEST, CEILING)
    assert [row[:3] for row in table.rows] == [("a", "2", "0.006")]


def test_document() -> None:
    document = as_document(PROFILE, MANIFEST, CEILING)
    assert (document["seconds"], document["runs"]) == (10e-6, 3)
    assert [call["layer"] for call in document["calls"]] == [None, "a", "a", None]
    assert json.loads(json.dumps(document)) == document


def test_trace(tmp_path: Path) -> None:
    write_trace(PROFILE, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(event["name"], event["cat"], event["ph"]) for event in events[:2]] == [
        ("vm.builtin.alloc_tensor", "machine", "X"),
        ("f", "operator", "X"),
    ]
    assert events[1]["ts"] == pytest.approx(2)
    assert events[1]["dur"] == pytest.approx(4)
    assert events[1]["args"] == {"layer": "a", "tensors": ["int8[2, 64]", "uint32[256]", "float32[2, 16]"]}
