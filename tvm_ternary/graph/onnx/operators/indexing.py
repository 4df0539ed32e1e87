"""Gathers. An index that lies outside of a float table gives NaN instead of reading foreign memory."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.shaping import window
from tvm_ternary.graph.onnx.values import Constant, Dim, Symbols, Value, as_expr, describe, object_array, settle


def gather(emitter: Emitter, node: Node) -> Value:
    """``Gather``: one known position is a slice, anything else a ``take``."""
    table, indices = node.value(0), node.value(1)
    dims = emitter.known_shape(table, node)
    axis = axis_of(node.attributes.get("axis", 0), len(dims), node)
    if isinstance(indices, (Constant, Symbols)) and emitter.shape(indices) == []:
        position = emitter.dims(indices, node)[0]
        return _select(emitter, emitter.tensor(table, node), dims, axis, position)
    if isinstance(table, Constant) and axis == 0 and len(dims) == 2:
        data = emitter.embedding(table, node)
    else:
        data = emitter.tensor(table, node)
    positions = _counted_from_front(emitter, node, indices, dims[axis])
    mode = "nan" if emitter.dtype(table).startswith("float") else "clip"
    return R.take(data, positions, axis, mode)


def _select(emitter: Emitter, data: relax.Expr, dims: list[Dim], axis: int, position: Dim) -> relax.Expr:
    if emitter.algebra.proves(as_expr(position) < 0):
        position = emitter.algebra.simplify(position + dims[axis])
    part = emitter.emit(window(data, [axis], [position], [emitter.algebra.simplify(position + 1)]))
    return R.squeeze(part, [axis])


def _counted_from_front(emitter: Emitter, node: Node, indices: Value, extent: Dim) -> relax.Expr:
    """Indices with negative ones counted from the end, as ONNX allows them to be."""
    tensor = emitter.tensor(indices, node)
    dtype = emitter.dtype(indices)
    if isinstance(indices, Constant) and (indices.array >= 0).all():
        return tensor
    length = emitter.tensor(settle(emitter.algebra, object_array([extent], ()), "int64"))
    if dtype != "int64":
        length = emitter.emit(R.astype(length, dtype))
    wrapped = emitter.emit(R.add(tensor, length))
    return emitter.emit(R.where(emitter.emit(R.less(tensor, relax.const(0, dtype))), wrapped, tensor))


def gather_elements(emitter: Emitter, node: Node) -> relax.Expr:
    """``GatherElements``."""
    dims = emitter.known_shape(node.value(0), node)
    axis = axis_of(node.attributes.get("axis", 0), len(dims), node)
    positions = _counted_from_front(emitter, node, node.value(1), dims[axis])
    return R.gather_elements(emitter.tensor(node.value(0), node), positions, axis)


def gather_nd(emitter: Emitter, node: Node) -> relax.Expr:
    """``GatherND``: the last axis of the indices holds coordinates."""
    dims = emitter.known_shape(node.value(0), node)
    batch = node.attributes.get("batch_dims", 0)
    width = emitter.known_shape(node.value(1), node)[-1]
    if not isinstance(width, int):
        node.refuse(f"the number of coordinates, {describe(width)}, is symbolic")
    indices = emitter.tensor(node.value(1), node)
    extents = emitter.tensor(settle(emitter.algebra, object_array(dims[batch : batch + width]), "int64"))
    wrapped = emitter.emit(R.add(indices, extents))
    positions = emitter.emit(R.where(emitter.emit(R.less(indices, relax.const(0, "int64"))), wrapped, indices))
    return R.gather_nd(emitter.tensor(node.value(0), node), positions, batch)
