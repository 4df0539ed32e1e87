"""Products of 8-bit integers, computed on the floats that they stand for.

A weight that is known becomes a float matrix like any other, which can become ternary; activations that are rounded
while the model runs are rounded the same way.
"""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.matrix import matmul
from tvm_ternary.graph.onnx.operators.quantized import dequantized
from tvm_ternary.graph.onnx.values import Value


def rounded(emitter: Emitter, x: relax.Expr) -> relax.Var:
    """A float tensor as it comes back from 8-bit integers with one scale and zero point, taken from its range.

    References
    ----------
    ``DynamicQuantizeLinear`` of the ONNX standard.
    """
    zero, one = relax.const(0.0, "float32"), relax.const(1.0, "float32")
    low = emitter.emit(R.minimum(emitter.emit(R.min(x)), zero))
    high = emitter.emit(R.maximum(emitter.emit(R.max(x)), zero))
    step = emitter.emit(R.divide(emitter.emit(R.subtract(high, low)), relax.const(255.0, "float32")))
    step = emitter.emit(R.where(emitter.emit(R.equal(step, zero)), one, step))
    origin = emitter.emit(R.round(emitter.emit(R.divide(emitter.emit(R.negative(low)), step))))
    places = emitter.emit(R.add(emitter.emit(R.round(emitter.emit(R.divide(x, step)))), origin))
    places = emitter.emit(R.clip(places, 0, 255))
    return emitter.emit(R.multiply(emitter.emit(R.subtract(places, origin)), step))


def dynamic_quantize_matmul(emitter: Emitter, node: Node) -> relax.Expr:
    """``DynamicQuantizeMatMul``: activations rounded to 8 bits while the model runs, times 8-bit weights."""
    x = rounded(emitter, emitter.tensor(node.value(0), node))
    return _product(emitter, node, x, dequantized(emitter, node, 1, 2, 3, -1), 4)


def matmul_integer_to_float(emitter: Emitter, node: Node) -> relax.Expr:
    """``MatMulIntegerToFloat``: 8-bit activations times 8-bit weights."""
    x, weight = dequantized(emitter, node, 0, 2, 4, -1), dequantized(emitter, node, 1, 3, 5, -1)
    return _product(emitter, node, x, weight, 6)


def _product(emitter: Emitter, node: Node, x: Value, weight: Value, bias: int) -> relax.Expr:
    product = matmul(emitter, Node(node.proto, node.opset, (x, weight), {}))
    if not node.has(bias):
        return product
    return R.add(emitter.emit(product), emitter.tensor(node.value(bias), node))
