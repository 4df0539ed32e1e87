"""Operators that move elements without computing any: reshape, expand, slice, split, join and fill."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from tvm import relax, tirx
from tvm.ir import is_prim_expr
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.symbolic import is_integral, split_sizes
from tvm_ternary.graph.onnx.values import Constant, Dim, Symbols, Value, as_expr, describe, object_array, settle


def shape(emitter: Emitter, node: Node) -> Value:
    """``Shape``, or the part of it between ``start`` and ``end``."""
    dims = emitter.shape(node.value(0))
    part = slice(node.attributes.get("start", 0), node.attributes.get("end"))
    if dims is not None:
        return settle(emitter.algebra, object_array(dims[part]), "int64")
    tensor = emitter.tensor(node.value(0))
    whole = emitter.emit(R.shape_to_tensor(emitter.emit(R.shape_of(tensor))))
    start, end, _ = part.indices(tensor.ty.ndim)
    return window(whole, [0], [start], [end])


def size(emitter: Emitter, node: Node) -> Value:
    """``Size``: the number of elements."""
    dims = emitter.known_shape(node.value(0), node)
    return settle(emitter.algebra, object_array([emitter.algebra.product(dims)], ()), "int64")


def reshape(emitter: Emitter, node: Node) -> Value:
    """``Reshape`` with 0 (keep) and -1 (the rest) resolved."""
    target = node.attributes["shape"] if node.op == "Reshape" and "shape" in node.attributes else None
    dims = emitter.known_shape(node.value(0), node)
    goal = list(target) if target is not None else emitter.dims(node.value(1), node)
    if not node.attributes.get("allowzero", 0):
        goal = [dims[i] if isinstance(dim, int) and dim == 0 else dim for i, dim in enumerate(goal)]
    rest = [i for i, dim in enumerate(goal) if isinstance(dim, int) and dim == -1]
    if rest:
        goal[rest[0]] = _rest(emitter, node, dims, [dim for i, dim in enumerate(goal) if i != rest[0]])
    return _reshaped(emitter, node, goal)


def _rest(emitter: Emitter, node: Node, dims: Sequence[Dim], others: Sequence[Dim]) -> Dim:
    exact = emitter.algebra.quotient(dims, others)
    if exact is not None:
        return exact
    if any(isinstance(dim, int) and dim == 0 for dim in others):
        node.refuse("a dimension of -1 beside one of 0")
    return emitter.algebra.divide(emitter.algebra.product(dims), emitter.algebra.product(others))


def _reshaped(emitter: Emitter, node: Node, goal: Sequence[Dim]) -> Value:
    if same_shape(emitter, emitter.known_shape(node.value(0), node), goal):
        return node.value(0)
    target = relax.ShapeExpr([as_expr(dim) for dim in goal])
    if any(isinstance(dim, int) and dim == 0 for dim in goal):  # TVM's reshape of nothing divides by its size
        return R.zeros(target, emitter.dtype(node.value(0)))
    return R.reshape(emitter.tensor(node.value(0), node), target)


def same_shape(emitter: Emitter, left: Sequence[Dim], right: Sequence[Dim]) -> bool:
    """Whether two shapes are equal for all values of the symbolic dimensions."""
    return len(left) == len(right) and all(map(emitter.algebra.equal, left, right))


def flatten(emitter: Emitter, node: Node) -> Value:
    """``Flatten`` to two dimensions at ``axis``."""
    dims = emitter.known_shape(node.value(0), node)
    axis = node.attributes.get("axis", 1)
    axis += len(dims) if axis < 0 else 0
    product = emitter.algebra.product
    return _reshaped(emitter, node, [product(dims[:axis]), product(dims[axis:])])


def unsqueeze(emitter: Emitter, node: Node) -> Value:
    """``Unsqueeze``: axes count in the result."""
    axes = node.integers("axes", 1) or []
    rank = len(emitter.known_shape(node.value(0), node)) + len(axes)
    return R.expand_dims(emitter.tensor(node.value(0), node), sorted(axis_of(axis, rank, node) for axis in axes))


def squeeze(emitter: Emitter, node: Node) -> Value:
    """``Squeeze``; that a symbolic dimension is one is checked when the module runs."""
    dims = emitter.known_shape(node.value(0), node)
    axes = node.integers("axes", 1)
    if axes is None:
        chosen = [axis for axis, dim in enumerate(dims) if isinstance(dim, int) and dim == 1]
    else:
        chosen = sorted({axis_of(axis, len(dims), node) for axis in axes})
    data = emitter.tensor(node.value(0), node)
    if any(is_prim_expr(dims[axis]) for axis in chosen):
        ones = [1 if axis in chosen else as_expr(dim) for axis, dim in enumerate(dims)]
        data = emitter.builder.match_cast(data, relax.TensorType(ones, emitter.dtype(node.value(0))))
    return R.squeeze(data, chosen) if chosen else node.value(0)


def expand(emitter: Emitter, node: Node) -> Value:
    """``Expand``: broadcasting in both directions; one that changes nothing vanishes."""
    dims = emitter.known_shape(node.value(0), node)
    goal = emitter.dims(node.value(1), node)
    rank = max(len(dims), len(goal))
    ours, theirs = ([1] * (rank - len(side)) + list(side) for side in (dims, goal))
    result = [_broadcast(emitter, node, a, b) for a, b in zip(ours, theirs, strict=True)]
    if same_shape(emitter, dims, result):
        return node.value(0)
    return R.broadcast_to(emitter.tensor(node.value(0), node), relax.ShapeExpr([as_expr(dim) for dim in result]))


def _broadcast(emitter: Emitter, node: Node, dim: Dim, target: Dim) -> Dim:
    if isinstance(dim, int) and dim == 1:
        return target
    if (isinstance(target, int) and target == 1) or emitter.algebra.equal(dim, target):
        return dim
    return node.refuse(f"dimension {describe(dim)} cannot be shown to broadcast to {describe(target)}")


def concat(emitter: Emitter, node: Node) -> Value:
    """``Concat``."""
    parts = [emitter.tensor(node.value(i), node) for i in range(len(node.inputs))]
    rank = len(emitter.known_shape(node.value(0), node))
    return R.concat(parts, axis_of(node.required("axis"), rank, node)) if len(parts) > 1 else node.value(0)


def split(emitter: Emitter, node: Node) -> list[Value]:
    """``Split`` into given or equal sizes."""
    dims = emitter.known_shape(node.value(0), node)
    axis = axis_of(node.attributes.get("axis", 0), len(dims), node)
    extent = dims[axis]
    if isinstance(extent, int):
        sizes: list[Dim] = list(split_sizes(extent, node))
    elif (given := node.integers("split", 1)) is not None:
        sizes = list(given)
    else:
        parts = len(node.outputs)
        part = emitter.algebra.quotient([extent], [parts])
        if part is None:
            node.refuse(f"dimension {describe(extent)} cannot be shown to be a multiple of {parts}")
        sizes = [part] * parts
    data = emitter.tensor(node.value(0), node)
    ends = [emitter.algebra.simplify(end) for end in np.cumsum(object_array(sizes))]
    starts = [0, *ends[:-1]]
    return [window(data, [axis], [a], [b]) for a, b in zip(starts, ends, strict=True)]


def window(data: relax.Expr, axes: list[int], starts: Sequence[Dim], ends: Sequence[Dim]) -> relax.Expr:
    """A part of a tensor whose bounds are known to lie within it."""
    ones = [as_expr(1)] * len(axes)
    bounds = [[as_expr(dim) for dim in side] for side in (starts, ends)]
    return R.strided_slice(data, axes, *bounds, ones, assume_inbound=True)


def tile(emitter: Emitter, node: Node) -> Value:
    """``Tile``, as a broadcast along a new axis before each repeated one."""
    dims = emitter.known_shape(node.value(0), node)
    repeats = emitter.dims(node.value(1), node)
    apart = [part for dim in dims for part in (1, dim)]
    spread = [part for dim, count in zip(dims, repeats, strict=True) for part in (count, dim)]
    joined = [emitter.algebra.simplify(dim * count) for dim, count in zip(dims, repeats, strict=True)]
    data = emitter.tensor(node.value(0), node)
    for step, goal in ((R.reshape, apart), (R.broadcast_to, spread)):
        data = emitter.emit(step(data, relax.ShapeExpr([as_expr(dim) for dim in goal])))
    return R.reshape(data, relax.ShapeExpr([as_expr(dim) for dim in joined]))


def constant_of_shape(emitter: Emitter, node: Node) -> relax.Expr:
    """``ConstantOfShape``: a float32 zero unless a value is given."""
    dims = emitter.dims(node.value(0), node)
    proto = node.attributes.get("value")
    fill = np.zeros((), np.float32) if proto is None else onnx.numpy_helper.to_array(proto).reshape(())
    return filled(dims, fill)


def filled(dims: Sequence[Dim], fill: np.ndarray) -> relax.Expr:
    """A tensor of one value, a scalar; TVM's ``full`` fails on infinity and NaN."""
    target, dtype = relax.ShapeExpr([as_expr(dim) for dim in dims]), str(fill.dtype)
    value = relax.const(fill, dtype)
    plain = dtype == "bool" or bool(np.isfinite(fill.astype(np.float64)))
    return R.full(target, value, dtype) if plain else R.broadcast_to(value, target)


def sequence(emitter: Emitter, node: Node) -> Value | list[Value]:
    """``Range`` between integers that are known or symbolic, so that its length is; one over data is left to TVM."""
    bounds = [node.value(i) for i in range(3)]
    dtype = emitter.dtype(bounds[0])
    if not all(isinstance(bound, (Constant, Symbols)) and is_integral(bound) for bound in bounds):
        return convert_with_tvm(emitter, node)
    start, limit, step = (emitter.dims(bound, node)[0] for bound in bounds)
    if not isinstance(step, int):
        return convert_with_tvm(emitter, node)
    algebra = emitter.algebra
    span = algebra.simplify(limit - start if step > 0 else start - limit)
    stride = abs(step)
    count = algebra.maximum(algebra.divide(algebra.simplify(span + stride - 1), stride), 0)
    if step == 1:
        return R.arange(as_expr(start), as_expr(algebra.simplify(start + count)), as_expr(1), dtype)
    result = emitter.emit(R.arange(as_expr(0), as_expr(count), as_expr(1), dtype))
    result = emitter.emit(R.multiply(result, relax.const(step, dtype)))
    if isinstance(start, int) and start == 0:
        return result
    first = settle(algebra, object_array([start], ()), dtype)
    return R.add(result, emitter.tensor(first))


def transpose(emitter: Emitter, node: Node) -> Value:
    """``Transpose``; the default reverses the axes."""
    rank = len(emitter.known_shape(node.value(0), node))
    order = list(node.attributes.get("perm", range(rank)[::-1]))
    return node.value(0) if order == list(range(rank)) else R.permute_dims(emitter.tensor(node.value(0), node), order)


def space_to_depth(emitter: Emitter, node: Node) -> relax.Expr:
    """``SpaceToDepth``: the places within a block before the channels, or behind them in mode CRD."""
    batch, channels, *sides = emitter.known_shape(node.value(0), node)
    block = int(node.required("blocksize"))
    parts = [emitter.algebra.quotient([side], [block]) for side in sides]
    if None in parts:
        node.refuse(f"sides {describe(sides)} cannot be shown to be multiples of {block}")
    high, wide = parts
    order = [0, 1, 3, 5, 2, 4] if node.attributes.get("mode", "DCR") == "CRD" else [0, 3, 5, 1, 2, 4]
    apart = relax.ShapeExpr([as_expr(dim) for dim in (batch, channels, high, block, wide, block)])
    joined = relax.ShapeExpr([as_expr(dim) for dim in (batch, channels * block * block, high, wide)])
    data = emitter.emit(R.reshape(emitter.tensor(node.value(0), node), apart))
    return R.reshape(emitter.emit(R.permute_dims(data, order)), joined)


def triangle(emitter: Emitter, node: Node) -> relax.Expr:
    """``Trilu`` with a diagonal that is known."""
    k = node.constant(1) if node.has(1) else np.zeros((), np.int64)
    if k is None:
        node.refuse("its diagonal is symbolic")
    operator = R.triu if node.attributes.get("upper", 1) else R.tril
    return operator(emitter.tensor(node.value(0), node), int(k.reshape(())))


def strided(emitter: Emitter, node: Node) -> Value:
    """``Slice`` with every bound resolved to lie within the tensor."""
    dims = emitter.known_shape(node.value(0), node)
    starts, ends = (_bounds(emitter, node, name, i) for i, name in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None:
        node.refuse("starts or ends are missing")
    axes = [axis_of(axis, len(dims), node) for axis in node.integers("axes", 3) or range(len(starts))]
    steps = node.integers("steps", 4) or [1] * len(axes)
    data = emitter.tensor(node.value(0), node)
    begins, stops, strides = [], [], []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            data, (begin, stop) = _flipped(emitter, data, dims[axis], axis, start, end)
        else:
            stop = _limit(emitter, end, dims[axis])  # first, for what it assumes holds for the beginning too
            begin = _inside(emitter, start, dims[axis])
            stop = emitter.algebra.maximum(stop, begin)
        begins.append(begin)
        stops.append(stop)
        strides.append(abs(step))
    whole = all(
        isinstance(b, int) and b == 0 and emitter.algebra.equal(e, dims[axis]) and s == 1
        for axis, b, e, s in zip(axes, begins, stops, strides, strict=True)
    )
    if whole and all(step > 0 for step in steps):
        return node.value(0)
    bounds = [[as_expr(dim) for dim in side] for side in (begins, stops, strides)]
    return R.strided_slice(data, axes, *bounds, assume_inbound=True)


def _bounds(emitter: Emitter, node: Node, attribute: str, index: int) -> list[Dim] | None:
    if attribute in node.attributes:
        return list(node.attributes[attribute])
    return emitter.dims(node.value(index), node) if node.has(index) else None


def _inside(emitter: Emitter, position: Dim, extent: Dim) -> Dim:
    """A position counted from the front and brought into [0, extent]."""
    algebra = emitter.algebra
    return algebra.minimum(algebra.maximum(_from_front(emitter, position, extent), 0), extent)


def _from_front(emitter: Emitter, position: Dim, extent: Dim) -> Dim:
    algebra = emitter.algebra
    negative = algebra.compare("<", position, 0)
    if isinstance(negative, bool):
        return algebra.simplify(position + extent) if negative else position
    return tirx.Select(negative, as_expr(position) + extent, as_expr(position))


def _limit(emitter: Emitter, end: Dim, extent: Dim) -> Dim:
    """The end of a slice.

    A table of fixed length cut to a symbolic one (position ids to the sequence length) limits that dimension: beyond
    the table's end the model itself would fail at the next addition.
    """
    inside = _inside(emitter, end, extent)
    if is_prim_expr(end) and isinstance(extent, int) and not emitter.algebra.equal(inside, end):
        return end if emitter.limit(end, extent) else inside
    return inside


def _flipped(
    emitter: Emitter, data: relax.Expr, extent: Dim, axis: int, start: Dim, end: Dim
) -> tuple[relax.Expr, tuple[Dim, Dim]]:
    """Turn an axis around, so that a slice with a negative step becomes one with a positive step."""
    algebra = emitter.algebra
    first = algebra.minimum(_from_front(emitter, start, extent), algebra.simplify(extent - 1))
    beyond = isinstance(end, int) and isinstance(extent, int) and end < -extent
    far = isinstance(end, int) and end < -(2**31)
    last = -1 if beyond or far else algebra.maximum(_from_front(emitter, end, extent), -1)
    turned = emitter.emit(R.flip(data, axis))
    begin = algebra.simplify(extent - 1 - first)
    return turned, (begin, algebra.maximum(algebra.simplify(extent - 1 - last), begin))
