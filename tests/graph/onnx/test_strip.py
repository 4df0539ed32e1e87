"""Which weights of a graph may be left out, and that a graph without them is still the same graph."""

from __future__ import annotations

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper

from tests.models import FLOAT, GraphBuilder, gpt2, mlp
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.onnx.data import is_left_out
from tvm_ternary.graph.onnx.strip import only_ternary, strip_weights, with_initializers
from tvm_ternary.quantize import quantize


def left_out(model: onnx.ModelProto, ternary: set[str] | None = None) -> frozenset[str]:
    imported = import_onnx(model)
    assert imported.onnx is not None
    return only_ternary(imported.onnx.model.graph, imported.onnx.uses, imported.shapes if ternary is None else ternary)


def small(g: GraphBuilder, output: str) -> onnx.ModelProto:
    g.output(output, FLOAT, None)
    return g.model()


def test_a_matrix_is_left_out_and_a_bias_is_not() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["batch", 8])
    g.node("Gemm", x, g.weight("w", 8, 4), g.weight("b", 4), output="y")
    model = small(g, "y")
    assert left_out(model) == {"w"}
    assert left_out(model, set()) == frozenset()


def test_what_is_folded_into_a_matrix_is_left_out() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["batch", 8])
    codes, scale = g.constant(np.ones((8, 4), np.int8), "codes"), g.weight("scale", 4)
    weight = g.node("DequantizeLinear", codes, scale, axis=1)
    g.node("MatMul", x, weight, output="y")
    assert left_out(small(g, "y")) == {"codes", "scale"}


def test_a_weight_that_is_used_otherwise_too_stays() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, [4, 4])
    table, square = g.weight("table", 4, 4), g.weight("square", 4, 4)
    first = g.node("MatMul", g.node("MatMul", x, g.weight("w", 4, 4)), table)
    g.node("Add", g.node("MatMul", first, square), g.node("Transpose", table, perm=[1, 0]), output="y")
    assert left_out(small(g, "y")) == {"w", "square"}


def test_an_output_stays() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["batch", 4])
    g.node("MatMul", x, g.weight("w", 4, 4), output="y")
    g.output("w", FLOAT, [4, 4])
    assert left_out(small(g, "y")) == frozenset()


def test_a_weight_of_two_products_one_of_which_is_float_stays() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["batch", 4])
    w = g.weight("w", 4, 4)
    wide = g.node("Concat", w, w, axis=1)
    g.node("MatMul", g.node("MatMul", x, w, output="h"), wide, output="y")
    model = small(g, "y")
    assert left_out(model) == {"w"}
    names = set(import_onnx(model).shapes)
    assert len(names) == 2
    assert all(left_out(model, {name}) == frozenset() for name in names)


def test_large_constants_of_nodes_are_weights() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["batch", 32])
    value = numpy_helper.from_array(np.ones((32, 16), np.float32))
    g.nodes.append(helper.make_node("Constant", [], ["w"], value=value))
    g.node("MatMul", x, "w", output="y")
    model = with_initializers(small(g, "y"))
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert left_out(model) == {"w"}


def test_a_stripped_graph_imports_as_the_same_module() -> None:
    for model in (mlp(), gpt2()):
        first = import_onnx(model)
        assert first.onnx is not None
        ternary = {name: quantize(first.params[name].T, "t1a8") for name in list(first.shapes)[::2]}
        names = only_ternary(first.onnx.model.graph, first.onnx.uses, ternary)
        stripped, arrays = strip_weights(first.onnx.model, names)
        assert not names & arrays.keys()
        for tensor in stripped.graph.initializer:
            assert is_left_out(tensor) == (tensor.name in names)
            if tensor.name in arrays:  # as a file beside the graph would give it
                tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
        second = import_onnx(stripped, uses=first.onnx.uses, ternary=ternary)
        tvm.ir.assert_structural_equal(first.module, second.module)
        assert list(second.shapes.items()) == list(first.shapes.items())
        for name in first.shapes:
            expected = ternary[name].dequantize().T if name in ternary else first.params[name]
            np.testing.assert_array_equal(second.params[name], expected)
