"""Activation functions of the ``com.microsoft`` set, and those that it fuses into products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node


def gelu(emitter: Emitter, node: Node) -> relax.Expr:
    """``Gelu`` by the error function."""
    return R.nn.gelu(emitter.tensor(node.value(0), node))


def bias_gelu(emitter: Emitter, node: Node) -> relax.Expr:
    """``BiasGelu``: the same of a sum."""
    total = R.add(emitter.tensor(node.value(0), node), emitter.tensor(node.value(1), node))
    return R.nn.gelu(emitter.emit(total))


def fast_gelu(emitter: Emitter, node: Node) -> relax.Expr:
    """``FastGelu`` by the hyperbolic tangent, of an input with or without a bias."""
    x = emitter.tensor(node.value(0), node)
    return R.nn.gelu_tanh(emitter.emit(R.add(x, emitter.tensor(node.value(1), node))) if node.has(1) else x)


def quick_gelu(emitter: Emitter, node: Node) -> relax.Expr:
    """``QuickGelu``: x * sigmoid(alpha * x)."""
    x = emitter.tensor(node.value(0), node)
    alpha = float(node.attributes.get("alpha", 1.702))
    if alpha == 1.0:
        return R.nn.silu(x)
    scaled = emitter.emit(R.multiply(x, relax.const(alpha, emitter.dtype(node.value(0)))))
    return R.multiply(x, emitter.emit(R.sigmoid(scaled)))


def activated(emitter: Emitter, node: Node, x: relax.Var, parameters: Sequence[float]) -> relax.Expr:
    """X behind the activation function that a fused operator names in its attribute ``activation``."""
    name, dtype = node.attributes.get("activation", ""), emitter.dtype(x)
    alpha, beta, *_ = [*parameters, 0.0, 0.0]
    if name == "":
        return x
    if name == "Relu":
        return R.nn.relu(x)
    if name == "Tanh":
        return R.tanh(x)
    if name == "Sigmoid":
        return R.sigmoid(x)
    if name == "LeakyRelu":
        return R.nn.leakyrelu(x, alpha)
    if name == "Clip":
        return R.clip(x, alpha, beta)
    if name == "HardSigmoid":
        line = emitter.emit(R.multiply(x, relax.const(alpha, dtype)))
        return R.clip(emitter.emit(R.add(line, relax.const(beta, dtype))), 0, 1)
    return node.refuse(f"its activation function {name} is not known")
