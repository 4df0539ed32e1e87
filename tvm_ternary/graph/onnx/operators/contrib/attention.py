"""``Attention``, ``QAttention`` and ``MultiHeadAttention``: heads apart, masks as a bias, past keys in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.attention_core import (
    additive,
    append,
    attend,
    causal,
    join_heads,
    of_shape,
    positions,
    reshape,
    split_heads,
)
from tvm_ternary.graph.onnx.operators.matrix import matmul
from tvm_ternary.graph.onnx.operators.quantized import dequantized
from tvm_ternary.graph.onnx.operators.shaping import window
from tvm_ternary.graph.onnx.values import Dim, Value, describe


def attention(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``Attention``: queries, keys and values are one product with a merged matrix.

    Returns
    -------
    list
        The output (batch, length, v_size), and past and new keys and values (2, batch, heads, keys, size).
    """
    if node.attributes.get("past_present_share_buffer", 0) or node.has(6):
        node.refuse("past and present share a buffer", "export the model without buffer sharing")
    return _merged(emitter, node, node.value(0), node.value(1), [node.optional(i) for i in (2, 3, 4, 5)])


def quantized_attention(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``QAttention``: the same of an int8 input and int8 weights, computed on what they stand for."""
    x = dequantized(emitter, node, 0, 3, 6, -1)
    weight = dequantized(emitter, node, 1, 4, 7, -1)
    return _merged(emitter, node, x, weight, [node.optional(i) for i in (2, 5, 8)])


def _merged(
    emitter: Emitter, node: Node, x: Value, weight: Value, optional: Sequence[Value | None]
) -> list[relax.Expr | None]:
    bias, mask, past, added, *_ = [*optional, None]
    if node.attributes.get("do_rotary", 0):
        node.refuse("attribute do_rotary is set")
    heads = int(node.required("num_heads"))
    product = emitter.emit(matmul(emitter, Node(node.proto, node.opset, (x, weight), {})))
    if bias is not None:
        product = emitter.emit(R.add(product, emitter.tensor(bias, node)))
    batch, length, width = emitter.known_shape(product, node)
    sizes = node.attributes.get("qkv_hidden_sizes") or [width // 3] * 3
    ends = [int(end) for end in np.cumsum(sizes)]
    query, key, value = (
        split_heads(emitter, emitter.emit(window(product, [2], [end - size], [end])), heads, node)
        for end, size in zip(ends, sizes, strict=True)
    )
    before: Dim = 0
    if past is not None:
        state = emitter.tensor(past, node)
        before = emitter.known_shape(state, node)[3]
        old = [emitter.emit(R.squeeze(emitter.emit(window(state, [0], [i], [i + 1])), [0])) for i in (0, 1)]
        key, value = (append(emitter, a, b) for a, b in zip(old, (key, value), strict=True))
    keys, dtype = emitter.algebra.simplify(before + length), emitter.dtype(query)
    terms = mask_terms(emitter, node, mask, dtype, batch, length, keys)
    if node.attributes.get("unidirectional", 0):
        terms.append(additive(emitter, causal(emitter, length, keys, before), dtype))
    if added is not None:
        terms.append(emitter.tensor(added, node))
    output = attend(emitter, query, key, value, scale=scale_of(emitter, node, query), bias=terms).output
    present = R.stack([key, value], 0) if len(node.outputs) > 1 and node.outputs[1] else None
    return [join_heads(emitter, output), present]


def multi_head_attention(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``MultiHeadAttention``: queries, keys and values come apart, packed, or as keys and values of heads.

    Returns
    -------
    list
        The output (batch, length, v_size), and past and new keys and values, each (batch, heads, keys, size).
    """
    for index, name in ((8, "past_sequence_length"), (9, "cache_indirection")):
        if node.has(index):
            node.refuse(f"input {name} is given", "export the model without buffer sharing and beam search")
    if len(node.outputs) > 3 and node.outputs[3]:
        node.refuse("its output qk is wanted", "export the model without it")
    heads = int(node.required("num_heads"))
    query, key, value = _apart(emitter, node, heads)
    batch, _, length, _ = emitter.known_shape(query, node)
    before: Dim = 0
    if node.has(6):
        old = [emitter.tensor(node.value(i), node) for i in (6, 7)]
        before = emitter.known_shape(old[0], node)[2]
        key, value = (append(emitter, a, b) for a, b in zip(old, (key, value), strict=True))
    keys, dtype = emitter.known_shape(key, node)[2], emitter.dtype(query)
    terms = mask_terms(emitter, node, node.optional(4), dtype, batch, length, keys)
    if node.attributes.get("unidirectional", 0):
        terms.append(additive(emitter, causal(emitter, length, keys, before), dtype))
    if node.has(5):
        terms.append(emitter.tensor(node.value(5), node))
    output = attend(emitter, query, key, value, scale=scale_of(emitter, node, query), bias=terms).output
    return [join_heads(emitter, output), key, value]


def _apart(emitter: Emitter, node: Node, heads: int) -> list[relax.Expr]:
    """Queries, keys and values (batch, heads, length, size), their biases added."""
    first = emitter.tensor(node.value(0), node)
    if emitter.rank(first) == 5:
        parts = _unpacked(emitter, node, first)
    else:
        key = emitter.tensor(node.value(1), node)
        rest = _unpacked(emitter, node, key) if emitter.rank(key) == 5 else [key, emitter.tensor(node.value(2), node)]
        parts = [first, *rest]
    bias = emitter.tensor(node.value(3), node) if node.has(3) else None
    start, result = 0, []
    for part in parts:
        if emitter.rank(part) == 4:  # keys and values of an encoder, whose biases are in them
            result.append(part)
            continue
        width = emitter.known_shape(part, node)[2]
        if bias is not None:
            part = emitter.emit(R.add(part, emitter.emit(window(bias, [0], [start], [start + width]))))
            start += width
        result.append(split_heads(emitter, part, heads, node))
    return result


def _unpacked(emitter: Emitter, node: Node, packed: relax.Expr) -> list[relax.Expr]:
    """(batch, length, heads, n, size) as n times (batch, length, heads * size)."""
    batch, length, heads, count, size = emitter.known_shape(packed, node)
    parts = [emitter.emit(window(packed, [3], [i], [i + 1])) for i in range(count)]
    return [reshape(emitter, part, [batch, length, heads * size]) for part in parts]


def scale_of(emitter: Emitter, node: Node, query: relax.Expr) -> float:
    """The factor of the scores: the attribute, or one over the root of a head's size."""
    size = emitter.known_shape(query, node)[-1]
    return float(node.attributes.get("scale", 0.0)) or float(1 / np.sqrt(size))


def mask_terms(
    emitter: Emitter, node: Node, mask: Value | None, dtype: str, batch: Dim, queries: Dim, keys: Dim
) -> list[relax.Expr]:
    """What a mask adds to the scores, nothing where there is none.

    Parameters
    ----------
    mask : Value or None
        (batch,), how many keys there are; (2 * batch,), where they end and where they start; or 0 for a key that is
        not seen, (batch, keys) or (batch, queries, keys).
    dtype : str
        Of the scores.
    batch, queries, keys : Dim

    Raises
    ------
    UnsupportedOperatorError
        If it has another shape.
    """
    if mask is None:
        return []
    tensor = emitter.tensor(mask, node)
    shape = emitter.known_shape(mask, node)
    if len(shape) == 1:
        seen = _between(emitter, node, tensor, batch, keys)
    elif len(shape) in (2, 3):
        middle: list[Any] = [queries] if len(shape) == 3 else []
        exact = of_shape(emitter, tensor, [batch, *middle, keys], node)
        seen = emitter.emit(R.greater(exact, relax.const(0, emitter.dtype(mask))))
        seen = reshape(emitter, seen, [batch, 1, *(middle or [1]), keys])
    else:
        node.refuse(f"a mask of shape {describe(shape)}", "export the model with a mask of 1, 2 or 3 dimensions")
    return [additive(emitter, seen, dtype, float(node.attributes.get("mask_filter_value", -10000.0)))]


def _between(emitter: Emitter, node: Node, bounds: relax.Expr, batch: Dim, keys: Dim) -> relax.Var:
    """Whether a key lies before the end of its row, and not before its start where there are starts."""
    (count,) = emitter.known_shape(bounds, node)
    twice = emitter.algebra.simplify(2 * batch)
    places = positions(emitter, keys)
    if not emitter.algebra.equal(count, twice):
        end = reshape(emitter, of_shape(emitter, bounds, [batch], node), [batch, 1, 1, 1])
        return emitter.emit(R.less(places, emitter.emit(R.astype(end, "int64"))))
    wide = emitter.emit(R.astype(bounds, "int64"))
    end, start = (
        reshape(emitter, emitter.emit(window(wide, [0], [a], [b])), [batch, 1, 1, 1])
        for a, b in ((0, batch), (batch, twice))
    )
    inside = emitter.emit(R.less(places, end))
    return emitter.emit(R.logical_and(inside, emitter.emit(R.greater_equal(places, start))))
