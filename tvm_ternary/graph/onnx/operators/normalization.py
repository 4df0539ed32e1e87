"""Layer, RMS, batch and Lp normalization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.operators.shaping import same_shape
from tvm_ternary.graph.onnx.values import Dim, Value, as_expr


def layer_normalization(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``LayerNormalization`` and, where they are wanted, the mean and the inverse deviation."""
    x = emitter.tensor(node.value(0), node)
    shape, dtype = emitter.known_shape(node.value(0), node), emitter.dtype(node.value(0))
    axis = axis_of(node.attributes.get("axis", -1), len(shape), node)
    axes = list(range(axis, len(shape)))
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    scale = emitter.tensor(node.value(1), node)
    if node.has(2):
        bias = emitter.tensor(node.value(2), node)
    else:
        bias = relax.const(np.zeros(emitter.known_shape(node.value(1), node), dtype))
    results: list[relax.Expr | None] = [R.nn.layer_norm(x, scale, bias, axes, epsilon)]
    if any(node.outputs[1:]):
        mean = emitter.emit(R.mean(x, axes, keepdims=True))
        variance = emitter.emit(R.variance(x, axes, keepdims=True))
        deviation = emitter.emit(R.sqrt(R.add(variance, relax.const(epsilon, dtype))))
        results += [mean, R.divide(relax.const(1.0, dtype), deviation)]
    return results


def rms_normalization(emitter: Emitter, node: Node) -> relax.Expr:
    """``RMSNormalization`` over the axes from ``axis`` on."""
    x = emitter.tensor(node.value(0), node)
    dims, dtype = emitter.known_shape(node.value(0), node), emitter.dtype(node.value(0))
    axis = axis_of(node.attributes.get("axis", -1), len(dims), node)
    scale = _spread(emitter, node, node.value(1), dims[axis:])
    if emitter.dtype(scale) != dtype:
        scale = emitter.emit(R.astype(scale, dtype))
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    if axis:
        return R.nn.rms_norm(x, scale, list(range(axis, len(dims))), epsilon)
    rows = emitter.emit(R.expand_dims(x, 0))  # TVM's needs an axis that stays
    return R.squeeze(emitter.emit(R.nn.rms_norm(rows, scale, list(range(1, len(dims) + 1)), epsilon)), [0])


def _spread(emitter: Emitter, node: Node, value: Value, dims: Sequence[Dim]) -> relax.Expr:
    """A tensor broadcast to the axes that are normalized."""
    tensor = emitter.tensor(value, node)
    if same_shape(emitter, emitter.known_shape(value, node), dims):
        return tensor
    return emitter.emit(R.broadcast_to(tensor, relax.ShapeExpr([as_expr(dim) for dim in dims])))


def lp_normalization(emitter: Emitter, node: Node) -> relax.Expr:
    """``LpNormalization`` with p of 1 or 2; a row of zeros stays one."""
    x = emitter.tensor(node.value(0), node)
    dims, dtype = emitter.known_shape(node.value(0), node), emitter.dtype(node.value(0))
    axis = axis_of(node.attributes.get("axis", -1), len(dims), node)
    if node.attributes.get("p", 2) == 1:
        norm = emitter.emit(R.sum(emitter.emit(R.abs(x)), axis, keepdims=True))
    else:
        norm = emitter.emit(R.sqrt(emitter.emit(R.sum(emitter.emit(R.multiply(x, x)), axis, keepdims=True))))
    empty = emitter.emit(R.equal(norm, relax.const(0, dtype)))
    return R.divide(x, emitter.emit(R.where(empty, relax.const(1, dtype), norm)))


def batch_normalization(emitter: Emitter, node: Node) -> Value | list[Value]:
    """``BatchNormalization``; in training mode by the batch's statistics, which the running ones move to."""
    if not node.attributes.get("training_mode", 0):
        return convert_with_tvm(emitter, node)
    x, scale, shift, mean, variance = (emitter.tensor(node.value(i), node) for i in range(5))
    rank, dtype = len(emitter.known_shape(node.value(0), node)), emitter.dtype(node.value(0))
    others = [axis for axis in range(rank) if axis != 1]
    wide = [0, *range(2, rank)]
    now = [emitter.emit(statistic(x, others)) for statistic in (R.mean, R.variance)]
    deviation = emitter.emit(R.sqrt(R.add(now[1], relax.const(float(node.attributes.get("epsilon", 1e-5)), dtype))))
    factor = emitter.emit(R.divide(scale, deviation))
    centred = emitter.emit(R.subtract(x, emitter.emit(R.expand_dims(now[0], wide))))
    scaled = emitter.emit(R.multiply(centred, emitter.emit(R.expand_dims(factor, wide))))
    result = R.add(scaled, emitter.emit(R.expand_dims(shift, wide)))
    kept = float(node.attributes.get("momentum", 0.9))

    def moved(old: relax.Expr, new: relax.Expr) -> relax.Expr:
        return R.add(R.multiply(old, relax.const(kept, dtype)), R.multiply(new, relax.const(1 - kept, dtype)))

    return [result, moved(mean, now[0]), moved(variance, now[1])]
