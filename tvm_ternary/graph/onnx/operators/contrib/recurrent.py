"""``DynamicQuantizeLSTM``: an ``LSTM`` with 8-bit weights, whose inputs and states are rounded at each product."""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.contrib.quantized import rounded
from tvm_ternary.graph.onnx.operators.matrix import linear
from tvm_ternary.graph.onnx.operators.recurrent import lstm
from tvm_ternary.graph.onnx.values import Constant, Value


def dynamic_quantize_lstm(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``DynamicQuantizeLSTM``; the results of ``lstm``."""
    weights = [_weight(node, 1, 8, 9), _weight(node, 2, 10, 11)]
    inputs = [node.value(0), *weights, *node.inputs[3:8]]
    return lstm(emitter, Node(node.proto, node.opset, inputs, node.attributes), _rounded_product, rounded=True)


def _weight(node: Node, index: int, scale: int, zero: int) -> Constant:
    """(directions, K, 4H) integers as ``LSTM`` has them, (directions, 4H, K) floats."""
    integers, factor, origin = (node.constant(slot) for slot in (index, scale, zero))
    if integers is None or factor is None or origin is None:
        node.refuse("its weights are computed while the model runs")
    # One for a direction, or for each of its outputs.
    factor, origin = (part.reshape(len(part), 1, -1) for part in (factor, origin))
    floats = (integers.astype(np.float32) - origin.astype(np.float32)) * factor
    value = node.value(index)
    assert isinstance(value, Constant)
    return Constant(floats.transpose(0, 2, 1), value.names)


def _rounded_product(emitter: Emitter, node: Node, x: Value, weight: np.ndarray, names: tuple[str, ...]) -> relax.Expr:
    return linear(emitter, node, rounded(emitter, emitter.tensor(x, node)), weight, names)
