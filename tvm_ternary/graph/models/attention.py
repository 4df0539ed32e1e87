"""Attention over whole sequences, and the masks that it adds to its scores."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.errors import ModelError
from tvm_ternary.graph.models.builder import GraphBuilder

MASKED = float(np.finfo(np.float32).min)
"""What is added to the score of a key that must not be seen: finite, so that a row of nothing else gives no NaN."""


def padding_mask(graph: GraphBuilder, attention_mask: relax.Expr) -> relax.Var:
    """What to add to scores where ``attention_mask`` (batch, sequence) is zero: (batch, 1, 1, sequence) float32."""
    seen = graph.reshape(attention_mask, graph.batch, 1, 1, graph.sequence)
    seen = graph.emit(R.not_equal(seen, relax.const(0, "int64")))
    return _additive(graph, seen)


def causal_mask(graph: GraphBuilder, attention_mask: relax.Expr, window: int | None = None) -> relax.Var:
    """The same, and later positions are masked too: (batch, 1, sequence, total) float32.

    Parameters
    ----------
    window : int, optional
        How many positions a query sees, its own included; None for all before it.
    """
    positions, query, seen = not_later(graph)
    if window is not None:
        near = graph.emit(R.greater(positions, graph.emit(R.subtract(query, relax.const(window, "int64")))))
        seen = graph.emit(R.logical_and(seen, near))
    keys = graph.reshape(attention_mask, graph.batch, 1, 1, graph.total)
    seen = graph.emit(R.logical_and(graph.emit(R.not_equal(keys, relax.const(0, "int64"))), seen))
    return _additive(graph, seen)


def not_later(graph: GraphBuilder) -> tuple[relax.Var, relax.Var, relax.Var]:
    """Positions (total,), the new ones as a column, and whether each of a row is at most that of the column."""
    positions = graph.emit(R.arange(0, graph.total, 1, "int64"))
    new = graph.emit(R.arange(graph.past, graph.total, 1, "int64"))
    column = graph.reshape(new, graph.sequence, 1)
    return positions, column, graph.emit(R.less_equal(positions, column))


def _additive(graph: GraphBuilder, seen: relax.Expr) -> relax.Var:
    return graph.emit(R.where(seen, relax.const(0.0, "float32"), relax.const(MASKED, "float32")))


def split_heads(graph: GraphBuilder, x: relax.Expr, heads: int, size: int) -> relax.Var:
    """(batch, sequence, heads * size) to (batch, sequence, heads, size)."""
    return graph.reshape(x, graph.batch, graph.sequence, heads, size)


def attend(
    graph: GraphBuilder, query: relax.Expr, key: relax.Expr, value: relax.Expr, mask: relax.Expr, scale: float
) -> relax.Var:
    """softmax(scale q k^T + mask) v for every head.

    Parameters
    ----------
    query : (batch, sequence, heads, size)
    key, value : (batch, sequence, kv_heads, size)
        Where there are fewer of them than heads, each serves as many neighbouring heads (grouped-query attention). The
        queries of a group then are more rows of one product: no key is copied.
    mask : (batch, 1, 1 or sequence, total)
    scale : float

    Returns
    -------
    (batch, sequence, heads * size)

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, equation 1; Ainslie et al., "GQA", 2023, section 2.2.
    """
    key, value = graph.remember(key, value)
    heads, size = (int(dim) for dim in query.ty.shape.values[2:])
    kv_heads = int(key.ty.shape.values[2])
    if heads % kv_heads:
        raise ModelError("config.json", f"says {heads} heads for {kv_heads} of keys, expected a multiple")
    group, batch, length = heads // kv_heads, graph.batch, graph.sequence
    query = graph.emit(R.permute_dims(query, [0, 2, 1, 3]))
    if group > 1:
        query = graph.reshape(query, batch, kv_heads, group * length, size)
    scores = graph.emit(R.matmul(query, graph.emit(R.permute_dims(key, [0, 2, 3, 1]))))
    if group > 1:
        scores = graph.reshape(scores, batch, heads, length, graph.total)
    scores = graph.emit(R.multiply(scores, relax.const(scale, "float32")))
    weights = graph.emit(R.nn.softmax(graph.emit(R.add(scores, mask)), -1))
    if group > 1:
        weights = graph.reshape(weights, batch, kv_heads, group * length, graph.total)
    mixed = graph.emit(R.matmul(weights, graph.emit(R.permute_dims(value, [0, 2, 1, 3]))))
    if group > 1:
        mixed = graph.reshape(mixed, batch, heads, length, size)
    return graph.reshape(graph.emit(R.permute_dims(mixed, [0, 2, 1, 3])), batch, length, heads * size)
