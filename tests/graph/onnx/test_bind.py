"""Inputs that become constants."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.models import FLOAT, INT64, GraphBuilder
from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.graph.onnx.bind import bind_constants


@pytest.fixture
def model() -> onnx.ModelProto:
    g = GraphBuilder()
    rate = g.input("rate", INT64, [1])
    g.node("Mul", g.input("a", FLOAT, ["n", 4]), g.node("Cast", rate, to=FLOAT), output="y")
    g.node("Relu", g.input("b", FLOAT, ["n"]), output="z")
    g.output("y", FLOAT)
    g.output("z", FLOAT)
    return g.model()


def test_a_number_takes_dtype_and_shape_of_the_input(model: onnx.ModelProto) -> None:
    bound = bind_constants(model, {"rate": 16000.0})
    assert [value.name for value in bound.graph.input] == ["a", "b"]
    array = onnx.numpy_helper.to_array(bound.graph.initializer[-1])
    assert (array.dtype, array.tolist()) == (np.int64, [16000])


def test_a_constant_fixes_its_dimensions(model: onnx.ModelProto) -> None:
    bound = bind_constants(model, {"b": [1, 2, 3]})
    assert [dim.dim_value for dim in bound.graph.input[1].type.tensor_type.shape.dim] == [3, 4]


def test_nothing_to_bind(model: onnx.ModelProto) -> None:
    assert bind_constants(model, {}) == model


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"rate": [1, 2]}, "rate: got a constant of shape [2], expected [1]"),
        ({"a": np.ones((2, 3))}, "a: got a constant of shape [2, 3], expected ['n', 4]"),
        ({"rate": "fast"}, "rate: got a constant 'fast', expected int64"),
        ({"rate": 1.5}, "rate: got a constant 1.5, expected int64"),
        ({"rate": np.float32(np.nan)}, "rate: got a constant np.float32(nan), expected int64"),
        ({"rate": np.array(2.0**70)}, "rate: got a constant 1.1805916207174113e+21, expected int64"),
        ({"a": np.ones((2, 4)), "b": [1]}, "b: its constant has 1 for dimension n, another has 2"),
    ],
)
def test_refused_values(model: onnx.ModelProto, constants: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        bind_constants(model, constants)
    assert str(caught.value) == message


def test_unknown_input(model: onnx.ModelProto) -> None:
    with pytest.raises(OptionError, match="constant speed: the model has no such input; it has rate, a, b"):
        bind_constants(model, {"speed": 1})


def test_a_constant_without_elements(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rates"
    bound = bind_constants(model, {"rate": np.zeros(0, np.int64)})
    assert onnx.numpy_helper.to_array(bound.graph.initializer[-1]).shape == (0,)
