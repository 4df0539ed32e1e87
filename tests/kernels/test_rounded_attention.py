"""Attention over rounded keys and values against a cache that is kept token by token, in float64 and in loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tvm_ternary.kernels.rounded_attention import Rounding, rounded_attention, sight

Array = npt.NDArray[Any]
HEADS, KV, SIZE, VALUE_SIZE, SCALE = 4, 2, 8, 6, 0.4
ROUNDING = (64 + 8) * 2.0**-23
"""Of what numbers stand for, relatively: 64 of them are summed for their scale in float32."""


def tensors(queries: int, keys: int, seed: int = 0) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    shapes = (HEADS, queries, SIZE), (KV, keys, SIZE), (KV, keys, VALUE_SIZE)
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)  # type: ignore[return-value]


def rounded(numbers: Array, planes: int) -> Array:
    """Numbers that share a scale."""
    if not planes:
        return numbers
    step = {1: 1.534, 2: 0.667, 3: 0.271}[planes] * np.abs(numbers).mean()
    most = sum(3**p for p in range(planes))
    whole = np.clip(np.rint(numbers / step), -most, most)
    return whole * (numbers @ whole) / (whole @ whole)


def packed(keys: Array, values: Array, planes: tuple[int, int]) -> tuple[Array, Array]:
    """A block (tokens, elements) each: keys by elements, values by tokens."""
    k = np.stack([rounded(channel, planes[0]) for channel in keys.T], axis=1)
    return k, np.stack([rounded(token, planes[1]) for token in values])


def attended(query: Array, keys: Array, values: Array, added: Array) -> Array:
    scores = np.array([SCALE * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]) + added
    weights = np.exp(scores - scores.max())
    return sum(w * value for w, value in zip(weights, values, strict=True)) / weights.sum()


def near(found: Array, query: Array, keys: Array, values: Array, want: Array) -> None:
    """Weights move by e^(2 d) - 1 at most where scores do by d, and values by their rounding."""
    d = SCALE * ROUNDING * (np.abs(keys) @ np.abs(query)).max()
    assert np.abs(found - want).max() <= (np.expm1(2 * d) + ROUNDING) * np.abs(values).max()


def step_by_step(k: Array, v: Array, window: int, planes: tuple[int, int]) -> list[tuple[Array, Array]]:
    """The keys and values of one head that each token finds: its own are in, and blocks are packed as they leave."""
    done_k, done_v, tail, states = np.zeros((0, k.shape[1])), np.zeros((0, v.shape[1])), list[Any](), []
    for token in zip(k.astype(np.float64), v.astype(np.float64), strict=True):
        tail.append(token)
        if len(tail) == window + 64:
            block, tail = tail[:64], tail[64:]
            new_k, new_v = packed(*(np.array(x) for x in zip(*block, strict=True)), planes)
            done_k, done_v = np.concatenate([done_k, new_k]), np.concatenate([done_v, new_v])
        rest = [np.array([t[n] for t in tail]).reshape(len(tail), -1) for n in (0, 1)] if tail else None
        states.append(
            (done_k, done_v) if rest is None else (np.concatenate([done_k, rest[0]]), np.concatenate([done_v, rest[1]]))
        )
    return states


def causal(queries: int, keys: int, hidden: float = -np.inf) -> Array:
    own = np.arange(keys - queries, keys)[:, None]
    return np.where(np.arange(keys) <= own, 0.0, hidden).astype(np.float32)[None]


@pytest.mark.parametrize(
    ("planes", "window", "queries", "hidden"),
    [((2, 1), 64, 150, -np.inf), ((3, 0), 0, 150, -1e4), ((1, 2), 0, 3, np.finfo(np.float32).min), ((2, 2), 64, 1, -1)],
)
def test_a_causal_query_finds_the_cache_as_its_token_left_it(
    planes: tuple[int, int], window: int, queries: int, hidden: float
) -> None:
    q, k, v = tensors(queries, 150)
    mask = causal(queries, 150, hidden) if queries > 1 else None
    seen = sight(mask, queries, 150, window)
    found = rounded_attention(q, k, v, SCALE, mask, Rounding(*planes, window), seen)
    for kv in range(KV):
        states = step_by_step(k[kv], v[kv], window, planes)
        for head in (2 * kv, 2 * kv + 1):
            for m in {0, queries // 3, queries - 1}:
                keys, values = states[150 - queries + m]
                want = attended(q[head, m].astype(np.float64), keys, values, np.zeros(len(keys)))
                near(found[head, m], q[head, m], keys, values, want)
    blocks = [max(0, (n + 1 - window) // 64) for n in range(150 - queries, 150)]
    assert seen.packed.tolist() == [64 * count for count in blocks]
    pairs = [min(64 * count, n + 1) for n, count in zip(range(150 - queries, 150), blocks, strict=True)]
    assert seen.pairs == (sum(pairs), sum(range(151 - queries, 151)))


@pytest.mark.parametrize(("window", "count"), [(0, 141), (64, 64), (128, 0)])
def test_a_text_read_at_once_is_one_cache_for_all_queries(window: int, count: int) -> None:
    """Without a window the last block is a short one; what is padded is neither counted nor of any block."""
    q, k, v = tensors(150, 150, seed=1)
    random = np.random.default_rng(2)
    mask = random.standard_normal((HEADS, 150, 150)).astype(np.float32)
    mask[..., 141:] = -np.inf
    seen = sight(mask, 150, 150, window)
    found = rounded_attention(q, k, v, SCALE, mask, Rounding(2, 1, window), seen)
    other = rounded_attention(
        q, *(np.concatenate([x[:, :141], 9 + x[:, 141:]], 1) for x in (k, v)), SCALE, mask, Rounding(2, 1, window), seen
    )
    np.testing.assert_array_equal(found, other)
    assert set(seen.packed) == {count}
    for head, m in ((0, 0), (1, 149), (3, 70)):
        parts = [(k[head // 2, a:b], v[head // 2, a:b]) for a, b in ((0, 64), (64, 128), (128, 141))]
        parts = [
            packed(*(x.astype(np.float64) for x in part), (2, 1)) if end <= count else part
            for part, end in zip(parts, (64, 128, 141), strict=True)
        ]
        keys, values = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
        want = attended(q[head, m].astype(np.float64), keys, values, mask[head, m, :141].astype(np.float64))
        near(found[head, m], q[head, m], keys, values, want)


def test_left_padding_counts_as_no_token_of_a_sequence() -> None:
    q, k, v = tensors(140, 140, seed=3)
    mask = causal(140, 140).copy()
    mask[..., :7] = -np.inf
    seen = sight(mask, 140, 140, 64)
    found = rounded_attention(q, k, v, SCALE, mask, Rounding(2, 2), seen)
    assert not found[:, :7].any(), "a query that sees no key gives zeros"
    assert np.flatnonzero(seen.packed)[0] == 7 + 127
    keys, values = step_by_step(k[1, 7:], v[1, 7:], 64, (2, 2))[-1]
    want = attended(q[2, -1].astype(np.float64), keys, values, np.zeros(133))
    near(found[2, -1], q[2, -1], keys, values, want)


def test_turned_heads_are_rounded_as_such_and_turned_back() -> None:
    """Values of 6 elements turn in blocks of 2."""
    q, k, v = tensors(64, 64, seed=4)
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    turn = np.kron(np.kron(two, two), two) / 8**0.5
    turn_values = np.kron(np.eye(3), two) / 2**0.5
    keys, values = packed(k[0].astype(np.float64) @ turn, v[0].astype(np.float64) @ turn_values, (1, 2))
    mask = np.ones((1, 1, 1), np.float32)
    found = rounded_attention(q, k, v, SCALE, mask, Rounding(1, 2, 0, True), sight(mask, 64, 64, 0))
    query = q[1, 5].astype(np.float64) @ turn
    want = attended(query, keys, values, np.zeros(64)) @ turn_values.T
    # Turning is rounded, too, and turning back adds two numbers over the root of two.
    near(found[1, 5] / 2**0.5, query, keys, values, want / 2**0.5)
    exact = rounded_attention(q, k, v, SCALE, None, Rounding(0, 0, 0), sight(None, 64, 64, 0))
    plain = attended(q[1, 5].astype(np.float64), k[0].astype(np.float64), v[0].astype(np.float64), np.zeros(64))
    np.testing.assert_allclose(exact[1, 5], plain, rtol=1e-12)


def test_no_key_at_all_is_no_error() -> None:
    q, k, v = tensors(3, 5)
    mask = np.full((1, 3, 5), -np.inf, np.float32)
    seen = sight(mask, 3, 5, 0)
    assert not rounded_attention(q, k, v, SCALE, mask, Rounding(1, 1, 0), seen).any()
    assert seen.pairs == (0, 0)
