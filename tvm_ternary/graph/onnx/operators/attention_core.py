"""What every attention operator comes down to: softmax(scale q k^T + bias) v, and the masks that are its bias.

Attention, MultiHeadAttention and GroupQueryAttention, of either operator set, differ in how they pack heads, keep past
keys and spell masks. They bring them to these forms, so that the passes behind see one attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.shaping import same_shape
from tvm_ternary.graph.onnx.values import Dim, as_expr, describe


class Attended(NamedTuple):
    """The result of an attention and what it computes on the way.

    Attributes
    ----------
    output : (batch, heads, queries, value_size)
    scores, capped, biased, weights : (batch, heads, queries, keys)
        The scaled products, those after the cap, those with the bias, and their softmax.
    """

    output: relax.Var
    scores: relax.Var
    capped: relax.Var
    biased: relax.Var
    weights: relax.Var


def attend(
    emitter: Emitter,
    query: relax.Expr,
    key: relax.Expr,
    value: relax.Expr,
    *,
    scale: float,
    bias: Sequence[relax.Expr] = (),
    softcap: float = 0.0,
) -> Attended:
    """softmax(softcap * tanh(scale * q k^T / softcap) + bias) v for every head.

    Parameters
    ----------
    query : (batch, heads, queries, size)
    key : (batch, kv_heads, keys, size)
    value : (batch, kv_heads, keys, value_size)
        Where there are fewer of them than heads, each serves as many neighbouring heads. The queries of such a group
        are more rows of one product: no key is copied.
    scale : float
    bias : sequence of tensors that broadcast to (batch, heads, queries, keys)
        Their sum is added to the scores; of the dtype of those.
    softcap : float
        0 for none.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, equation 1; Ainslie et al., "GQA", 2023, section 2.2.
    """
    batch, heads, queries, size = _dims(emitter, query)
    _, kv_heads, keys, value_size = _dims(emitter, value)
    dtype = emitter.dtype(query)
    grouped = not emitter.algebra.equal(heads, kv_heads)
    rows = emitter.algebra.simplify(heads // kv_heads * queries) if grouped else queries
    if grouped:
        query = reshape(emitter, query, [batch, kv_heads, rows, size])
    scores = emitter.emit(R.matmul(query, emitter.emit(R.permute_dims(key, [0, 1, 3, 2]))))
    if grouped:
        scores = reshape(emitter, scores, [batch, heads, queries, keys])
    if scale != 1.0:
        scores = emitter.emit(R.multiply(scores, relax.const(scale, dtype)))
    capped = scores
    if softcap:
        bent = emitter.emit(R.tanh(emitter.emit(R.multiply(scores, relax.const(1 / softcap, dtype)))))
        capped = emitter.emit(R.multiply(bent, relax.const(softcap, dtype)))
    biased = capped
    if bias:
        total = functools.reduce(lambda left, right: emitter.emit(R.add(left, right)), bias)
        biased = emitter.emit(R.add(capped, total))
    weights = emitter.emit(R.nn.softmax(biased, -1))
    factor = reshape(emitter, weights, [batch, kv_heads, rows, keys]) if grouped else weights
    output = emitter.emit(R.matmul(factor, value))
    if grouped:
        output = reshape(emitter, output, [batch, heads, queries, value_size])
    return Attended(output, scores, capped, biased, weights)


# Masks: booleans that are true where a key is seen, and what is added to scores where it is not


def positions(emitter: Emitter, count: Dim, start: Dim = 0) -> relax.Var:
    """The integers from ``start`` on, (count,) int64."""
    end = emitter.algebra.simplify(start + count)
    return emitter.emit(R.arange(as_expr(start), as_expr(end), as_expr(1), "int64"))


def seen_by(
    emitter: Emitter, query: relax.Expr, key: relax.Expr, *, before: int | None = None, after: int | None = 0
) -> relax.Var:
    """Which keys a query sees by where both stand.

    Parameters
    ----------
    query : (..., queries, 1) int64
        Positions of queries.
    key : (keys,) int64
        Positions of keys.
    before, after : int, optional
        How far before and after itself a query sees; None without end. By default all before it, none after it.

    Returns
    -------
    (..., queries, keys) bool
    """
    conditions = []
    if after is not None:
        last = query if after == 0 else emitter.emit(R.add(query, relax.const(after, "int64")))
        conditions.append(emitter.emit(R.less_equal(key, last)))
    if before is not None:
        first = emitter.emit(R.subtract(query, relax.const(before, "int64")))
        conditions.append(emitter.emit(R.greater_equal(key, first)))
    seen, *others = conditions
    for other in others:
        seen = emitter.emit(R.logical_and(seen, other))
    return seen


def causal(emitter: Emitter, queries: Dim, keys: Dim, past: Dim = 0) -> relax.Var:
    """Which keys come no later than a query that has ``past`` keys before the first query: (queries, keys) bool."""
    rows = emitter.emit(R.expand_dims(positions(emitter, queries, past), 1))
    return seen_by(emitter, rows, positions(emitter, keys))


def additive(emitter: Emitter, seen: relax.Expr, dtype: str, masked: float | None = None) -> relax.Var:
    """Zero where a key is seen, elsewhere ``masked``.

    By default that is the lowest finite number: a query that sees nothing then gives the mean of everything, no NaN.
    """
    low = float(np.finfo(dtype).min) if masked is None else masked
    return emitter.emit(R.where(seen, relax.const(0.0, dtype), relax.const(low, dtype)))


# Heads


def split_heads(emitter: Emitter, x: relax.Expr, heads: int, node: Node) -> relax.Var:
    """(batch, length, heads * size) to (batch, heads, length, size)."""
    batch, length, width = _dims(emitter, x)
    if not isinstance(width, int) or width % heads:
        node.refuse(f"{describe(width)} features are not divisible by {heads} heads")
    apart = reshape(emitter, x, [batch, length, heads, width // heads])
    return emitter.emit(R.permute_dims(apart, [0, 2, 1, 3]))


def join_heads(emitter: Emitter, x: relax.Expr) -> relax.Var:
    """(batch, heads, length, size) to (batch, length, heads * size)."""
    batch, heads, length, size = _dims(emitter, x)
    turned = emitter.emit(R.permute_dims(x, [0, 2, 1, 3]))
    return reshape(emitter, turned, [batch, length, emitter.algebra.simplify(heads * size)])


def append(emitter: Emitter, past: relax.Expr | None, new: relax.Expr) -> relax.Expr:
    """Past keys or values (batch, heads, past, size), where there are some, followed by new ones."""
    return new if past is None else emitter.emit(R.concat([past, new], 2))


def reshape(emitter: Emitter, x: relax.Expr, dims: Sequence[Dim]) -> relax.Var:
    """X in another shape of as many elements."""
    return emitter.emit(R.reshape(x, relax.ShapeExpr([as_expr(dim) for dim in dims])))


def of_shape(emitter: Emitter, x: relax.Expr, dims: Sequence[Dim], node: Node) -> relax.Expr:
    """X, whose shape has to be this one: where the two cannot be compared now, they are when the module runs.

    Raises
    ------
    UnsupportedOperatorError
        If they differ.
    """
    got = _dims(emitter, x)
    if same_shape(emitter, got, dims):
        return x
    pairs = zip(got, dims, strict=False)
    if len(got) != len(dims) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        node.refuse(f"an input of shape {describe(got)} is where {describe(list(dims))} is expected")
    return emitter.builder.match_cast(x, relax.TensorType([as_expr(dim) for dim in dims], emitter.dtype(x)))


def _dims(emitter: Emitter, x: relax.Expr) -> list[Dim]:
    shape = emitter.shape(x)
    assert shape is not None
    return shape
