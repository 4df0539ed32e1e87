"""Shape arithmetic and the operators it feeds, with symbolic dimensions, against onnxruntime at several sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.onnx.running import Compiled, assert_matches
from tests.models import BOOL, FLOAT, INT64, GraphBuilder
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

SIZES = [(1, 1), (2, 3), (5, 8)]


def cases() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((m, n, 6)).astype(np.float32)} for m, n in SIZES]


def graph(build: Callable[[GraphBuilder, str, str, str], str], dtype: int = INT64) -> onnx.ModelProto:
    """A model whose output ``build`` makes of x (m, n, 6) and the vectors [m] and [n]."""
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["m", "n", 6])
    g.node("Identity", build(g, x, g.dim(x, 0), g.dim(x, 1)), output="y")
    g.output("y", dtype)
    return g.model()


ARITHMETIC: dict[str, Callable[[GraphBuilder, str, str, str], str]] = {
    "sum": lambda g, x, m, n: g.node("Add", m, g.node("Mul", n, g.constant([3]))),
    "division": lambda g, x, m, n: g.node("Div", g.node("Add", m, n), g.constant([2])),
    "negative_division": lambda g, x, m, n: g.node("Div", g.node("Neg", n), g.constant([2])),
    "modulo": lambda g, x, m, n: g.node("Mod", g.node("Sub", m, g.constant([4])), g.constant([3])),
    "fmod": lambda g, x, m, n: g.node("Mod", g.node("Sub", m, g.constant([4])), g.constant([3]), fmod=1),
    "absolute": lambda g, x, m, n: g.node("Abs", g.node("Sub", m, n)),
    "extremes": lambda g, x, m, n: g.node("Max", g.node("Min", m, n), g.constant([2])),
    "product": lambda g, x, m, n: g.node("ReduceProd", g.node("Shape", x), axes=[0], keepdims=0),
    "total": lambda g, x, m, n: g.node("ReduceSum", g.node("Shape", x), g.constant([0])),
    "size": lambda g, x, m, n: g.node("Size", x),
    "part_of_the_shape": lambda g, x, m, n: g.node("Shape", x, start=-2, end=3),
    "reversed": lambda g, x, m, n: g.node(
        "Slice", g.node("Shape", x), *map(g.constant, ([-1], [np.iinfo(np.int64).min], [0], [-1]))
    ),
    "grid": lambda g, x, m, n: g.node(
        "Transpose", g.node("Expand", g.node("Concat", m, n, axis=0), g.constant([2, 2])), perm=[1, 0]
    ),
    "split": lambda g, x, m, n: g.nodes_of(
        "Split", g.node("Shape", x), g.constant([1, 2]), outputs=[None, None], axis=0
    )[1],
    "undecided": lambda g, x, m, n: g.node("Where", g.node("Less", m, n), m, g.constant([7])),
    "flags": lambda g, x, m, n: g.node(
        "Cast", g.node("Or", g.node("Equal", m, n), g.node("Not", g.node("LessOrEqual", m, n))), to=INT64
    ),
    "more_flags": lambda g, x, m, n: g.node(
        "Cast", g.node("And", g.node("Greater", m, n), g.node("GreaterOrEqual", m, g.constant([2]))), to=INT64
    ),
    "through_float": lambda g, x, m, n: g.node(
        "Cast", g.node("Mul", g.node("Cast", g.node("Add", m, n), to=FLOAT), g.constant([2.0])), to=INT64
    ),
    "through_int32": lambda g, x, m, n: g.node(
        "Cast", g.node("Mul", g.node("Cast", m, to=onnx.TensorProto.INT32), g.constant(np.array([5], "i4"))), to=INT64
    ),
    "reshaped": lambda g, x, m, n: g.node(
        "Squeeze", g.node("Flatten", g.node("Reshape", g.node("Shape", x), g.constant([1, 0 - 1])), axis=1)
    ),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_leaves_no_tensor_computation(name: str) -> None:
    imported = assert_matches(graph(ARITHMETIC[name]), cases())
    allowed = {"relax.shape_to_tensor", "relax.reshape", "relax.astype"}
    bindings = [binding for block in imported.module["main"].body.blocks for binding in block.bindings]
    used = {binding.value.op.name for binding in bindings if hasattr(binding.value, "op")}
    assert used <= allowed


def _some_indices(g: GraphBuilder, x: str) -> str:
    """Integers from -6 to 5 in the shape of x."""
    return g.node(
        "Cast", g.node("Clip", g.node("Mul", x, g.constant(4.0)), g.constant(-6.0), g.constant(5.0)), to=INT64
    )


TENSORS: dict[str, Callable[[GraphBuilder, str, str, str], str]] = {
    "flat_heads": lambda g, x, m, n: g.reshape(x, m, n, 2, -1),
    "kept_by_zero": lambda g, x, m, n: g.node("Reshape", x, g.constant([0, -1])),
    "merged": lambda g, x, m, n: g.reshape(x, g.node("Mul", m, n), 6),
    "one_row": lambda g, x, m, n: g.node("Reshape", x, g.constant([-1])),
    "flattened": lambda g, x, m, n: g.node("Flatten", x, axis=-1),
    "repeated": lambda g, x, m, n: g.node("Tile", x, g.node("Concat", g.constant([2]), n, g.constant([1]), axis=0)),
    "expanded": lambda g, x, m, n: g.node(
        "Expand",
        g.node("Unsqueeze", x, g.constant([2])),
        g.node("Concat", g.constant([1, 1]), n, g.constant([1]), axis=0),
    ),
    "filled": lambda g, x, m, n: g.node(
        "ConstantOfShape", g.node("Concat", n, m, axis=0), value=onnx.numpy_helper.from_array(np.array([2.5], "f4"))
    ),
    "filled_with_infinity": lambda g, x, m, n: g.node(
        "ConstantOfShape", g.node("Shape", x), value=onnx.numpy_helper.from_array(np.array([-np.inf], "f4"))
    ),
    "zeros": lambda g, x, m, n: g.node("ConstantOfShape", g.node("Shape", x)),
    "counted": lambda g, x, m, n: g.node(
        "Cast", g.node("Range", g.constant(2), g.node("Squeeze", g.node("Add", m, n)), g.constant(3)), to=FLOAT
    ),
    "counted_down": lambda g, x, m, n: g.node(
        "Cast", g.node("Range", g.node("Squeeze", n), g.constant(-2), g.constant(-2)), to=FLOAT
    ),
    "counted_in_float": lambda g, x, m, n: g.node(
        "Range", g.constant(0.0), g.node("Cast", g.node("Squeeze", n), to=FLOAT), g.constant(1.0)
    ),
    "counted_from_data": lambda g, x, m, n: g.node(
        "Range", g.constant(0.0), g.node("ReduceMax", g.node("Abs", x), keepdims=0), g.constant(0.25)
    ),
    "lower": lambda g, x, m, n: g.node("Trilu", g.node("Transpose", x, perm=[2, 0, 1]), g.constant(1), upper=0),
    "last": lambda g, x, m, n: g.node("Gather", x, g.constant(-1), axis=1),
    "last_by_shape": lambda g, x, m, n: g.node(
        "Gather", x, g.node("Squeeze", g.node("Sub", n, g.constant([1]))), axis=1
    ),
    "some": lambda g, x, m, n: g.node("Gather", x, g.constant([[0, -1], [5, -6]]), axis=2),
    "elements": lambda g, x, m, n: g.node("GatherElements", x, _some_indices(g, x), axis=2),
    "up_to_shape": lambda g, x, m, n: g.node("Slice", x, g.constant([0]), n, g.constant([1])),
    "tail": lambda g, x, m, n: g.node("Slice", x, g.constant([-2]), g.constant([2**31 - 1]), g.constant([1])),
    "halves": lambda g, x, m, n: g.nodes_of("Split", x, outputs=[None, None], axis=2)[1],
    "symbolic_halves": lambda g, x, m, n: g.nodes_of(
        "Split", g.node("Concat", x, x, axis=1), outputs=[None, None], axis=1
    )[1],
    "joined": lambda g, x, m, n: g.node("Concat", x, g.node("Neg", x), axis=1),
    "scaled_by_length": lambda g, x, m, n: g.node("Div", x, g.node("Sqrt", g.node("Cast", n, to=FLOAT))),
    "same": lambda g, x, m, n: g.node("Expand", g.node("Slice", x, g.constant([0]), m), g.node("Shape", x)),
    "highest": lambda g, x, m, n: g.node("ReduceMax", x, axes=[1], keepdims=0),
}


@pytest.mark.parametrize("name", TENSORS)
def test_operators_on_symbolic_shapes(name: str) -> None:
    assert_matches(graph(TENSORS[name], FLOAT), cases())


def test_squeezing_a_symbolic_dimension_is_checked_when_it_runs() -> None:
    compiled = Compiled(import_onnx(graph(lambda g, x, m, n: g.node("Squeeze", x, g.constant([0])), FLOAT)))
    assert compiled({"x": np.ones((1, 3, 6), dtype=np.float32)})[0].shape == (3, 6)
    with pytest.raises(Exception, match=r"(?i)shape|mismatch"):
        compiled({"x": np.ones((2, 3, 6), dtype=np.float32)})


bounds = st.one_of(st.integers(-8, 8), st.sampled_from([2**63 - 1, -(2**63), 2**31 - 1]))


@settings(max_examples=25)
@given(bounds, bounds, st.integers(-3, 3).filter(bool))
def test_slices(start: int, end: int, step: int) -> None:
    g = GraphBuilder()
    parts = [g.constant([start]), g.constant([end])]
    g.node("Slice", g.input("x", FLOAT, ["n"]), *parts, g.constant([0]), g.constant([step]), output="y")
    g.node("Slice", g.input("z", FLOAT, [5]), *parts, g.constant([-1]), g.constant([step]), output="w")
    g.output("y", FLOAT)
    g.output("w", FLOAT)
    compiled = Compiled(import_onnx(g.model()))
    fixed = np.arange(5, dtype=np.float32)
    stop = None if step < 0 and end < -5 else end
    for size in (1, 2, 5, 7):
        x = np.arange(size, dtype=np.float32)
        got = compiled({"x": x, "z": fixed})
        np.testing.assert_array_equal(got[0], x[slice(start, None if step < 0 and end < -size else end, step)])
        np.testing.assert_array_equal(got[1], fixed[slice(start, stop, step)])


def test_a_table_bounds_the_length() -> None:
    g = GraphBuilder()
    ids = g.input("ids", INT64, ["n"])
    table = g.weight("positions", 9, 4)
    rows = g.node("Slice", table, g.constant([0]), g.node("Shape", ids), g.constant([0]))
    g.node("Add", rows, g.node("Gather", g.weight("words", 7, 4), ids), output="y")
    g.output("y", FLOAT)
    imported = assert_matches(g.model(), [{"ids": np.arange(n) % 7} for n in (1, 9)])
    assert imported.bounds == {"n": 9}
    assert imported.outputs[0].shape == ("n", 4)


def test_an_index_outside_of_a_table_gives_nan() -> None:
    g = GraphBuilder()
    g.node("Gather", g.weight("words", 7, 4), g.input("ids", INT64, ["n"]), output="y")
    g.output("y", FLOAT)
    rows = Compiled(import_onnx(g.model()))({"ids": np.array([0, -7, 7, -8, 10**12])})[0]
    assert np.isnan(rows[2:]).all()
    np.testing.assert_array_equal(rows[0], rows[1])
    assert np.isfinite(rows[:2]).all()


def test_a_row_of_minus_infinity_stays_so() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["n", 3])
    g.node("ReduceMax", x, axes=[1], output="highest")
    g.node("ReduceMin", g.node("Neg", x), axes=[0, 1], keepdims=0, output="lowest")
    g.output("highest", FLOAT)
    g.output("lowest", FLOAT)
    x_value = np.full((2, 3), -np.inf, dtype=np.float32)
    highest, lowest = Compiled(import_onnx(g.model()))({"x": x_value})
    assert (highest == -np.inf).all()
    assert lowest == np.inf


@pytest.mark.parametrize(("dtype", "least"), [("float32", -np.inf), ("int32", -(2**31)), ("bool", False)])
def test_the_maximum_of_nothing(dtype: str, least: float) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    g = GraphBuilder(opset=20)
    nothing = g.node("Slice", g.input("x", kind, ["n", 3]), g.constant([0]), g.constant([0]), g.constant([1]))
    g.node("ReduceMax", nothing, g.constant([1]), output="y")
    g.output("y", kind)
    got = Compiled(import_onnx(g.model()))({"x": np.ones((2, 3), dtype)})[0]
    assert got.tolist() == [[least], [least]]


def test_booleans_compare() -> None:
    g = GraphBuilder()
    g.node("Equal", g.input("a", BOOL, ["n"]), g.input("b", BOOL, ["n"]), output="y")
    g.output("y", BOOL)
    assert_matches(g.model(), [{"a": np.array([True, True, False]), "b": np.array([True, False, False])}])


def test_large_constants_are_made_when_they_are_needed() -> None:
    g = GraphBuilder()
    shape = g.constant([5000, 5000])
    big = g.node("Expand", g.constant(np.ones((1, 1), np.float32)), shape)
    total = g.node("ReduceSum", g.node("Mul", big, g.input("x", FLOAT, [1])), keepdims=1)
    g.node("Identity", total, output="y")
    g.output("y", FLOAT)
    module = import_onnx(g.model()).module
    assert any("broadcast_to" in str(binding.value) for binding in module["main"].body.blocks[0].bindings)


def test_random_numbers_are_not_folded() -> None:
    g = GraphBuilder()
    g.node("Add", g.input("x", FLOAT, [2]), g.node("RandomNormal", shape=[2]), output="y")
    g.output("y", FLOAT)
    with pytest.raises(UnsupportedOperatorError, match="RandomNormal"):
        import_onnx(g.model())


def test_constants_are_folded_by_their_own_operator_set() -> None:
    """Since opset 13 the axes of Unsqueeze and Squeeze are inputs; before, attributes."""
    g = GraphBuilder(opset=11)
    row = g.node("Unsqueeze", g.weight("w", 4), axes=[0])
    g.node(
        "Mul", g.input("x", FLOAT, [3, 1]), g.node("Squeeze", g.node("Unsqueeze", row, axes=[0]), axes=[0]), output="y"
    )
    g.output("y", FLOAT, [3, 4])
    assert_matches(g.model(), [{"x": np.arange(3, dtype=np.float32).reshape(3, 1)}])


def test_a_folded_node_may_have_outputs_that_nobody_wants() -> None:
    g = GraphBuilder()
    steps, gates, state = g.weight("steps", 3, 1, 2), g.weight("gates", 1, 16, 2), g.weight("state", 1, 16, 4)
    g.nodes_of("LSTM", steps, gates, state, outputs=["", "last"], hidden_size=4)
    g.node("Add", g.input("x", FLOAT, [1, 1, 4]), "last", output="y")
    g.output("y", FLOAT, [1, 1, 4])
    assert_matches(g.model(), [{"x": np.zeros((1, 1, 4), np.float32)}])


def test_what_the_reference_has_in_a_later_version_only() -> None:
    g = GraphBuilder(opset=17)
    small = g.constant(np.arange(4, dtype=np.int8))
    wide = g.node("DequantizeLinear", small, g.constant(0.5), g.constant(np.array(1, np.int8)))
    g.node("Add", g.input("x", FLOAT, [4]), wide, output="y")
    g.output("y", FLOAT, [4])
    assert_matches(g.model(), [{"x": np.zeros(4, np.float32)}])
