"""Tables that rows are gathered from: BERT's three in one operator, and those in blocks of integers."""

from __future__ import annotations

import functools

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.contrib.blocks import BITS, unpack
from tvm_ternary.graph.onnx.operators.contrib.normalization import layer_norm
from tvm_ternary.graph.onnx.operators.indexing import gather
from tvm_ternary.graph.onnx.operators.shaping import window
from tvm_ternary.graph.onnx.values import Constant, Value, describe


def embed_layer_normalization(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``EmbedLayerNormalization``: rows of words, positions and segments, added and normalized.

    Returns
    -------
    list
        The output (batch, length, width), how many words of each row the mask keeps (batch,) int32, and the sum before
        it is normalized.
    """
    batch, length = emitter.known_shape(node.value(0), node)
    rows = [emitter.emit(_rows(emitter, node, 2, node.value(0)))]
    if node.has(8):
        rows.append(emitter.emit(_rows(emitter, node, 3, node.value(8))))
    else:
        rows.append(_first_positions(emitter, node, length))
    if node.has(1) and node.has(4):
        rows.append(emitter.emit(_rows(emitter, node, 4, node.value(1))))
    total = functools.reduce(lambda left, right: emitter.emit(R.add(left, right)), rows)
    if node.has(7):
        counts = R.sum(emitter.emit(R.astype(emitter.tensor(node.value(7), node), "int32")), [1])
    else:
        counts = R.zeros(relax.ShapeExpr([batch]), "int32")
    return [layer_norm(emitter, node, total, 5, 6), counts, total]


def _rows(emitter: Emitter, node: Node, table: int, indices: Value) -> relax.Expr:
    found = gather(emitter, Node(node.proto, node.opset, (node.value(table), indices), {}))
    assert isinstance(found, relax.Expr)
    return found


def _first_positions(emitter: Emitter, node: Node, length: object) -> relax.Var:
    """As many rows of the table of positions as a sequence is long, (length, width)."""
    table = node.value(3)
    longest = emitter.known_shape(table, node)[0]
    if not isinstance(length, int) and isinstance(longest, int) and not emitter.limit(length, longest):
        node.refuse(f"length {describe(length)} cannot be shown to fit {longest} positions")
    data = emitter.embedding(table, node) if isinstance(table, Constant) else emitter.tensor(table, node)
    return emitter.emit(window(data, [0], [0], [length]))


def gather_block_quantized(emitter: Emitter, node: Node) -> Value:
    """``GatherBlockQuantized``: rows of a table of integers, a scale for each block, which becomes a float table."""
    data, scale, zero = (node.constant(index) for index in (0, 2, 3))
    if data is None or scale is None or (zero is None and node.has(3)):
        node.refuse("its table is computed while the model runs")
    bits = int(node.attributes.get("bits", 4))
    if data.dtype == np.uint8:
        if bits not in BITS:
            node.refuse(f"codes of {bits} bits, which do not divide a byte", "quantize the table to 2, 4 or 8 bits")
        data = unpack(data, bits)
        zero = np.full((), 2 ** (bits - 1), np.uint8) if zero is None else unpack(zero, bits)
    axis = axis_of(int(node.attributes.get("quantize_axis", 1)), data.ndim, node)
    block = int(node.attributes.get("block_size", 128)) or data.shape[axis]
    spread = functools.partial(_spread, axis=axis, block=block, shape=data.shape)
    floats = data.astype(np.float32)
    if zero is not None:
        floats -= spread(zero).astype(np.float32)
    floats *= spread(scale).astype(np.float32)
    value = node.value(0)
    assert isinstance(value, Constant)
    table = Constant(floats.astype(scale.dtype), value.names)
    attributes = {"axis": int(node.attributes.get("gather_axis", 0))}
    return gather(emitter, Node(node.proto, node.opset, (table, node.value(1)), attributes))


def _spread(parts: np.ndarray, axis: int, block: int, shape: tuple[int, ...]) -> np.ndarray:
    """What serves a block of an axis, for each element of it; more of them than there are blocks are padding."""
    if parts.ndim == 0:
        return parts
    size = shape[axis]
    return np.repeat(parts, block, axis=axis).take(range(size), axis=axis) if parts.shape[axis] > 1 else parts
