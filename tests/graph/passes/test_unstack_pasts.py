"""A past of keys and values in one tensor: two inputs where it is given back alike, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from tests.ternary_matmul import NATIVE
from tvm_ternary.convert.attention_modes import apply_choices, choose_caches, read_modes
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.graph.passes.find_pasts import find_caches
from tvm_ternary.graph.passes.unstack_pasts import unstack_pasts

from .small_graphs import bindings, operators, random

HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE
Nodes = list[onnx.NodeProto]


def model(nodes: Nodes, more: Sequence[onnx.ValueInfoProto] = ()) -> onnx.ModelProto:
    def info(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs = [info("x", "batch", "new", WIDTH), info("past", 2, "batch", HEADS, "past", SIZE)]
    outputs = [info("y", "batch", "new", WIDTH), info("present", 2, "batch", HEADS, "total", SIZE), *more]
    matrices = [numpy_helper.from_array(random(WIDTH, 3 * WIDTH), "w")]
    numbers = {f"_{n}": np.array(n) for n in (0, 1)} | {"_00": np.array([0]), "heads": np.array([0, 0, HEADS, SIZE])}
    numbers["rows"] = np.array([0, 0, WIDTH])
    constants = [numpy_helper.from_array(array, name) for name, array in numbers.items()]
    graph = helper.make_graph(nodes, "stacked", inputs, outputs, [*matrices, *constants])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def one_operator() -> Nodes:
    """As onnxruntime's optimizer leaves GPT-2."""
    operands, options = ["x", "w", "", "", "past"], {"domain": "com.microsoft", "num_heads": HEADS}
    return [helper.make_node("Attention", operands, ["y", "present"], unidirectional=1, **options)]


def many_operators(first: str = "key", second: str = "value") -> Nodes:
    """As torch exports it."""
    made = [("MatMul", ["x", "w"], ["product"], {})]
    made += [("Split", ["product"], ["q0", "k0", "v0"], {"axis": 2})]
    for part in "qkv":
        made += [("Reshape", [f"{part}0", "heads"], [f"{part}1"], {})]
        made += [("Transpose", [f"{part}1"], [part], {"perm": [0, 2, 1, 3]})]
    for number, (name, new) in enumerate((("key", "k"), ("value", "v"))):
        made += [("Gather", ["past", f"_{number}"], [f"past_{name}"], {"axis": 0})]
        made += [("Concat", [f"past_{name}", new], [name], {"axis": 2})]
    made += [("Transpose", ["key"], ["keys"], {"perm": [0, 1, 3, 2]}), ("MatMul", ["q", "keys"], ["scores"], {})]
    made += [("Softmax", ["scores"], ["weights"], {"axis": -1}), ("MatMul", ["weights", "value"], ["mixed"], {})]
    made += [("Transpose", ["mixed"], ["apart"], {"perm": [0, 2, 1, 3]}), ("Reshape", ["apart", "rows"], ["y"], {})]
    made += [("Unsqueeze", [name, "_00"], [f"lone_{name}"], {}) for name in (first, second)]
    made += [("Concat", [f"lone_{first}", f"lone_{second}"], ["present"], {"axis": 0})]
    return [helper.make_node(op, inputs, outputs, **options) for op, inputs, outputs, options in made]


def joined(imported: ImportedModel) -> list[tuple[relax.Expr, relax.Var]]:
    """The past in front of each join, and what is joined; keys first."""
    return [
        (value.args[0].fields[0], var)
        for var, value in bindings(imported.module)
        if isinstance(value, relax.Call) and value.op.name == "relax.concat"
    ]


@pytest.mark.parametrize("nodes", [one_operator(), many_operators()], ids=["operator", "operators"])
def test_two_inputs_and_two_outputs(nodes: Nodes) -> None:
    imported = import_onnx(model(nodes))
    assert find_caches(imported) == {"attention.0": "has a past that is one tensor for keys and values"}
    apart = unstack_pasts(imported)
    assert find_caches(apart) == {"past": None}
    assert [str(spec) for spec in apart.inputs[1:]] == [f"past: float32[batch, {HEADS}, past, {SIZE}]"] * 2
    assert [spec.name for spec in apart.outputs] == ["y", "present", "present"]
    pasts, presents = zip(*joined(apart), strict=True)
    assert [*apart.module["main"].params[1:3]] == [*pasts]
    returned = next(value for var, value in bindings(apart.module) if var == apart.module["main"].body.body)
    assert [*returned.fields[1:]] == [*presents]
    choices = choose_caches(imported, read_modes("ternary-keys-values"), (2, 2), 64)
    cached = apply_choices(imported, choices, NATIVE)
    assert [(cache.name, cache.value) for cache in cached.caches] == [("past", "past")]
    assert [[spec.name for spec in specs] for specs in (cached.inputs, cached.outputs)] == [["x"], ["y"]]
    assert "concat" not in operators(cached.module)
    # A past that stays an input stays as it is.
    assert apply_choices(imported, {}, NATIVE) is imported


def test_a_present_that_is_stacked_otherwise() -> None:
    swapped = import_onnx(model(many_operators("value", "key")))
    assert unstack_pasts(swapped) is swapped
    with pytest.raises(OptionError, match="cannot be ternary-keys: it has a past that is one tensor"):
        choose_caches(swapped, read_modes("ternary-keys"), (2, 2), 64)


def test_a_half_that_something_else_reads() -> None:
    nodes = [*many_operators(), helper.make_node("Neg", ["past_key"], ["negative"])]
    more = [helper.make_tensor_value_info("negative", TensorProto.FLOAT, ("batch", HEADS, "past", SIZE))]
    read = import_onnx(model(nodes, more))
    assert unstack_pasts(read) is read


@pytest.mark.parametrize(
    ("op", "operands"),
    [("Mul", {"half": np.array(0.5, np.float32)}), ("Slice", {"1": [1], "8": [8], "axis": [3]})],
    ids=["scaled", "shorter"],
)
def test_halves_that_are_not_the_past_as_it_is(op: str, operands: dict[str, Any]) -> None:
    """An input in the place of one would not be scaled, or too long."""
    nodes = many_operators()
    for node in nodes:
        node.input[:] = ["changed" if name == "past" else name for name in node.input]
    changed = model([helper.make_node(op, ["past", *operands], ["changed"]), *nodes])
    changed.graph.initializer.extend(numpy_helper.from_array(np.array(x), name) for name, x in operands.items())
    imported = import_onnx(changed, {"past": 8})
    assert unstack_pasts(imported) is imported


def test_halves_of_another_order() -> None:
    """Tokens before heads."""
    nodes = [helper.make_node("Transpose", ["past"], ["turned"], perm=[1, 3, 0, 2, 4])]
    for node in many_operators():
        if node.op_type == "Gather":
            node = helper.make_node("Gather", ["turned", node.input[1]], node.output, axis=2)
        elif node.op_type == "Transpose" and node.output[0] in "kv":
            node = helper.make_node("Identity", node.input, node.output)
        elif node.op_type == "Concat" and node.output[0] in ("key", "value"):
            name = node.output[0]
            nodes += [helper.make_node("Concat", node.input, [f"{name}_rows"], axis=1)]
            node = helper.make_node("Transpose", [f"{name}_rows"], [name], perm=[0, 2, 1, 3])
        elif node.op_type == "Unsqueeze":
            node = helper.make_node("Unsqueeze", [node.input[0] + "_rows", node.input[1]], node.output)
        nodes.append(node)
    turned = model(nodes)
    turned.graph.output[1].CopyFrom(helper.make_tensor_value_info("present", TensorProto.FLOAT, [None] * 5))
    imported = import_onnx(turned)
    assert unstack_pasts(imported) is imported


def test_a_past_of_a_fixed_length() -> None:
    fixed = import_onnx(model(one_operator()), {"past": 8})
    with pytest.raises(OptionError, match=r"attention past: .* has a past of a fixed length"):
        choose_caches(fixed, read_modes("ternary-keys-values"), (2, 2), 64)
