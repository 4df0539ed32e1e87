"""Normalizations that come with a residual in front of them, and those without a mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of


def simplified_layer_normalization(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``SimplifiedLayerNormalization``: x over its root mean square, times a scale.

    Returns
    -------
    list
        The result, and where it is wanted one over the root mean square, whose axis stays with length one.
    """
    x = emitter.tensor(node.value(0), node)
    rank = len(emitter.known_shape(node.value(0), node))
    axes = list(range(axis_of(int(node.attributes.get("axis", -1)), rank, node), rank))
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    results: list[relax.Expr | None] = [R.nn.rms_norm(x, emitter.tensor(node.value(1), node), axes, epsilon)]
    if any(node.outputs[1:]):
        square = emitter.emit(R.mean(emitter.emit(R.multiply(x, x)), axes, keepdims=True))
        results.append(_inverse_root(emitter, square, epsilon))
    return results


def skip_simplified_layer_normalization(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``SkipSimplifiedLayerNormalization``: the same of input + skip (+ bias); its fourth output is the sum."""
    _refuse_statistics(node)
    total = _sum(emitter, node, (0, 1, 3))
    epsilon = float(node.attributes.get("epsilon", 1e-12))
    return [R.nn.rms_norm(total, emitter.tensor(node.value(2), node), [-1], epsilon), None, None, total]


def skip_layer_normalization(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``SkipLayerNormalization`` of input + skip (+ bias); its fourth output is the sum."""
    _refuse_statistics(node)
    total = _sum(emitter, node, (0, 1, 4))
    return [layer_norm(emitter, node, total, 2, 3), None, None, total]


def layer_norm(emitter: Emitter, node: Node, x: relax.Expr, scale: int, shift: int) -> relax.Expr:
    """Layer norm over the last axis with the inputs that hold scale and, where there is one, shift."""
    gamma = emitter.tensor(node.value(scale), node)
    if node.has(shift):
        beta = emitter.tensor(node.value(shift), node)
    else:
        beta = relax.const(np.zeros(emitter.known_shape(node.value(scale), node), emitter.dtype(x)))
    return R.nn.layer_norm(x, gamma, beta, [-1], float(node.attributes.get("epsilon", 1e-12)))


def _sum(emitter: Emitter, node: Node, indices: Sequence[int]) -> relax.Var:
    terms = [emitter.tensor(node.value(i), node) for i in indices if node.has(i)]
    return functools.reduce(lambda left, right: emitter.emit(R.add(left, right)), terms)


def _refuse_statistics(node: Node) -> None:
    """onnxruntime itself does not compute mean and inverse deviation at inference."""
    if any(node.outputs[1:3]):
        node.refuse("its outputs mean and inv_std_var are wanted", "export the model for inference")


def _inverse_root(emitter: Emitter, square: relax.Expr, epsilon: float) -> relax.Expr:
    dtype = emitter.dtype(square)
    return R.rsqrt(emitter.emit(R.add(square, relax.const(epsilon, dtype))))
