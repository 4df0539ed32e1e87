"""Elements by their place. A place outside of a float table gives NaN instead of reading foreign memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from tvm import relax, te, tirx
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.shaping import filled, window
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


def one_hot(emitter: Emitter, node: Node) -> relax.Expr:
    """``OneHot``: a new axis as long as ``depth``; an index outside of it is nowhere."""
    (depth,) = emitter.dims(node.value(1), node)
    dims = emitter.known_shape(node.value(0), node)
    axis = axis_of(node.attributes.get("axis", -1), len(dims) + 1, node)
    places = emitter.tensor(node.value(0), node)
    if emitter.dtype(places) != "int64":
        places = emitter.emit(R.astype(places, "int64"))
    places = emitter.emit(R.expand_dims(_counted_from_front(emitter, node, places, depth), axis))
    numbers = emitter.emit(R.arange(as_expr(0), as_expr(depth), as_expr(1), "int64"))
    numbers = emitter.emit(R.expand_dims(numbers, list(range(1, len(dims) + 1 - axis))))
    values = emitter.tensor(node.value(2), node)
    off, on = (emitter.emit(R.squeeze(emitter.emit(window(values, [0], [i], [i + 1])), [0])) for i in (0, 1))
    return R.where(emitter.emit(R.equal(places, numbers)), on, off)


def eye_like(emitter: Emitter, node: Node) -> relax.Expr:
    """``EyeLike``: ones on a diagonal."""
    rows, columns = emitter.known_shape(node.value(0), node)
    asked = node.attributes.get("dtype", 0)
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(asked)) if asked else emitter.dtype(node.value(0))
    row, column = (emitter.emit(R.arange(as_expr(0), as_expr(n), as_expr(1), "int64")) for n in (rows, columns))
    start = emitter.emit(R.add(row, relax.const(int(node.attributes.get("k", 0)), "int64")))
    return R.astype(emitter.emit(R.equal(emitter.emit(R.expand_dims(start, 1)), column)), dtype)


def reverse_sequence(emitter: Emitter, node: Node) -> relax.Expr:
    """``ReverseSequence``: the first elements of each sequence turned around, the others kept."""
    batch, time = int(node.attributes.get("batch_axis", 1)), int(node.attributes.get("time_axis", 0))

    def compute(data: te.Tensor, lengths: te.Tensor) -> te.Tensor:
        def element(*indices: Any) -> Any:
            places, length = list(indices), lengths(indices[batch])
            places[time] = tirx.if_then_else(places[time] < length, length - 1 - places[time], places[time])
            return data(*places)

        return te.compute(data.shape, element, name="reverse_sequence")

    lengths = emitter.tensor(node.value(1), node)
    return emitter.builder.emit_te(
        compute, emitter.tensor(node.value(0), node), lengths, primfunc_name_hint="reverse_sequence"
    )


def tensor_scatter(emitter: Emitter, node: Node) -> relax.Expr:
    """``TensorScatter``: new rows written into a cache from a place of each sequence on, perhaps around its end."""
    cache, update = (emitter.tensor(node.value(i), node) for i in (0, 1))
    rank = len(emitter.known_shape(node.value(0), node))
    axis = axis_of(node.attributes.get("axis", -2), rank, node)
    circular = node.attributes.get("mode", "linear") == "circular"
    if node.has(2):
        starts = emitter.tensor(node.value(2), node)
    else:
        starts = emitter.emit(filled(emitter.known_shape(cache, node)[:1], np.zeros((), np.int64)))

    def compute(cache: te.Tensor, update: te.Tensor, starts: te.Tensor) -> te.Tensor:
        def element(*indices: Any) -> Any:
            place = indices[axis] - starts(indices[0])
            if circular:
                place = tirx.floormod(place, cache.shape[axis])
            fresh = update(*indices[:axis], place, *indices[axis + 1 :])
            written = tirx.And(place >= 0, place < update.shape[axis])
            return tirx.if_then_else(written, fresh, cache(*indices))

        return te.compute(cache.shape, element, name="tensor_scatter")

    return emitter.builder.emit_te(compute, cache, update, starts, primfunc_name_hint="tensor_scatter")
