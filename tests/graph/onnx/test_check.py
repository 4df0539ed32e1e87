"""Malformed graphs: one line each, in little memory and time; graphs that are only out of order are put in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.graph.onnx.running import assert_matches
from tests.models import BOOL, FLOAT, GraphBuilder, gpt2, mlp
from tvm_ternary.errors import ModelError, TernaryError, UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.onnx.check import check_model, check_size


def reverse(graph: onnx.GraphProto) -> None:
    nodes = list(graph.node)[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def test_an_unsorted_graph_is_sorted() -> None:
    model = gpt2()
    names = [node.name for node in model.graph.node]
    assert check_model(model, "m") is model, "nothing to do"
    reverse(model.graph)
    assert [node.name for node in model.graph.node] == names[::-1]
    ids = np.arange(6).reshape(2, 3)
    ordered = gpt2()
    reverse(ordered.graph)
    imported = import_onnx(ordered)
    assert [node.name for node in ordered.graph.node] == names[::-1], "the model itself is left alone"
    assert imported.outputs == import_onnx(gpt2()).outputs
    assert_matches(check_model(model, "m"), [{"input_ids": ids}])


def test_graphs_inside_are_sorted() -> None:
    g = GraphBuilder()
    x, flag = g.input("x", FLOAT, ["n"]), g.input("flag", BOOL, [])
    value = [helper.make_tensor_value_info("out", FLOAT, ["n"])]
    branch = [helper.make_node("Neg", ["inner"], ["out"]), helper.make_node("Relu", ["outer"], ["inner"])]
    yes = helper.make_graph(branch, "yes", [], value)
    no = helper.make_graph([helper.make_node("Neg", ["outer"], ["out"])], "no", [], value)
    g.node("If", flag, output="y", then_branch=yes, else_branch=no)
    g.node("Abs", x, output="outer")
    g.output("y", FLOAT, None)
    checked = check_model(g.model(), "m")
    assert [node.op_type for node in checked.graph.node] == ["Abs", "If"]
    assert [node.op_type for node in checked.graph.node[1].attribute[0].g.node] in (["Relu", "Neg"], ["Neg"])
    assert_matches(checked, [{"x": np.ones(3, np.float32), "flag": np.array(True)}], constants={"flag": True})


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    """The MLP Gemm_0, Relu_1, Gemm_2 from x to y, after a change."""
    model = mlp()
    change(model)
    return model


def add(target: str, index: int = 0) -> Callable[[onnx.ModelProto], object]:
    return lambda model: getattr(model.graph, target).append(getattr(model.graph, target)[index])


def put(path: str, value: object) -> Callable[[onnx.ModelProto], None]:
    """Set a field: ``graph.node[0].input[0]``."""

    def change(model: onnx.ModelProto) -> None:
        exec(f"model.{path} = value", {"model": model, "value": value})

    return change


BAD: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "a cycle": (
        put("graph.node[0].input[0]", "y"),
        "/Gemm_0: depends on itself: /Gemm_0 -> /Relu_1 -> /Gemm_2 -> /Gemm_0",
    ),
    "a node that reads itself": (
        put("graph.node[1].input[0]", "/Relu_1_output_0"),
        "/Relu_1: depends on itself: /Relu_1 -> /Relu_1",
    ),
    "a missing value": (put("graph.node[1].input[0]", "z"), "/Relu_1: its input z is computed by no node"),
    "an output twice": (
        put("graph.node[1].output[0]", "/Gemm_0_output_0"),
        "/Relu_1: its output /Gemm_0_output_0 is computed or given elsewhere too",
    ),
    "an output that is an input": (put("graph.node[2].output[0]", "x"), "its output x is computed or given elsewhere"),
    "a weight twice": (add("initializer"), "weight layers.0.weight is given twice"),
    "an input twice": (add("input"), "input x is given twice"),
    "a nameless input": (put("graph.input[0].name", ""), "an input of the graph has no name"),
    "a nameless weight": (put("graph.initializer[0].name", ""), "a weight of the graph has no name"),
    "a nameless output": (put("graph.output[0].name", ""), "an output of the graph has no name"),
    "an output of nothing": (put("graph.output[0].name", "z"), "z: is an output of the graph that no node computes"),
    "too few bytes": (
        put("graph.initializer[0].raw_data", b"1234"),
        "weight layers.0.weight is float [24, 10], 960 bytes; the file holds 4",
    ),
    "3 GB in a tiny file": (
        lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), [30000, 30000]),
        "weight layers.0.weight is float [30000, 30000], 3600000000 bytes; the file holds 960",
    ),
    "no element type": (put("graph.initializer[0].data_type", 0), "weight layers.0.weight has element type 0"),
    "an element type of the future": (
        put("graph.initializer[0].data_type", 99),
        "has element type 99, which ONNX does",
    ),
    "a negative dimension": (put("graph.initializer[0].dims[0]", -24), "has shape [-24, 10], which no tensor can have"),
    "a shape beyond all memory": (put("graph.initializer[0].dims[0]", 2**62), "which no tensor can have"),
    "a shape of too many dimensions": (
        lambda model: model.graph.initializer[0].dims.extend([1] * 100000),
        "weight layers.0.weight has 100002 dimensions; expected at most 64",
    ),
    "an operator set of the future": (put("opset_import[0].version", 99), "uses version 99 of the standard operators"),
    "no version": (put("opset_import[0].version", 0), "uses version 0 of the standard operators"),
    "no operator set": (lambda model: model.ClearField("opset_import"), "does not say which version"),
    "two versions": (
        lambda model: model.opset_import.append(helper.make_opsetid("ai.onnx", 12)),
        "imports operator set ai.onnx as 17 and as 12",
    ),
    "an unknown domain": (
        put("graph.node[1].domain", "com.example"),
        "/Relu_1: operator Relu of com.example opset 1 is not",
    ),
    "an input without a shape": (
        lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
        "x: is an input of unknown rank or no tensor",
    ),
    "an input without a type": (
        lambda model: model.graph.input[0].ClearField("type"),
        "x: is an input of unknown rank",
    ),
    "an input of no element type": (
        put("graph.input[0].type.tensor_type.elem_type", 99),
        "x: is an input of element type 99, which ONNX does not have",
    ),
    "an empty matrix": (
        lambda model: model.graph.initializer[0].CopyFrom(helper.make_tensor("layers.0.weight", 1, [0, 10], [])),
        "/Gemm_0: ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(TernaryError) as caught:
        import_onnx(changed(change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_functions_that_call_themselves() -> None:
    imports = [helper.make_opsetid("own", 1), helper.make_opsetid("", 17)]
    functions = [
        helper.make_function("own", name, ["x"], ["y"], [helper.make_node(other, ["x"], ["y"], domain="own")], imports)
        for name, other in (("A", "B"), ("B", "A"))
    ]
    g = GraphBuilder()
    g.node("A", g.input("x", FLOAT, ["n"]), output="y", domain="own")
    g.output("y", FLOAT)
    with pytest.raises(ModelError, match="function A calls itself"):
        import_onnx(g.model(functions=functions))
    with pytest.raises(ModelError, match="function A is defined twice"):
        import_onnx(g.model(functions=[functions[0], functions[0]]))


@pytest.mark.parametrize(
    ("dtype", "values", "places"),
    [
        (TensorProto.FLOAT, [1.0, 2.0, 3.0], 3),
        (TensorProto.BFLOAT16, [1.0, 2.0, 3.0], 3),
        (TensorProto.INT4, [1, 2, 3], 2),
        (TensorProto.BOOL, [True, False, True], 3),
        (TensorProto.COMPLEX64, [1j, 2j, 3j], 6),
        (TensorProto.STRING, [b"a", b"b", b"c"], 3),
    ],
)
def test_sizes_of_every_kind(dtype: int, values: list[object], places: int) -> None:
    tensor = helper.make_tensor("t", dtype, [3], values)
    check_size(tensor, "m")
    tensor.dims[0] = 30
    with pytest.raises(ModelError, match=f"the file holds {places}"):
        check_size(tensor, "m")


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(
    "op", ["Expand", "Tile", "Range", "ConstantOfShape", "Pad", "OneHot", "Concat", "Mul", "MatMul"]
)
def test_little_that_asks_for_much_is_not_folded(op: str, opset: int) -> None:
    """Whether it is imported or refused: neither takes the memory that it asks for."""
    huge, one = 10**11, np.ones(1, np.float32)
    inputs = {
        "Expand": [one, np.array([huge])],
        "Tile": [one, np.array([huge])],
        "Range": [np.array(0), np.array(huge), np.array(1)],
        "ConstantOfShape": [np.array([huge])],
        "Pad": [one, np.array([huge, 0])],
        "OneHot": [np.array([1]), np.array(huge), np.array([0, 1], np.float32)],
        "Concat": [np.ones(2**20, np.int8)] * 200,
        "Mul": [np.ones((2**20, 1), np.int8), np.ones((1, 2**20), np.int8)],
        "MatMul": [np.ones((2**20, 1), np.int8), np.ones((1, 2**20), np.int8)],
    }[op]
    g = GraphBuilder(opset=opset)
    x = g.input("x", FLOAT, ["n"])
    names = {id(array): g.constant(array) for array in inputs}
    made = g.node(op, *(names[id(array)] for array in inputs), **({"axis": 0} if op == "Concat" else {}))
    g.node("Add", x, g.node("ReduceSum", g.node("Cast", made, to=FLOAT), keepdims=0), output="y")
    g.output("y", FLOAT)
    with suppress(UnsupportedOperatorError):
        assert all(array.size < 2**24 for array in import_onnx(g.model()).params.values())


def test_doubling_ends() -> None:
    g = GraphBuilder()
    value = g.constant(np.ones(1024, np.int8))
    for _ in range(40):
        value = g.node("Concat", value, value, axis=0)
    g.node("Add", g.input("x", FLOAT, ["n"]), g.node("ReduceMax", g.node("Cast", value, to=FLOAT)), output="y")
    g.output("y", FLOAT)
    import_onnx(g.model())


@pytest.mark.parametrize("text", ["(" * 5000, "n//0", "n/(n-n)", "9" * 5000, "n*" * 3000 + "n", "f(n)", "n**99", " "])
def test_dimensions_that_are_no_arithmetic(text: str) -> None:
    g = GraphBuilder()
    g.node("Relu", g.input("x", FLOAT, ["n", text]), output="y")
    g.output("y", FLOAT)
    imported = import_onnx(g.model())
    assert len(imported.inputs[0].shape) == 2
