"""Symbolic evaluation of shape arithmetic: the nodes between ``Shape`` and the shapes it feeds.

Exporters spell "reshape to (batch, length, heads, -1)" as a dozen nodes on small integer tensors. Run on arrays of
expressions over the symbolic dimensions they vanish, and every reshape, slice and range gets its bounds in closed form.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from tvm import tirx
from tvm.ir import is_prim_expr

from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.values import (
    FLOAT_SYMBOLIC_DTYPES,
    SYMBOLIC_DTYPES,
    Algebra,
    Constant,
    Symbols,
    as_expr,
    object_array,
    settle,
)

LARGEST = 4096
"""Elements of the largest array evaluated symbolically; anything larger is data, not a shape."""

_LARGEST_EXACT = 2**24
_EXACT_IN_FLOAT = frozenset(
    {"Cast", "Identity", "Add", "Sub", "Mul", "Neg", "Min", "Max"}
    | {"Unsqueeze", "Squeeze", "Reshape", "Concat", "Gather", "Slice"}
)
"""Operators that give the same integers when they are done in float."""

_Arrays: TypeAlias = "Sequence[np.ndarray | None]"
_Rule: TypeAlias = "Callable[[Algebra, Node, _Arrays], np.ndarray | list[np.ndarray] | None]"


def evaluate(algebra: Algebra, node: Node) -> list[Constant | Symbols] | None:
    """Evaluate a node all of whose inputs are known or symbolic.

    Returns
    -------
    list[Constant | Symbols] or None
        The outputs; None when the operator, the dtype or the size is not one of shape arithmetic.
    """
    rule = _RULES.get(node.op)
    if rule is None or node.proto.domain not in ("", "ai.onnx"):
        return None
    dtype = _result_dtype(node)
    if dtype not in SYMBOLIC_DTYPES and not (dtype in FLOAT_SYMBOLIC_DTYPES and node.op in _EXACT_IN_FLOAT):
        return None
    if not all(map(is_integral, node.inputs)):
        return None
    arrays = [_objects(value) for value in node.inputs]
    if any(array is not None and array.size > LARGEST for array in arrays):
        return None
    try:
        results = rule(algebra, node, arrays)
    except ZeroDivisionError as error:
        node.refuse(str(error))
    if results is None:
        return None
    return [settle(algebra, array, dtype) for array in (results if isinstance(results, list) else [results])]


def is_integral(value: Any) -> bool:
    """Whether a value, where it is a known float, holds integers that float32 holds exactly."""
    if not isinstance(value, Constant) or value.array.dtype.kind != "f":
        return True
    return bool((value.array == np.rint(value.array)).all() and (np.abs(value.array) < _LARGEST_EXACT).all())


def _objects(value: Any) -> np.ndarray | None:
    if isinstance(value, Symbols):
        return value.values
    if not isinstance(value, Constant):
        return None
    array = value.array.astype(np.int64) if value.array.dtype.kind == "f" else value.array
    return object_array(array.reshape(-1).tolist(), array.shape)


def _result_dtype(node: Node) -> str:
    if node.op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"):
        return "bool"
    if node.op == "Cast":
        return str(onnx.helper.tensor_dtype_to_np_dtype(node.required("to")))
    value = node.inputs[1] if node.op == "Where" else node.inputs[0]
    return value.dtype if isinstance(value, Symbols) else str(value.array.dtype) if isinstance(value, Constant) else ""


def _elementwise(function: Callable[..., Any]) -> _Rule:
    def rule(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
        operands = [array for array in arrays if array is not None]
        shape = np.broadcast_shapes(*(array.shape for array in operands))
        columns = [np.broadcast_to(array, shape).reshape(-1) for array in operands]
        return object_array([function(algebra, *items) for items in zip(*columns, strict=True)], shape)

    return rule


def _reducing(function: Callable[[Algebra, Any, Any], Any]) -> _Rule:
    """A binary function over any number of operands (``Max``, ``Sum``...)."""
    return _elementwise(lambda algebra, *items: functools.reduce(lambda a, b: function(algebra, a, b), items))


def _reduction(function: Callable[[Algebra, Any, Any], Any]) -> _Rule:
    """A reduction over axes (``ReduceProd``...)."""

    def rule(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
        data = _first(arrays)
        axes = node.integers("axes", 1)
        if not axes and node.attributes.get("noop_with_empty_axes", 0):
            return data
        chosen = sorted({axis_of(axis, data.ndim, node) for axis in axes}) if axes else list(range(data.ndim))
        kept = [axis for axis in range(data.ndim) if axis not in chosen]
        rows = data.transpose([*kept, *chosen]).reshape([data.shape[axis] for axis in kept] + [-1])
        flat = rows.reshape(-1, rows.shape[-1])
        results = [functools.reduce(lambda a, b: function(algebra, a, b), row) for row in flat]
        keep = node.attributes.get("keepdims", 1)
        shape = [1 if axis in chosen else size for axis, size in enumerate(data.shape)] if keep else rows.shape[:-1]
        return object_array(results, shape)

    return rule


def _first(arrays: _Arrays) -> np.ndarray:
    assert arrays[0] is not None
    return arrays[0]


def _where(algebra: Algebra, condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, bool):
        return yes if condition else no
    if algebra.equal(yes, no):
        return yes
    return tirx.Select(condition, as_expr(yes), as_expr(no))


def _cast(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
    """Between numbers and booleans; dimensions never come near the end of int32."""
    to_bool = node.required("to") == onnx.TensorProto.BOOL

    def convert(item: Any) -> Any:
        if not is_prim_expr(item):
            return bool(item) if to_bool else int(item)
        is_bool = str(item.ty) == "bool"
        if to_bool:
            return item if is_bool else _negate(algebra, algebra.compare("==", item, 0))
        return tirx.Select(item, as_expr(1), as_expr(0)) if is_bool else item

    data = _first(arrays)
    return object_array([convert(item) for item in data.reshape(-1)], data.shape)


def _negate(algebra: Algebra, item: Any) -> Any:
    return not item if isinstance(item, bool) else tirx.Not(item)


def _both(algebra: Algebra, left: Any, right: Any) -> Any:
    if isinstance(left, bool):
        return right if left else False
    if isinstance(right, bool):
        return left if right else False
    return tirx.And(left, right)


def _either(algebra: Algebra, left: Any, right: Any) -> Any:
    return _negate(algebra, _both(algebra, _negate(algebra, left), _negate(algebra, right)))


def _modulo(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
    if node.attributes.get("fmod", 0):
        return _elementwise(lambda a, x, y: x - a.divide(x, y) * y)(algebra, node, arrays)  # type: ignore[return-value]
    return _elementwise(Algebra.modulo)(algebra, node, arrays)  # type: ignore[return-value]


def _gather(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray | None:
    indices = node.constant(1)
    if indices is None:
        return None
    data = _first(arrays)
    axis = axis_of(node.attributes.get("axis", 0), data.ndim, node)
    picked = np.take(data, indices, axis=axis)
    return picked if isinstance(picked, np.ndarray) else object_array([picked], ())


def _slice(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray | None:
    bounds = [_known(node, name, index) for index, name in enumerate(("starts", "ends", "axes", "steps"), start=1)]
    starts, ends, axes, steps = bounds
    if starts is None or ends is None:
        return None
    data = _first(arrays)
    window = [slice(None)] * data.ndim
    for start, end, axis, step in zip(
        starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
    ):
        stop = None if step < 0 and end < -data.shape[axis] else end
        window[axis_of(axis, data.ndim, node)] = slice(start, stop, step)
    return data[tuple(window)]


def _known(node: Node, attribute: str, index: int) -> list[int] | None:
    if node.has(index) and node.constant(index) is None:
        return None
    return node.integers(attribute, index)


def _concat(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
    return np.concatenate([array for array in arrays if array is not None], axis=node.required("axis"))


def _unsqueeze(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
    return np.expand_dims(_first(arrays), tuple(node.integers("axes", 1) or ()))


def _squeeze(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
    axes = node.integers("axes", 1)
    return np.squeeze(_first(arrays), None if axes is None else tuple(axes))


def _reshape(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray | None:
    data, target = _first(arrays), _known(node, "shape", 1)
    if target is None:
        return None
    keeps_zero = node.attributes.get("allowzero", 0)
    return data.reshape([data.shape[i] if dim == 0 and not keeps_zero else dim for i, dim in enumerate(target)])


def _expand(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray | None:
    data, target = _first(arrays), _known(node, "shape", 1)
    if target is None:
        return None
    shape = np.broadcast_shapes(data.shape, tuple(target))
    return np.broadcast_to(data, shape) if np.prod(shape, dtype=np.int64) <= LARGEST else None


def _transpose(algebra: Algebra, node: Node, arrays: _Arrays) -> np.ndarray:
    return np.transpose(_first(arrays), node.attributes.get("perm"))


def _split(algebra: Algebra, node: Node, arrays: _Arrays) -> list[np.ndarray]:
    data = _first(arrays)
    axis = axis_of(node.attributes.get("axis", 0), data.ndim, node)
    return np.split(data, np.cumsum(split_sizes(data.shape[axis], node))[:-1], axis=axis)


def split_sizes(extent: int, node: Node) -> list[int]:
    """Sizes of the parts of a ``Split`` of a known extent; the last part is smaller where it does not divide."""
    sizes = node.integers("split", 1)
    if sizes is not None:
        return sizes
    parts = node.attributes.get("num_outputs", len(node.outputs))
    size = -(-extent // parts)
    return [max(0, min(size, extent - i * size)) for i in range(parts)]


def _swapped(name: str) -> Callable[[Algebra, Any, Any], Any]:
    return lambda algebra, left, right: algebra.compare(name, right, left)


def _compared(name: str) -> Callable[[Algebra, Any, Any], Any]:
    return lambda algebra, left, right: algebra.compare(name, left, right)


_RULES: dict[str, _Rule] = {
    "Add": _elementwise(lambda _, x, y: operator.add(x, y)),
    "Sub": _elementwise(lambda _, x, y: operator.sub(x, y)),
    "Mul": _elementwise(lambda _, x, y: operator.mul(x, y)),
    "Div": _elementwise(Algebra.divide),
    "Mod": _modulo,
    "Neg": _elementwise(lambda _, x: -x),
    "Abs": _elementwise(lambda algebra, x: algebra.maximum(x, -x)),
    "Min": _reducing(Algebra.minimum),
    "Max": _reducing(Algebra.maximum),
    "Sum": _reducing(lambda _, x, y: x + y),
    "ReduceProd": _reduction(lambda algebra, x, y: algebra.simplify(x * y)),
    "ReduceSum": _reduction(lambda algebra, x, y: algebra.simplify(x + y)),
    "ReduceMax": _reduction(Algebra.maximum),
    "ReduceMin": _reduction(Algebra.minimum),
    "Equal": _elementwise(_compared("==")),
    "Less": _elementwise(_compared("<")),
    "LessOrEqual": _elementwise(_compared("<=")),
    "Greater": _elementwise(_swapped("<")),
    "GreaterOrEqual": _elementwise(_swapped("<=")),
    "And": _elementwise(_both),
    "Or": _elementwise(_either),
    "Not": _elementwise(_negate),
    "Where": _elementwise(_where),
    "Cast": _cast,
    "Identity": lambda _, __, arrays: _first(arrays),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Flatten": lambda _, node, arrays: _flatten(node, _first(arrays)),
    "Expand": _expand,
    "Transpose": _transpose,
    "Split": _split,
}


def _flatten(node: Node, data: np.ndarray) -> np.ndarray:
    axis = node.attributes.get("axis", 1)
    return data.reshape(int(np.prod(data.shape[:axis], dtype=np.int64)), -1)
