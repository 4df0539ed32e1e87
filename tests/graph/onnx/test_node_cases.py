"""The onnx package's node tests of the operators that the importer converts itself, and the table made of all."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.graph.onnx.node_cases import NodeCase, node_cases
from tvm_ternary.graph.onnx.operators.contrib.table import CONTRIB
from tvm_ternary.graph.onnx.operators.table import known_operators, own_operators

LEFT_OUT = {
    "training_dropout(?!_zero)": "random numbers",
    "_empty_set": "an input dimension of 0 is read as one that the file leaves open",
}
"""Patterns of case names, and why."""

TABLE = ROOT / "docs" / "operators.md"
AT_ONCE = 3
"""Cases of an operator that the quick run takes."""


@cache
def cases_of(op: str) -> list[NodeCase]:
    """The cases of an operator on tensors that the runtime carries, not those of its function body."""
    return [
        case
        for case in node_cases()
        if case.op == op
        and case.is_numeric
        and case.is_carried
        and "_expanded" not in case.name
        and not any(re.search(pattern, case.name) for pattern in LEFT_OUT)
    ]


def spread(cases: list[NodeCase]) -> list[NodeCase]:
    """A few of the cases, the first and the last among them."""
    places = np.linspace(0, len(cases) - 1, min(AT_ONCE, len(cases))).round().astype(int)
    return [cases[place] for place in places]


@pytest.mark.parametrize("op", own_operators())
def test_some_cases_of_operator(op: str) -> None:
    chosen = spread(cases_of(op))
    assert chosen, f"the onnx package has no case of {op}"
    for case in chosen:
        case.check()


@pytest.mark.slow
@pytest.mark.parametrize("op", own_operators())
def test_all_cases_of_operator(op: str) -> None:
    """Those that the table lists as failing left out."""
    failing = set(re.findall(r"`(test_\w+)`", TABLE.read_text()))
    for case in cases_of(op):
        if case.name not in failing:
            case.check()


def test_the_table_lists_every_operator_that_is_known() -> None:
    rows = re.findall(r"^\| ([\w.]+) \| \d", TABLE.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(known_operators()) <= set(rows), "make it again: python -m tests.graph.onnx.node_table"
    listed = re.findall(r"^- (\w+)$", TABLE.read_text(), re.MULTILINE)
    assert set(listed) == set(CONTRIB), "make it again: python -m tests.graph.onnx.node_table"


def test_the_tables_sums_agree_with_its_rows() -> None:
    text = TABLE.read_text()
    rows = re.findall(r"^\| [\w.]+ \| .* \| (\d+) of (\d+) \|$", text, re.MULTILINE)
    passed, numeric = (sum(int(row[i]) for row in rows) for i in (0, 1))
    assert f"**{passed} of the {numeric} node tests" in text
    assert passed >= 0.85 * numeric
