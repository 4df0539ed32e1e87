"""``RotaryEmbedding``, and the tables of cosines and sines that it shares with ``GroupQueryAttention``."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.attention_core import join_heads, positions, reshape, split_heads
from tvm_ternary.graph.onnx.operators.rotary_core import rotate
from tvm_ternary.graph.onnx.values import Dim


def rotary_embedding(emitter: Emitter, node: Node) -> relax.Expr:
    """``RotaryEmbedding`` of heads (batch, heads, length, size), or of joined ones (batch, length, width)."""
    if node.attributes.get("is_packed_batching", 0):
        node.refuse("attribute is_packed_batching is set")
    x = emitter.tensor(node.value(0), node)
    joined = emitter.rank(x) == 3
    if joined:
        pairs = emitter.known_shape(node.value(2), node)[1]
        heads = int(node.attributes.get("num_heads", 0))
        heads = heads or emitter.known_shape(x, node)[2] // (2 * pairs)
        x = split_heads(emitter, x, heads, node)
    length = emitter.known_shape(x, node)[2]
    places = emitter.tensor(node.value(1), node)
    if emitter.rank(places) == 1:  # where the first of them stands
        places = emitter.emit(R.add(positions(emitter, length), places))
        places = emitter.emit(R.expand_dims(places, 0))
    cosine, sine = table_rows(emitter, node, 2, places)
    turned = rotate(emitter, x, cosine, sine, interleaved=bool(node.attributes.get("interleaved", 0)))
    scale = float(node.attributes.get("scale", 1.0))
    if scale != 1.0:
        turned = emitter.emit(R.multiply(turned, relax.const(scale, emitter.dtype(turned))))
    return join_heads(emitter, turned) if joined else turned


def table_rows(emitter: Emitter, node: Node, index: int, places: relax.Expr) -> tuple[relax.Var, relax.Var]:
    """Cosines and sines (batch or 1, 1, length, pairs) of positions (batch or 1, length), from inputs ``index`` on."""
    batch, length = emitter.known_shape(places, node)
    rows = []
    for table in (node.value(index), node.value(index + 1)):
        pairs: Dim = emitter.known_shape(table, node)[1]
        found = emitter.emit(R.take(emitter.tensor(table, node), places, 0, "clip"))
        rows.append(reshape(emitter, found, [batch, 1, length, pairs]))
    return rows[0], rows[1]
