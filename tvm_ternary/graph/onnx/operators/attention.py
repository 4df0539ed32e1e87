"""``Attention`` and ``RotaryEmbedding`` of the standard set."""

from __future__ import annotations

import functools

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.attention_core import (
    additive,
    append,
    attend,
    join_heads,
    of_shape,
    positions,
    seen_by,
    split_heads,
)
from tvm_ternary.graph.onnx.operators.rotary_core import rotate
from tvm_ternary.graph.onnx.operators.shaping import filled
from tvm_ternary.graph.onnx.values import Dim, Value, as_expr, describe

_BIASED, _WEIGHTS = 2, 3
"""Values of ``qk_matmul_output_mode``: the scores with what is added to them, and their softmax."""


def attention(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``Attention`` on heads (batch, heads, length, size) or on rows of them (batch, length, heads * size).

    A query that sees no key gives zeros. Half precision is widened where ``softmax_precision`` says so.

    Returns
    -------
    list
        The output, past and new keys and values, and the product of queries and keys at the stage that is asked for.
    """
    query, key, value = (emitter.tensor(node.value(i), node) for i in range(3))
    rows = emitter.rank(query) == 3
    if rows:
        heads, kv_heads = (int(node.required(name)) for name in ("q_num_heads", "kv_num_heads"))
        query = split_heads(emitter, query, heads, node)
        key, value = (split_heads(emitter, x, kv_heads, node) for x in (key, value))
    past, before = [emitter.tensor(node.value(i), node) if node.has(i) else None for i in (4, 5)], 0
    if past[0] is not None:
        before = emitter.known_shape(past[0], node)[2]
    key, value = (append(emitter, old, new) for old, new in zip(past, (key, value), strict=True))
    dtype, wide = emitter.dtype(query), _precision(emitter, node, query)
    mode = int(node.attributes.get("qk_matmul_output_mode", 0))
    seen = _seen(emitter, node, query, key, before)
    mask = _mask(emitter, node, key)
    bias = []
    if mask is not None and emitter.dtype(mask) == "bool":
        seen, mask = [mask, *seen], None
    if seen:
        every = functools.reduce(lambda a, b: emitter.emit(R.logical_and(a, b)), seen)
        bias.append(additive(emitter, every, wide, -np.inf if mode == _BIASED else None))
    if mask is not None:
        bias.append(_as(emitter, mask, wide))
    size = emitter.known_shape(query, node)[-1]
    attended = attend(
        emitter,
        *(_as(emitter, x, wide) for x in (query, key, value)),
        scale=float(node.attributes["scale"]) if "scale" in node.attributes else float(1 / np.sqrt(size)),
        bias=bias,
        softcap=float(node.attributes.get("softcap", 0.0)),
    )
    output, weights = attended.output, attended.weights
    if bias and _may_see_nothing(node):
        sees = _sees_something(emitter, seen, mask)
        output, weights = (_kept_where(emitter, sees, x) for x in (output, weights))
    stages = {0: attended.scores, 1: attended.capped, _BIASED: attended.biased, _WEIGHTS: weights}
    output = _as(emitter, output, dtype)
    stage = _as(emitter, stages[mode], dtype) if len(node.outputs) > 3 and node.outputs[3] else None
    return [join_heads(emitter, output) if rows else output, key, value, stage]


def _precision(emitter: Emitter, node: Node, query: relax.Expr) -> str:
    """The wider of the inputs' dtype and the one asked for the softmax; for bfloat16 what it is the front half of."""
    dtypes = [np.dtype(emitter.dtype(query))]
    if asked := node.attributes.get("softmax_precision"):
        dtypes.append(onnx.helper.tensor_dtype_to_np_dtype(asked))
    widest = str(max(dtypes, key=lambda dtype: dtype.itemsize))
    return "float32" if widest == "bfloat16" else widest


def _as(emitter: Emitter, x: relax.Expr, dtype: str) -> relax.Expr:
    return x if emitter.dtype(x) == dtype else emitter.emit(R.astype(x, dtype))


def _seen(emitter: Emitter, node: Node, query: relax.Expr, key: relax.Expr, before: Dim) -> list[relax.Expr]:
    """Which keys a query sees by where both stand, each (queries, keys) or (batch, 1, 1 or queries, keys) bool."""
    queries, keys = emitter.known_shape(query, node)[2], emitter.known_shape(key, node)[2]
    left, right = (int(node.attributes.get(f"{side}_window_size", -1)) for side in ("left", "right"))
    after = 0 if node.attributes.get("is_causal", 0) else None if right < 0 else right
    places = positions(emitter, keys)
    found = []
    length = None
    if node.has(6):  # keys beyond it are padding
        length = emitter.emit(R.expand_dims(_as(emitter, emitter.tensor(node.value(6), node), "int64"), [1, 2, 3]))
        found.append(emitter.emit(R.less(places, length)))
    if after is not None or left >= 0:
        if length is None or node.has(4):
            rows = positions(emitter, queries, before)
        else:  # the queries are the last before the padding
            own = positions(emitter, queries, emitter.algebra.simplify(-queries))
            rows = emitter.emit(R.add(own, emitter.emit(R.squeeze(length, [3]))))
        column = emitter.emit(R.expand_dims(rows, -1))
        found.append(seen_by(emitter, column, places, before=None if left < 0 else left, after=after))
    return found


def _mask(emitter: Emitter, node: Node, key: relax.Expr) -> relax.Expr | None:
    """``attn_mask``; keys beyond its end are masked."""
    if not node.has(3):
        return None
    mask = emitter.tensor(node.value(3), node)
    dims, keys = emitter.known_shape(mask, node), emitter.known_shape(key, node)[2]
    if emitter.algebra.proves(as_expr(dims[-1]) < keys):
        dtype = emitter.dtype(mask)
        hidden = np.zeros((), bool) if dtype == "bool" else np.array(-np.inf, dtype)
        rest = filled([*dims[:-1], emitter.algebra.simplify(keys - dims[-1])], hidden)
        return emitter.emit(R.concat([mask, emitter.emit(rest)], len(dims) - 1))
    return of_shape(emitter, mask, [*dims[:-1], keys], node)


def _may_see_nothing(node: Node) -> bool:
    """Whether a query may see no key: never by causality alone, where it sees itself, nor by a mask that is known."""
    mask = node.constant(3)
    if mask is None and node.has(3):
        return True
    if mask is not None and not (mask if mask.dtype == bool else mask > -np.inf).any(-1).all():
        return True
    windows = any(int(node.attributes.get(f"{side}_window_size", -1)) >= 0 for side in ("left", "right"))
    return node.has(6) or windows or (mask is not None and bool(node.attributes.get("is_causal", 0)))


def _sees_something(emitter: Emitter, seen: list[relax.Expr], mask: relax.Expr | None) -> relax.Expr:
    """Whether a query sees any key, (..., queries, 1) bool."""
    conditions = list(seen)
    if mask is not None:
        conditions.append(emitter.emit(R.greater(mask, relax.const(-np.inf, emitter.dtype(mask)))))
    every = functools.reduce(lambda a, b: emitter.emit(R.logical_and(a, b)), conditions)
    return _as(emitter, emitter.emit(R.max(_as(emitter, every, "int8"), -1, keepdims=True)), "bool")


def _kept_where(emitter: Emitter, condition: relax.Expr, x: relax.Expr) -> relax.Expr:
    return emitter.emit(R.where(condition, x, relax.const(0, emitter.dtype(x))))


def rotary_embedding(emitter: Emitter, node: Node) -> relax.Expr:
    """``RotaryEmbedding`` by rows of tables at given positions, or by tables that hold a row for every token."""
    x = emitter.tensor(node.value(0), node)
    rows = emitter.rank(x) == 3
    if rows:
        x = split_heads(emitter, x, int(node.required("num_heads")), node)
    size = emitter.known_shape(x, node)[-1]
    turned = int(node.attributes.get("rotary_embedding_dim", 0)) or size
    tables = [_table(emitter, node, node.value(index), turned) for index in (1, 2)]
    result = rotate(emitter, x, tables[0], tables[1], interleaved=bool(node.attributes.get("interleaved", 0)))
    return join_heads(emitter, result) if rows else result


def _table(emitter: Emitter, node: Node, table: Value, turned: int) -> relax.Expr:
    """The cosines or sines of every token, (batch, 1, length, pairs)."""
    pairs = emitter.known_shape(table, node)[-1]
    if 2 * pairs != turned:
        node.refuse(f"its tables have {describe(pairs)} angles for {turned} features, expected {turned // 2}")
    if not node.has(3):
        return emitter.emit(R.expand_dims(emitter.tensor(table, node), 1))
    places = emitter.tensor(node.value(3), node)
    rows = R.take(emitter.tensor(table, node), places, 0, "nan")  # no embedding: angles must not be rounded
    return emitter.emit(R.expand_dims(emitter.emit(rows), 1))
