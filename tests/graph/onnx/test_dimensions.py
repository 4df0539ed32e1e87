"""Names of dimensions, arithmetic in them, and fixing some."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import FLOAT, GraphBuilder
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.onnx.dimension_text import evaluate_dimension, substitute_dimensions
from tvm_ternary.graph.onnx.dimensions import fix_dimensions, name_dimensions, real_inputs, symbolic_dimensions


def model(*shapes: list[int | str | None]) -> onnx.ModelProto:
    g = GraphBuilder()
    for i, shape in enumerate(shapes):
        g.node("Relu", g.input(f"x{i}", FLOAT, shape), output=f"y{i}")
        g.output(f"y{i}", FLOAT)
    return g.model()


def shapes(model: onnx.ModelProto) -> list[list[int | str]]:
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in real_inputs(model.graph)]


def test_nameless_dimensions() -> None:
    named = name_dimensions(model([None, 3], ["n", None]))
    assert shapes(named) == [["x0_dim_0", 3], ["n", "x1_dim_1"]]
    assert symbolic_dimensions(named) == ["x0_dim_0", "n", "x1_dim_1"]
    assert shapes(name_dimensions(model(["?", "?"]))) == [["x0_dim_0", "x0_dim_1"]], "no name, and not equal"


def test_weights_are_no_inputs() -> None:
    proto = model(["n"])
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", FLOAT, [2]))
    proto.graph.initializer.append(onnx.helper.make_tensor("w", FLOAT, [2], [1.0, 2.0]))
    assert [value.name for value in real_inputs(proto.graph)] == ["x0"]


def test_fixing() -> None:
    proto = model(["batch", "past + now"], ["batch", "past"], ["now", 4])
    assert shapes(fix_dimensions(proto, {"batch": 2, "now": 1})) == [[2, "past + 1"], [2, "past"], [1, 4]]
    assert shapes(fix_dimensions(proto, {"past": 3, "now": 1})) == [["batch", 4], ["batch", 3], [1, 4]]
    assert shapes(fix_dimensions(proto, {"now": "batch"})) == [
        ["batch", "past + batch"],
        ["batch", "past"],
        ["batch", 4],
    ]
    assert shapes(fix_dimensions(proto, {})) == shapes(proto)


def test_fixing_to_arithmetic() -> None:
    proto = model(["batch", "height", "width"], ["2*height + 1", "past + now"], ["past", "now"])
    assert shapes(fix_dimensions(proto, {"height": "32*rows", "past": "now"})) == [
        ["batch", "32 * rows", "width"],
        ["2 * (32 * rows) + 1", "now + now"],
        ["now", "now"],
    ]
    assert shapes(fix_dimensions(proto, {"height": "width - 2*4", "width": 40}))[:2] == [
        ["batch", 32, 40],
        [65, "past + now"],
    ]


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"size": 1}, "dimension size: the model has no such symbolic dimension; it has batch, length"),
        ({"batch": "size"}, "dimension size: the model has no such symbolic dimension; it has batch, length"),
        ({"batch": 0}, "dimension batch: got 0, expected a size of at least 1"),
        ({"length": -3}, "dimension length: got -3, expected a size of at least 1"),
    ],
)
def test_refusals(dims: dict[str, int | str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        fix_dimensions(model(["batch", "length"]), dims)
    assert str(caught.value) == message


def test_a_difference_that_leaves_nothing() -> None:
    with pytest.raises(OptionError, match="dimension n - 3: is 0 then, expected a size of at least 1"):
        fix_dimensions(model(["n - 3"], ["n"]), {"n": 3})


@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from(["a + b", "2*a", "a*b - 1", "(a + b)//2", "a/b"]))
def test_arithmetic(a: int, b: int, text: str) -> None:
    want = eval(text.replace("/", "//").replace("////", "//"), {"a": a, "b": b})
    assert evaluate_dimension(text, {"a": a, "b": b}) == want
    assert evaluate_dimension(substitute_dimensions(text, {"a": a, "b": b}), {}) == want


@pytest.mark.parametrize("text", ["batch-size", "unk__214", "?", "a b", "input.shape[0]", "", "f(a)", "a if b else c"])
def test_what_is_no_arithmetic_is_a_name(text: str) -> None:
    assert evaluate_dimension(text, {"a": 1}) is None
    assert substitute_dimensions(text, {"other": 2}) == text
    assert substitute_dimensions(text, {text: 2}) == "2"
