"""How many rows the tables have that inputs choose from."""

from __future__ import annotations

import onnx
import pytest

from tests.models import FLOAT, INT64, GraphBuilder, gpt2, llama, mlp
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.index_limits import index_limits


@pytest.mark.parametrize(("model", "limits"), [(gpt2(layers=1), 50), (llama(layers=1), 50), (mlp(), None)])
def test_only_token_numbers_are_limited(model: onnx.ModelProto, limits: int | None) -> None:
    assert index_limits(import_onnx(model).module) == ({} if limits is None else {"input_ids": limits})


def two_tables(second: str) -> onnx.ModelProto:
    g = GraphBuilder()
    ids, other = g.input("ids", INT64, ["n"]), g.input("other", INT64, ["n"])
    index = {"ids": ids, "sum": g.node("Add", ids, other), "twice": g.node("Mul", ids, g.constant(2))}[second]
    rows = g.node("Gather", g.weight("large", 9, 4), ids, axis=0)
    g.node("Add", rows, g.node("Gather", g.weight("small", 5, 4), index, axis=0), output="y")
    g.node("Identity", other, output="z")
    g.output("y", FLOAT, ["n", 4])
    g.output("z", INT64, ["n"])
    return g.model()


def test_the_smallest_of_several_tables_limits() -> None:
    assert index_limits(import_onnx(two_tables("ids")).module) == {"ids": 5}


@pytest.mark.parametrize("second", ["sum", "twice"])
def test_numbers_that_are_computed_limit_nothing(second: str) -> None:
    assert index_limits(import_onnx(two_tables(second)).module) == {"ids": 9}
