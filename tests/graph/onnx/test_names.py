"""Names of matrices."""

from __future__ import annotations

import pytest
from onnx import helper

from tests.models import FLOAT, GraphBuilder
from tvm_ternary.graph.onnx.names import bias_names, is_made_up, matrix_name, unique


@pytest.mark.parametrize(
    "name",
    [
        "onnx::MatMul_492",
        "492",
        "val_49",
        "val_49_q",
        "Const_24:0",
        "/encoder/Constant_3_output_0",
        "const_fold_opt__209",
        "MatMul_7",
        "/a/b/Transpose_output_0",
        "tensor_1",
        "a/b/Const:0",
    ],
)
def test_made_up(name: str) -> None:
    assert is_made_up(name)


@pytest.mark.parametrize(
    "name", ["encoder.layer.0.query.weight", "fc", "dense_1/kernel:0", "W", "model/wte", "h.0.mlp.c_fc.weight_q", "w1"]
)
def test_telling(name: str) -> None:
    assert not is_made_up(name)


@pytest.mark.parametrize(
    ("names", "node", "bias", "want"),
    [
        (["fc.weight"], "MatMul_1", "other.bias", "fc.weight"),
        (["/lm_head/Transpose_output_0", "wte.weight"], "/lm_head/MatMul", None, "wte.weight"),
        (["val_49", "val_49_q"], "node_MatMul_48", "layer.0.query.bias", "layer.0.query.weight"),
        (["onnx::MatMul_9"], "/h/0/c_fc/MatMul", "model/h/0/bias_term", "model.h.0.weight_term"),
        (["onnx::MatMul_9"], "/encoder/layer.0/query/MatMul_1", None, "encoder.layer.0.query.weight"),
        (["onnx::MatMul_9"], "MatMul_12", None, "MatMul_12.weight"),
        (["dense/kernel:0"], "dense/MatMul", None, "dense.kernel"),
    ],
)
def test_matrix_names(names: list[str], node: str, bias: str | None, want: str) -> None:
    assert matrix_name(names, helper.make_node("MatMul", ["x", "w"], ["y"], name=node), bias) == want


def test_a_nameless_node_is_called_by_its_output() -> None:
    assert matrix_name([], helper.make_node("MatMul", ["x", "w"], ["scores"]), None) == "scores.weight"


def test_biases_are_found_on_either_side() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["n", 4])
    first = g.node("MatMul", x, g.weight("onnx::MatMul_1", 4, 4), output="first")
    summed = g.node("Add", g.weight("a.bias", 4), first)
    second = g.node("MatMul", summed, g.weight("onnx::MatMul_2", 4, 4), output="second")
    third = g.node("Gemm", g.node("Add", second, g.weight("b.bias", 4)), "onnx::MatMul_1", "a.bias", output="third")
    g.node("Add", g.node("Add", third, x), g.weight("shift", 4), output="y")
    g.output("y", FLOAT)
    assert bias_names(g.model().graph) == {"first": "a.bias", "second": "b.bias", "third": "a.bias"}


def test_unique() -> None:
    assert unique("w", set()) == "w"
    assert unique("w", {"w"}) == "w_1"
    assert unique("w", {"w", "w_1"}) == "w_2"
