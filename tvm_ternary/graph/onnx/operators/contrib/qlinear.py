"""Operators between 8-bit tensors: what the integers stand for, the operator on that, and back to integers."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.matrix import gemm
from tvm_ternary.graph.onnx.operators.quantized import dequantized, quantized


def binary(operator: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Callable[[Emitter, Node], relax.Expr]:
    """A converter for an operator of two tensors, ``QLinearAdd`` or ``QLinearMul``."""

    def convert(emitter: Emitter, node: Node) -> relax.Expr:
        left, right = (_floats(emitter, node, index) for index in (0, 3))
        return _back(emitter, node, emitter.emit(operator(left, right)), 6)

    return convert


def sigmoid(emitter: Emitter, node: Node) -> relax.Expr:
    """``QLinearSigmoid``."""
    return _back(emitter, node, emitter.emit(R.sigmoid(_floats(emitter, node, 0))), 3)


def leaky_relu(emitter: Emitter, node: Node) -> relax.Expr:
    """``QLinearLeakyRelu``."""
    alpha = float(node.attributes.get("alpha", 0.01))
    return _back(emitter, node, emitter.emit(R.nn.leakyrelu(_floats(emitter, node, 0), alpha)), 3)


def global_average_pool(emitter: Emitter, node: Node) -> relax.Expr:
    """``QLinearGlobalAveragePool``."""
    x = _floats(emitter, node, 0)
    rank = emitter.rank(x)
    axes = list(range(1, rank - 1) if node.attributes.get("channels_last", 0) else range(2, rank))
    return _back(emitter, node, emitter.emit(R.mean(x, axes, keepdims=True)), 3)


def concat(emitter: Emitter, node: Node) -> relax.Expr:
    """``QLinearConcat``: the scale and zero point of the result come first."""
    parts = [_floats(emitter, node, index) for index in range(2, len(node.inputs), 3)]
    axis = axis_of(int(node.required("axis")), emitter.rank(parts[0]), node)
    return _back(emitter, node, emitter.emit(R.concat(parts, axis)), 0)


def qgemm(emitter: Emitter, node: Node) -> relax.Expr:
    """``QGemm``; its bias counts in steps of alpha times both scales. Without a scale of the result that is float."""
    x = dequantized(emitter, node, 0, 1, 2, -1)
    weight = dequantized(emitter, node, 3, 4, 5, 0 if node.attributes.get("transB", 0) else -1)
    product = emitter.emit(gemm(emitter, Node(node.proto, node.opset, (x, weight), node.attributes)))
    if node.has(6):
        bias = emitter.emit(R.astype(emitter.tensor(node.value(6), node), "float32"))
        for step in (node.value(1), node.value(4)):
            bias = emitter.emit(R.multiply(bias, emitter.tensor(step, node)))
        alpha = float(node.attributes.get("alpha", 1.0))
        if alpha != 1.0:
            bias = emitter.emit(R.multiply(bias, relax.const(alpha, "float32")))
        product = emitter.emit(R.add(product, bias))
    return _back(emitter, node, product, 7) if node.has(7) else product


def _floats(emitter: Emitter, node: Node, index: int) -> relax.Expr:
    """A tensor whose scale and zero point are the inputs behind it."""
    return emitter.tensor(dequantized(emitter, node, index, index + 1, index + 2), node)


def _back(emitter: Emitter, node: Node, x: relax.Expr, scale: int) -> relax.Expr:
    """Integers of the first input's type, with the scale and zero point that are inputs from ``scale`` on."""
    integers = next(value for value in node.inputs[0 if scale else 2 :] if value is not None)
    return quantized(emitter, node, x, node.value(scale), node.optional(scale + 1), emitter.dtype(integers))
