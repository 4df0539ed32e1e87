"""Decoders for whole texts, some of whose attentions have no past that can be left out."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.graph.passes.small_graphs import bindings
from tests.graph.passes.test_cache_attention import grouped
from tests.graph.passes.test_unstack_pasts import HEADS, SIZE, WIDTH, many_operators, model
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.onnx.values import describe
from tvm_ternary.graph.passes.find_pasts import NO_PAST, find_caches
from tvm_ternary.graph.passes.unstack_pasts import unstack_pasts
from tvm_ternary.graph.passes.without_past import without_past


def test_what_may_be_empty_is_told_from_what_is_not() -> None:
    """Of two maxima of a dimension and 0 that an import leaves, one is the dimension."""
    spelled = grouped()
    spelled.graph.node.append(helper.make_node("Slice", ["q", "three", "most", "axis"], ["late"]))
    numbers = {"three": [3], "most": [2**62]}
    spelled.graph.initializer.extend(numpy_helper.from_array(np.array(n), name) for name, n in numbers.items())
    spelled.graph.output.append(helper.make_tensor_value_info("late", TensorProto.FLOAT, ("batch", None, 64)))
    whole = without_past(import_onnx(spelled)).module
    returned = next(value for var, value in bindings(whole) if var == whole["main"].body.body)
    y, late = (describe(field.ty.shape.values[1]) for field in returned.fields)
    assert (y, late) == ("new", "max(new - 3, 0)")


def test_an_attention_without_a_past_stays() -> None:
    """As the attention of a decoder to what its encoder gives."""
    other = [("Transpose", ["k"], ["k_across"], {"perm": [0, 1, 3, 2]}), ("MatMul", ["q", "k_across"], ["s"], {})]
    other += [("Softmax", ["s"], ["p"], {"axis": -1}), ("MatMul", ["p", "v"], ["z"], {})]
    nodes = [helper.make_node(op, inputs, outputs, **options) for op, inputs, outputs, options in other]
    info = helper.make_tensor_value_info("z", TensorProto.FLOAT, ("batch", HEADS, "new", SIZE))
    mixed = unstack_pasts(import_onnx(model([*many_operators(), *nodes], [info])))
    assert find_caches(mixed) == {"past": None, "attention.1": NO_PAST}
    whole = without_past(mixed)
    assert find_caches(whole) == {"attention.0": NO_PAST, "attention.1": NO_PAST}
    assert [str(spec) for spec in whole.inputs] == [f"x: float32[batch, new, {WIDTH}]"]
    assert [spec.name for spec in whole.outputs] == ["y", "z"]
