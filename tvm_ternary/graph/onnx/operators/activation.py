"""Activation functions in forms that keep their precision in every float type."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node


def mish(emitter: Emitter, node: Node) -> relax.Expr:
    """``Mish``: x tanh(softplus(x))."""
    return R.multiply(emitter.tensor(node.value(0), node), R.tanh(emitter.emit(softplus(emitter, node))))


def softplus(emitter: Emitter, node: Node) -> relax.Expr:
    """``Softplus`` as max(x, 0) + log1p(exp(-|x|)), which neither overflows nor loses what is small.

    References
    ----------
    log1p(e) is log(u) e / (u - 1) with u = 1 + e: Goldberg, "What Every Computer Scientist Should Know About
    Floating-Point Arithmetic", 1991, theorem 4.
    """
    x, dtype = emitter.tensor(node.value(0), node), emitter.dtype(node.value(0))
    one = relax.const(1, dtype)
    small = emitter.emit(R.exp(emitter.emit(R.negative(emitter.emit(R.abs(x))))))
    above = emitter.emit(R.add(small, one))
    lost = emitter.emit(R.equal(above, one))
    ratio = emitter.emit(R.divide(small, emitter.emit(R.where(lost, one, emitter.emit(R.subtract(above, one))))))
    log = emitter.emit(R.where(lost, small, emitter.emit(R.multiply(emitter.emit(R.log(above)), ratio))))
    return R.add(emitter.emit(R.maximum(x, relax.const(0, dtype))), log)


def elu(emitter: Emitter, node: Node) -> relax.Expr:
    """``Elu``: alpha (exp(x) - 1) below zero."""
    return _exponential(emitter, node, float(node.attributes.get("alpha", 1.0)), 1.0)


def celu(emitter: Emitter, node: Node) -> relax.Expr:
    """``Celu``: alpha (exp(x / alpha) - 1) below zero."""
    alpha = float(node.attributes.get("alpha", 1.0))
    return _exponential(emitter, node, alpha, 1 / alpha)


def _exponential(emitter: Emitter, node: Node, factor: float, inner: float) -> relax.Expr:
    x, dtype = emitter.tensor(node.value(0), node), emitter.dtype(node.value(0))
    below = emitter.emit(R.minimum(x, relax.const(0, dtype)))
    grown = emitter.emit(R.exp(emitter.emit(R.multiply(below, relax.const(inner, dtype)))))
    bent = emitter.emit(R.multiply(emitter.emit(R.subtract(grown, relax.const(1, dtype))), relax.const(factor, dtype)))
    return R.where(emitter.emit(R.less(x, relax.const(0, dtype))), bent, x)
