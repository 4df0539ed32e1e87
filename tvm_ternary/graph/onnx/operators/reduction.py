"""``ReduceMax`` and ``ReduceMin`` of floats, with infinity as the neutral element.

TVM's own start from the largest finite number, so that the maximum of nothing but minus infinity, as in a row of scores
that is masked altogether, would come out finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.shaping import filled
from tvm_ternary.graph.onnx.values import Value


def extreme(largest: bool) -> Callable[[Emitter, Node], Value]:
    """A converter for ``ReduceMax`` or ``ReduceMin``."""

    def convert(emitter: Emitter, node: Node) -> Value:
        value = node.value(0)
        dims = emitter.known_shape(value, node)
        rank = len(dims)
        axes = node.integers("axes", 1)
        if not axes and node.attributes.get("noop_with_empty_axes", 0):
            return value
        chosen = sorted({axis_of(axis, rank, node) for axis in axes}) if axes else list(range(rank))
        keep = bool(node.attributes.get("keepdims", 1))
        data, dtype = emitter.tensor(value, node), emitter.dtype(value)
        if any(isinstance(dims[axis], int) and dims[axis] == 0 for axis in chosen):
            shape = [1 if axis in chosen else dim for axis, dim in enumerate(dims) if keep or axis not in chosen]
            return filled(shape, np.array(_neutral(dtype, largest), dtype))
        if dtype == "bool":
            reduced = emitter.emit((R.max if largest else R.min)(R.astype(data, "int8"), chosen, keep))
            return R.astype(reduced, dtype)
        if not dtype.startswith("float") or not chosen:
            return (R.max if largest else R.min)(data, chosen, keep)
        name = "reduce_max" if largest else "reduce_min"
        return emitter.builder.emit_te(_float_extreme, data, chosen, keep, largest, primfunc_name_hint=name)

    return convert


def cumulative_product(emitter: Emitter, node: Node) -> Value:
    """``CumProd``."""
    (axis,) = emitter.dims(node.value(1), node)
    axis = axis_of(axis, len(emitter.known_shape(node.value(0), node)), node)
    data, dtype = emitter.tensor(node.value(0), node), emitter.dtype(node.value(0))
    backward, exclusive = (bool(node.attributes.get(name, 0)) for name in ("reverse", "exclusive"))
    if backward:
        data = emitter.emit(R.flip(data, axis))
    result = R.cumprod(data, axis, dtype, exclusive)
    return R.flip(emitter.emit(result), axis) if backward else result


def _neutral(dtype: str, largest: bool) -> float | int | bool:
    """What the maximum (or minimum) of nothing is."""
    if dtype == "bool":
        return not largest
    if dtype.startswith("float"):
        return -np.inf if largest else np.inf
    limits = np.iinfo(dtype)
    return int(limits.min if largest else limits.max)


def _float_extreme(data: te.Tensor, axes: list[int], keep: bool, largest: bool) -> te.Tensor:
    neutral = _neutral(str(data.dtype), largest)
    combine = tirx.max if largest else tirx.min
    reducer = te.comm_reducer(lambda a, b: combine(a, b), lambda dtype: tirx.const(neutral, dtype), name="extreme")
    axes = [int(axis) for axis in axes]
    over = {axis: te.reduce_axis((0, data.shape[axis]), name=f"k{axis}") for axis in axes}
    kept = [axis for axis in range(len(data.shape)) if axis not in over]
    shape = [1 if axis in over else dim for axis, dim in enumerate(data.shape) if keep or axis not in over]

    def compute(*indices: Any) -> Any:
        outer = [indices[axis] for axis in kept] if keep else list(indices)
        position = dict(zip(kept, outer, strict=True)) | over
        return reducer(data(*(position[axis] for axis in range(len(data.shape)))), axis=list(over.values()))

    return te.compute(shape, compute, name="extreme")
