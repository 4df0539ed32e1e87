"""Passes on the ONNX graph: unused nodes, functions, composed operators."""

from __future__ import annotations

import onnx
from onnx import helper

from tests.models import BOOL, FLOAT, GraphBuilder
from tvm_ternary.graph.onnx.functions import expand_operators, inline_functions
from tvm_ternary.graph.onnx.prune import prune_nodes


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_unused_nodes_go() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["n"])
    g.node("Exp", g.node("Neg", x))
    g.node("Relu", x, output="y")
    g.output("y", FLOAT, ["n"])
    assert operators(prune_nodes(g.model())) == ["Relu"]


def test_what_a_branch_reads_stays() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["n"])
    used, flag = g.node("Neg", x), g.input("flag", BOOL, [])
    value = [helper.make_tensor_value_info("out", FLOAT, ["n"])]
    inner = helper.make_graph([helper.make_node("Exp", [used], ["out"])], "inner", [], value)
    outer = helper.make_graph(
        [helper.make_node("If", [flag], ["out"], then_branch=inner, else_branch=inner)], "outer", [], value
    )
    g.node("If", flag, output="y", then_branch=outer, else_branch=outer)
    g.output("y", FLOAT, ["n"])
    assert operators(prune_nodes(g.model())) == ["Neg", "If"]


def test_functions_that_call_functions() -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    inner = helper.make_function("own", "Inner", ["a"], ["b"], [helper.make_node("Exp", ["a"], ["b"])], opsets)
    call = [helper.make_node("Inner", ["a"], ["b"], domain="own"), helper.make_node("Neg", ["b"], ["c"])]
    outer = helper.make_function("own", "Outer", ["a"], ["c"], call, opsets)
    g = GraphBuilder()
    g.node("Outer", g.input("x", FLOAT, ["n"]), output="y", domain="own")
    g.output("y", FLOAT, ["n"])
    assert operators(inline_functions(g.model(functions=[inner, outer]))) == ["Exp", "Neg"]


def test_composed_operators_are_written_out_until_all_are_known() -> None:
    g = GraphBuilder(opset=18)
    g.node("Mish", g.input("x", FLOAT, ["n"]), output="y")
    g.output("y", FLOAT, ["n"])
    assert operators(expand_operators(g.model(), lambda domain, op: op != "Mish")) == ["Softplus", "Tanh", "Mul"]
    expanded = operators(expand_operators(g.model(), lambda domain, op: op not in ("Mish", "Softplus")))
    assert "Softplus" not in expanded
    assert {"Exp", "Log", "Tanh"} <= set(expanded)


def test_weights_survive_the_expansion() -> None:
    g = GraphBuilder(opset=23)
    g.node("RMSNormalization", g.input("x", FLOAT, ["n", 4]), g.weight("scale", 4), output="y")
    g.output("y", FLOAT, ["n", 4])
    model = g.model(producer_name="someone")
    expanded = expand_operators(model, lambda domain, op: op != "RMSNormalization")
    assert "ReduceMean" in operators(expanded)
    assert [value.name for value in expanded.graph.input] == ["x"]
    assert list(expanded.graph.initializer) == list(model.graph.initializer)
    assert expanded.producer_name == "someone"


def test_known_operators_stay() -> None:
    g = GraphBuilder(opset=18)
    g.node("Mish", g.input("x", FLOAT, ["n"]), output="y")
    g.output("y", FLOAT, ["n"])
    assert operators(expand_operators(g.model(), lambda domain, op: True)) == ["Mish"]


def test_an_operator_that_is_neither_known_nor_composed_stays() -> None:
    g = GraphBuilder()
    g.node("Det", g.input("x", FLOAT, [3, 3]), output="y")
    g.output("y", FLOAT, [])
    assert operators(expand_operators(g.model(), lambda domain, op: False)) == ["Det"]


def test_attributes_that_a_node_leaves_out_have_their_defaults() -> None:
    g = GraphBuilder(opset=28)
    g.node("SwiGLU", g.input("a", FLOAT, ["n"]), g.input("b", FLOAT, ["n"]), output="y")
    g.output("y", FLOAT, ["n"])
    (swish, product) = expand_operators(g.model(), lambda domain, op: op != "SwiGLU").graph.node
    assert [(a.name, a.f) for a in swish.attribute] == [("alpha", 1.0)]
    assert product.op_type == "Mul"


def test_a_body_that_depends_on_inputs_left_out_is_written_out() -> None:
    g = GraphBuilder(opset=27)
    inputs = [g.input("x", FLOAT, [1, 4, 5]), g.weight("w", 4, 1, 3), "", g.input("past", FLOAT, [1, 4, 2])]
    g.nodes_of("CausalConvWithState", *inputs, outputs=["y", "present"], activation="silu")
    g.output("y", FLOAT)
    g.output("present", FLOAT)
    expanded = expand_operators(g.model(), lambda domain, op: op != "CausalConvWithState")
    assert {"Concat", "Conv", "Slice", "Sigmoid"} <= set(operators(expanded))
    assert [(item.domain, item.version) for item in expanded.opset_import] == [("", 27)]
    assert not expanded.functions
