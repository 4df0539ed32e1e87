"""Quantized tensors and products of the standard set, in plain arithmetic on the floats that the integers stand for.

A weight that is known becomes a float matrix like any other, which can become ternary. Sums of products of 8-bit
integers are exact in float32 up to 2^24, that is for at least 258 terms.
"""

from __future__ import annotations

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.convolution import conv
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.operators.matrix import matmul
from tvm_ternary.graph.onnx.operators.shaping import window
from tvm_ternary.graph.onnx.values import Constant, Dim, Value, as_expr

_INTEGERS = frozenset({"int8", "uint8", "int16", "uint16"})


def dequantize_linear(emitter: Emitter, node: Node) -> relax.Expr:
    """``DequantizeLinear`` with one scale, one for each place along an axis, or one for each block along it."""
    wide = dequantized(emitter, node, 0, 1, 2)
    asked = node.attributes.get("output_dtype", 0)
    target = str(onnx.helper.tensor_dtype_to_np_dtype(asked)) if asked else emitter.dtype(node.value(1))
    return wide if emitter.dtype(wide) == target else R.astype(wide, target)


def quantize_linear(emitter: Emitter, node: Node) -> relax.Expr:
    """``QuantizeLinear``, with scales as of ``DequantizeLinear``."""
    x = emitter.tensor(node.value(0), node)
    asked = node.attributes.get("output_dtype", 0)
    target = str(onnx.helper.tensor_dtype_to_np_dtype(asked)) if asked else "uint8"
    if node.has(2):
        target = emitter.dtype(node.value(2))
    return quantized(emitter, node, x, node.value(1), node.optional(2), target)


def matmul_integer(emitter: Emitter, node: Node) -> Value | list[Value]:
    """``MatMulInteger``; a weight that is known is a float matrix, whose products are rounded."""
    if not isinstance(node.value(1), Constant):
        return convert_with_tvm(emitter, node)
    left, right = _shifted(emitter, node, 0, 2, -2), _shifted(emitter, node, 1, 3, -1)
    product = emitter.emit(matmul(emitter, Node(node.proto, node.opset, (left, right), {})))
    return R.astype(emitter.emit(R.round(product)), "int32")


def conv_integer(emitter: Emitter, node: Node) -> relax.Expr:
    """``ConvInteger``."""
    x, weight = _shifted(emitter, node, 0, 2, 1), _shifted(emitter, node, 1, 3, 0)
    result = _convolved(emitter, node, x, weight)
    return R.astype(emitter.emit(R.round(result)), "int32")


def qlinear_matmul(emitter: Emitter, node: Node) -> relax.Expr:
    """``QLinearMatMul``."""
    left, right = dequantized(emitter, node, 0, 1, 2, -2), dequantized(emitter, node, 3, 4, 5, -1)
    product = emitter.emit(matmul(emitter, Node(node.proto, node.opset, (left, right), {})))
    return quantized(emitter, node, product, node.value(6), node.value(7), emitter.dtype(node.value(7)))


def qlinear_conv(emitter: Emitter, node: Node) -> relax.Expr:
    """``QLinearConv``; its bias counts in steps of the product of both scales."""
    x, weight = dequantized(emitter, node, 0, 1, 2, 1), dequantized(emitter, node, 3, 4, 5, 0)
    result = _convolved(emitter, node, x, weight)
    if node.has(8):
        steps = [_floats(emitter, node, node.value(slot)) for slot in (8, 1, 4)]
        bias = emitter.emit(R.multiply(emitter.emit(R.multiply(steps[0], steps[1])), steps[2]))
        rank = emitter.rank(result)
        bias = emitter.emit(R.expand_dims(bias, [0, *range(2, rank)]))
        result = emitter.emit(R.add(result, bias))
    return quantized(emitter, node, result, node.value(6), node.value(7), emitter.dtype(node.value(7)))


def dequantized(emitter: Emitter, node: Node, index: int, scale: int, zero: int, axis: int | None = None) -> Value:
    """What the integers of an input stand for, (q - zero) * scale in float32; a constant where all three are known.

    Parameters
    ----------
    index, scale, zero : int
        The inputs that hold the integers, their scale and, where there is one, their zero point.
    axis : int, optional
        Where several scales lie along; by default what the node says.
    """
    shifted = _shifted(emitter, node, index, zero, axis)
    dims = emitter.known_shape(node.value(index), node)
    factor = _aligned(emitter, node, node.value(scale), dims, axis)
    if isinstance(shifted, Constant) and isinstance(factor, Constant):
        return Constant(shifted.array * factor.array.astype(np.float32), shifted.names)
    product = R.multiply(emitter.tensor(shifted, node), _floats(emitter, node, factor))
    return emitter.emit(product)


def _shifted(emitter: Emitter, node: Node, index: int, zero: int, axis: int | None) -> Value:
    """The integers of an input less their zero point, in float32."""
    value, origin = node.value(index), node.optional(zero)
    floats = _wide(emitter, node, value)
    if origin is None:
        return floats
    origin = _wide(emitter, node, _aligned(emitter, node, origin, emitter.known_shape(value, node), axis))
    if isinstance(floats, Constant) and isinstance(origin, Constant):
        return Constant(floats.array - origin.array, floats.names)
    return emitter.emit(R.subtract(emitter.tensor(floats, node), emitter.tensor(origin, node)))


def _wide(emitter: Emitter, node: Node, value: Value) -> Value:
    """A value in float32."""
    if isinstance(value, Constant):
        return Constant(value.array.astype(np.float32), value.names)
    tensor = emitter.tensor(value, node)
    return tensor if emitter.dtype(tensor) == "float32" else emitter.emit(R.astype(tensor, "float32"))


def _floats(emitter: Emitter, node: Node, value: Value) -> relax.Expr:
    return emitter.tensor(_wide(emitter, node, value), node)


def _aligned(emitter: Emitter, node: Node, value: Value, dims: list[Dim], axis: int | None) -> Value:
    """A scale or zero point in a shape that broadcasts to the tensor it belongs to."""
    shape = emitter.known_shape(value, node)
    if emitter.algebra.equal(emitter.algebra.product(shape), 1):
        return _reshaped(emitter, value, [])
    place = axis_of(node.attributes.get("axis", 1) if axis is None else axis, len(dims), node)
    if len(shape) == 1:
        return _reshaped(emitter, value, [shape[0] if i == place else 1 for i in range(len(dims))])
    block = int(node.attributes.get("block_size", 0))
    return _repeated(emitter, node, value, place, block, dims[place]) if block else value


def _reshaped(emitter: Emitter, value: Value, shape: list[Dim]) -> Value:
    if isinstance(value, Constant):
        return Constant(value.array.reshape(shape), value.names)
    return emitter.emit(R.reshape(emitter.tensor(value), relax.ShapeExpr([as_expr(dim) for dim in shape])))


def _repeated(emitter: Emitter, node: Node, value: Value, axis: int, block: int, extent: Dim) -> Value:
    """Every element as often as its block is long; the last block may be shorter."""
    if isinstance(value, Constant) and isinstance(extent, int):
        return Constant(np.repeat(value.array, block, axis).take(range(extent), axis), value.names)
    tensor = emitter.emit(R.repeat(emitter.tensor(value, node), block, axis))
    return emitter.emit(window(tensor, [axis], [0], [extent]))


def quantized(emitter: Emitter, node: Node, x: relax.Expr, scale: Value, zero: Value | None, target: str) -> relax.Expr:
    """Round x / scale + zero to the integers of a type; halves go to the even one."""
    if target not in _INTEGERS:
        node.refuse(f"elements of {target}; expected one of {', '.join(sorted(_INTEGERS))}")
    dims = emitter.known_shape(x, node)
    step = emitter.tensor(_aligned(emitter, node, scale, dims, None), node)
    types = [emitter.dtype(x), emitter.dtype(step)]
    if asked := node.attributes.get("precision", 0):
        types = [str(onnx.helper.tensor_dtype_to_np_dtype(asked))]
    types = ["float32" if kind == "int32" else kind for kind in types]
    wide = str(np.result_type(*types))
    x, step = (v if emitter.dtype(v) == wide else emitter.emit(R.astype(v, wide)) for v in (x, step))
    places = emitter.emit(R.round(emitter.emit(R.divide(x, step))))
    if emitter.dtype(places) != "float32":  # half precision holds no whole numbers above 2048
        places = emitter.emit(R.astype(places, "float32"))
    if zero is not None:
        places = emitter.emit(R.add(places, _floats(emitter, node, _aligned(emitter, node, zero, dims, None))))
    limits = np.iinfo(target)
    return R.astype(emitter.emit(R.clip(places, int(limits.min), int(limits.max))), target)


def _convolved(emitter: Emitter, node: Node, x: Value, weight: Value) -> relax.Expr:
    """The ``Conv`` with a node's attributes."""
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.op_type = "Conv"
    result = conv(emitter, Node(proto, node.opset, (x, weight), node.attributes))
    return emitter.emit(result[0] if isinstance(result, list) else result)
