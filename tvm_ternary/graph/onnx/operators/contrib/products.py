"""Products that onnxruntime fuses with a factor, a transpose or an activation, and those with packed weights."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.contrib.activation import activated
from tvm_ternary.graph.onnx.operators.contrib.blocks import BITS, dequantize, ternary_planes, unpack
from tvm_ternary.graph.onnx.operators.matrix import gemm, linear, matmul
from tvm_ternary.graph.onnx.values import Constant, Value


def fused_matmul(emitter: Emitter, node: Node) -> relax.Expr:
    """``FusedMatMul``: alpha * op(A) @ op(B)."""
    left, right = (_turned(emitter, node, index, side) for index, side in ((0, "A"), (1, "B")))
    alpha = float(node.attributes.get("alpha", 1.0))
    for_weight = alpha != 1.0 and isinstance(right, Constant)
    if for_weight:
        assert isinstance(right, Constant)
        right = Constant(right.array * np.asarray(alpha, right.array.dtype), right.names)
    product = matmul(emitter, Node(node.proto, node.opset, (left, right), {}))
    if for_weight or alpha == 1.0:
        return product
    return R.multiply(emitter.emit(product), relax.const(alpha, emitter.dtype(node.value(0))))


def _turned(emitter: Emitter, node: Node, index: int, side: str) -> Value:
    """A factor, its batch axis moved behind the others and its last two axes swapped where the node says so."""
    value = node.value(index)
    rank = emitter.rank(value)
    order = list(range(rank))
    if node.attributes.get(f"transBatch{side}", 0) and rank > 2:
        order = [*range(1, rank - 1), 0, rank - 1]
    if node.attributes.get(f"trans{side}", 0) and rank > 1:
        order[-2:] = order[:-3:-1]
    if order == list(range(rank)):
        return value
    if isinstance(value, Constant):
        return Constant(value.array.transpose(order), value.names)
    return emitter.emit(R.permute_dims(emitter.tensor(value, node), order))


def fused_gemm(emitter: Emitter, node: Node) -> relax.Expr:
    """``FusedGemm``: ``Gemm`` with an activation function behind it."""
    parameters = [float(node.attributes.get(f"activation_{name}", 0.0)) for name in ("alpha", "beta", "gamma")]
    return activated(emitter, node, emitter.emit(gemm(emitter, node)), parameters)


def matmul_nbits(emitter: Emitter, node: Node) -> relax.Expr:
    """``MatMulNBits``: weights of 2, 4 or 8 bits with a scale and perhaps a zero point for each block along K.

    They become a float matrix like any other; one that trit planes hold exactly is noted as ternary already.
    """
    n, k, block = (int(node.required(name)) for name in ("N", "K", "block_size"))
    bits = int(node.attributes.get("bits", 4))
    if bits not in BITS:
        node.refuse(f"codes of {bits} bits, which do not divide a byte", "quantize the weights to 2, 4 or 8 bits")
    if node.attributes.get("weight_prepacked", 0):
        node.refuse("its weight is packed for one device (weight_prepacked)", "export the model without prepacking")
    if node.has(4):
        node.refuse("its columns are in another order (g_idx)", "quantize the weights without g_idx")
    packed, scale, zero = (node.constant(index) for index in (1, 2, 3))
    if packed is None or scale is None or (zero is None and node.has(3)):
        node.refuse("its weight is computed while the model runs")
    blocks = -(-k // block)
    if packed.size != n * blocks * block * bits // 8 or scale.size != n * blocks:
        node.refuse(f"weight {list(packed.shape)} and scales {list(scale.shape)} do not fit N {n} and K {k}")
    codes = unpack(packed.reshape(n, blocks * block * bits // 8), bits)[:, :k]
    scale = scale.reshape(n, blocks)
    if zero is None:
        zero = np.full((n, blocks), 2 ** (bits - 1), np.uint8)
    elif zero.dtype == np.uint8:
        zero = unpack(zero.reshape(n, -1), bits)[:, :blocks]
    zero = zero.reshape(n, blocks)
    weight = node.value(1)
    assert isinstance(weight, Constant)
    values = dequantize(codes, scale, zero, block)
    product = emitter.emit(linear(emitter, node, node.value(0), values.T, weight.names))
    planes = ternary_planes(codes, scale, zero, block)
    if planes is not None:
        emitter.note_ternary(node.proto, planes)
    return R.add(product, emitter.tensor(node.value(5), node)) if node.has(5) else product
