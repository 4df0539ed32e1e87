"""``GroupQueryAttention``: fewer heads of keys than of queries, rotary embedding and past keys in one operator."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.attention_core import (
    additive,
    attend,
    join_heads,
    of_shape,
    positions,
    reshape,
    seen_by,
    split_heads,
)
from tvm_ternary.graph.onnx.operators.contrib.attention import scale_of
from tvm_ternary.graph.onnx.operators.contrib.rotary import table_rows
from tvm_ternary.graph.onnx.operators.rotary_core import rotate
from tvm_ternary.graph.onnx.operators.shaping import window
from tvm_ternary.graph.onnx.values import PLACED, Dim, as_expr, object_array, settle

_REFUSED = {
    11: "head_sink",
    12: "k_scale",
    13: "v_scale",
    14: "q_norm_weight",
    15: "k_norm_weight",
    16: "query_seqlens",
}
"""Inputs that say something else than this converter computes."""


def group_query_attention(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``GroupQueryAttention``.

    Every row of the batch has as many keys as ``seqlens_k`` says, plus one. The new ones stand behind the past ones
    that count; what lies behind those of the present keys is zero.

    Returns
    -------
    list
        The output (batch, length, width), and past and new keys and values, each (batch, kv_heads, keys, size).
    """
    _refuse_variants(node)
    heads, kv_heads = (int(node.required(name)) for name in ("num_heads", "kv_num_heads"))
    query, key, value = _apart(emitter, node, heads, kv_heads)
    batch, _, length, _ = emitter.known_shape(query, node)
    total = _total(emitter, node)
    before = _before(emitter, node, batch, length)
    places = emitter.emit(R.add(before, positions(emitter, length)))
    rows = reshape(emitter, places, [batch, 1, length, 1])
    if node.attributes.get("do_rotary", 0):
        places = emitter.tensor(node.value(9), node) if node.has(9) else places
        cosine, sine = table_rows(emitter, node, 7, places)
        interleaved = bool(node.attributes.get("rotary_interleaved", 0))
        query, key = (rotate(emitter, x, cosine, sine, interleaved=interleaved) for x in (query, key))
    if node.has(3):
        keys = emitter.algebra.maximum(total, emitter.known_shape(node.value(3), node)[2])
        starts = reshape(emitter, before, [batch])
        key, value = (
            emitter.builder.emit_te(
                _placed, emitter.tensor(past, node), new, starts, as_expr(keys), primfunc_attrs={PLACED: True}
            )
            for past, new in ((node.value(3), key), (node.value(4), value))
        )
    keys = emitter.known_shape(key, node)[2]
    reach = int(node.attributes.get("local_window_size", -1))  # the query's own key included
    seen = seen_by(emitter, rows, positions(emitter, keys), before=reach - 1 if reach > 0 else None)
    terms = [additive(emitter, seen, emitter.dtype(query))]
    if node.has(10):
        terms.append(emitter.tensor(node.value(10), node))
    softcap = float(node.attributes.get("softcap", 0.0))
    scale = scale_of(emitter, node, query)
    output = attend(emitter, query, key, value, scale=scale, bias=terms, softcap=softcap).output
    return [join_heads(emitter, output), key, value]


def _refuse_variants(node: Node) -> None:
    for index, name in _REFUSED.items():
        if node.has(index):
            node.refuse(f"input {name} is given")
    usual = {"smooth_softmax": (0, -1), "sliding_window_cache": (0,), "qk_output": (0,), "causal": (1,)}
    for name, values in usual.items():
        if node.attributes.get(name, values[0]) not in values:
            node.refuse(f"attribute {name} is {node.attributes[name]}")


def _apart(emitter: Emitter, node: Node, heads: int, kv_heads: int) -> list[relax.Expr]:
    """Queries, keys and values (batch, heads, length, size), from three inputs or one that holds all."""
    first = emitter.tensor(node.value(0), node)
    if node.has(1):
        parts = [first, emitter.tensor(node.value(1), node), emitter.tensor(node.value(2), node)]
    else:
        size = emitter.known_shape(first, node)[2] // (heads + 2 * kv_heads)
        ends = [heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size]
        bounds = zip([0, *ends], ends, strict=False)
        parts = [emitter.emit(window(first, [2], [start], [end])) for start, end in bounds]
    return [split_heads(emitter, part, n, node) for part, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)]


def _total(emitter: Emitter, node: Node) -> Dim:
    """The largest number of keys of a row, which the shape of the present keys depends on."""
    value = node.value(6)
    if isinstance(value, relax.Expr):
        node.refuse(
            "total_sequence_length is computed from the model's data",
            "export the model so that it is the length of the attention mask, or bind it with --constant NAME=VALUE",
        )
    return emitter.dims(value, node)[0]


def _before(emitter: Emitter, node: Node, batch: Dim, length: Dim) -> relax.Var:
    """How many past keys of each row count, (batch, 1): ``seqlens_k`` + 1 - length.

    None of a row that is padded behind its end, as rows of a first prompt may be.
    """
    counts = emitter.tensor(node.value(5), node)
    if emitter.rank(counts) == 1:
        counts = emitter.emit(R.expand_dims(counts, 1))
    last = emitter.emit(R.astype(of_shape(emitter, counts, [batch, 1], node), "int64"))
    rest = settle(emitter.algebra, object_array([1 - length], ()), "int64")
    before = emitter.emit(R.add(last, emitter.tensor(rest)))
    return emitter.emit(R.maximum(before, relax.const(0, "int64")))


def _placed(past: te.Tensor, new: te.Tensor, starts: te.Tensor, keys: tirx.Expr) -> te.Tensor:
    """New rows (batch, heads, length, size) behind the first ``starts`` of the past ones, then zeros up to ``keys``."""
    length = new.shape[2]

    def row(b: Any, h: Any, t: Any, d: Any) -> Any:
        offset = t - starts[b]
        fresh = new[b, h, tirx.max(tirx.min(offset, length - 1), 0), d]
        zero = tirx.const(0, str(new.dtype))
        return tirx.if_then_else(t < starts[b], past[b, h, t, d], tirx.Select(offset < length, fresh, zero))

    return te.compute((new.shape[0], new.shape[1], keys, new.shape[3]), row, name="placed")
