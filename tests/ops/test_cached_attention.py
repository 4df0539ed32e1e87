"""Attention with a cache: steps and prompts against float64 on what the cache stands for, cut, reset and refused."""

from __future__ import annotations

import platform
from copy import copy
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm_ffi

from tvm_ternary.errors import HostError, InputError, OptionError
from tvm_ternary.kernels.attention import reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, quantize_block
from tvm_ternary.ops import CachedAttention, cached_attention
from tvm_ternary.runtime.kv_cache import KVCache

HEADS, KV, SIZE, CAPACITY, WINDOW = 4, 2, 16, 700, 64
Floats = npt.NDArray[Any]


def tokens(count: int, batch: int = 1, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Queries, keys and values."""
    random = np.random.default_rng(seed)
    return tuple(  # type: ignore[return-value]
        random.standard_normal((batch, count, heads, SIZE), np.float32) for heads in (HEADS, KV, KV)
    )


@cache
def compiled(**options: Any) -> CachedAttention:
    return cached_attention(HEADS, SIZE, CAPACITY, kv_heads=KV, **{"window": WINDOW, "activation_bits": 32, **options})


def make(**options: Any) -> CachedAttention:
    """One with an empty cache of its own; its functions are compiled once for all tests."""
    attention = copy(compiled(**options))
    attention.cache = KVCache(attention.cache.shape, attention.cache._append, tvm_ffi.from_dlpack)
    return attention


def rounded(x: Floats, packed: int, planes: int, axis: int) -> Floats:
    """(tokens, heads, elements) as a cache holds them whose first tokens are packed."""
    whole = x[:packed].reshape(-1, BLOCK, *x.shape[1:]).swapaxes(1, 2)
    back = dequantize_block(*quantize_block(whole, planes, axis), axis).swapaxes(1, 2).reshape(packed, *x.shape[1:])
    return np.concatenate([back, x[packed:]])


def expected(q: Floats, k: Floats, v: Floats, packed: int, planes: tuple[int, int] = (2, 2)) -> Floats:
    """What the last tokens see: q (tokens, heads, elements), k and v all so far."""
    keys, values = rounded(k, packed, planes[0], -2), rounded(v, packed, planes[1], -1) if planes[1] else v
    total = len(k)
    mask = np.where(np.arange(total) <= total - len(q) + np.arange(len(q))[:, None], 0.0, -np.inf)
    q, keys, values = (x.swapaxes(0, 1)[None] for x in (q, keys, values))
    return np.asarray(reference_attention(q, keys, values, SIZE**-0.5, mask)[0].swapaxes(0, 1))


@pytest.mark.parametrize("planes", [(1, 1), (2, 2), (3, 3), (2, 0)])
def test_steps(planes: tuple[int, int]) -> None:
    """Mean absolute error below 1e-6 against float64 on what the cache stands for, at every length."""
    attention = make(planes=planes)
    q, k, v = tokens(330)
    for n in range(330):
        y = attention(*(x[:, n : n + 1] for x in (q, k, v)))
        packed = max(0, (n + 1 - WINDOW) // BLOCK) * BLOCK
        want = expected(q[0, n : n + 1], k[0, : n + 1], v[0, : n + 1], packed, planes)
        assert np.abs(y[0] - want).mean() < 1e-6
    assert attention.cache.stats().blocks == (4,)


def test_a_prompt_leaves_what_its_tokens_leave() -> None:
    """The caches are equal to the bit; of a prompt, what is seen in float is what a step sees."""
    at_once, one_by_one = make(), make()
    q, k, v = tokens(200)
    prompt = at_once(q, k, v)
    steps = [one_by_one(*(x[:, n : n + 1] for x in (q, k, v))) for n in range(200)]
    for ours, theirs in zip(at_once.cache._arrays, one_by_one.cache._arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(prompt[:, :WINDOW], np.concatenate(steps[:WINDOW], 1), atol=2e-6)
    # Afterwards a block of two planes may have been packed up to a window earlier.
    assert np.abs(prompt - np.concatenate(steps, 1)).mean() < 0.1 * np.abs(prompt).mean()
    fresh = tokens(1, seed=1)
    np.testing.assert_array_equal(at_once(*fresh), one_by_one(*fresh))


@pytest.mark.parametrize("bits", [1, 8, 32])
def test_no_token_sees_a_later_one(bits: int) -> None:
    q, k, v = tokens(150)
    first = make(activation_bits=bits)(q, k, v)
    # The last token of the first part of a window: what comes behind it within the part must not reach it.
    changed = [x.copy() for x in (q, k, v)]
    for x in changed[1:]:
        x[:, 101:] = 1e3
    np.testing.assert_array_equal(make(activation_bits=bits)(*changed)[:, 64:101], first[:, 64:101])


def test_sequences_of_different_lengths() -> None:
    """One is cut within its packed block, whose first tokens stay what they were rounded to; the other goes on."""
    attention = make(batch=2)
    q, k, v = tokens(171, 2)
    attention(q[:, :170], k[:, :170], v[:, :170])
    attention.cache.truncate([40, 170])
    both = attention(*(x[:, 170:] for x in (q, k, v)))
    assert attention.cache.lengths.tolist() == [41, 171]
    cut_k, cut_v = (rounded(x[0, :BLOCK], BLOCK, 2, axis)[:40] for x, axis in ((k, -2), (v, -1)))
    first = expected(q[0, 170:], np.concatenate([cut_k, k[0, 170:]]), np.concatenate([cut_v, v[0, 170:]]), 0)
    assert np.abs(both[0] - first).mean() < 1e-6
    assert np.abs(both[1] - expected(q[1, 170:], k[1], v[1], BLOCK)).mean() < 1e-6


def test_ten_thousand_steps_with_cuts_and_resets() -> None:
    """Memory is what it was, and every length ends where it should."""
    attention = make()
    random, length, before = np.random.default_rng(0), 0, attention.cache.bytes
    q, k, v = tokens(1)
    exact, packed = v[0, 0], rounded(np.repeat(v[0], BLOCK, 0), BLOCK, 2, -1)[0]
    exact, packed = (np.repeat(x, HEADS // KV, 0) for x in (exact, packed))
    for step in range(10_000):
        y = attention(q, k, v)
        length += 1
        if length == CAPACITY or random.random() < 0.003:
            length = 0 if random.random() < 0.3 else int(random.integers(0, length + 1))
            attention.cache.truncate([length]) if length else attention.cache.reset()
        if step % 500 == 0:
            # Equal tokens: whatever the weights, a mean of what is packed and what is not.
            assert (np.abs(y[0, 0] - exact) <= np.abs(packed - exact) + 1e-5).all()
    assert attention.cache.lengths.tolist() == [length]
    assert attention.cache.bytes == before


def test_a_full_cache_is_left_as_it_is() -> None:
    attention = make()
    q, k, v = tokens(CAPACITY)
    attention(*(x[:, : CAPACITY - 3] for x in (q, k, v)))
    kept = [array.copy() for array in attention.cache._arrays]
    with pytest.raises(InputError, match="cache sequence 0: has 697 tokens and room for 700; 70 more do not fit"):
        attention(*(x[:, :70] for x in (q, k, v)))
    for array, before in zip(attention.cache._arrays, kept, strict=True):
        np.testing.assert_array_equal(array, before)


def test_what_is_not_finite_shows() -> None:
    """As in float attention, a key that is no number makes all outputs of its head none."""
    attention = make()
    q, k, v = tokens(200)
    k[0, 3, 1, 5] = np.nan
    y = attention(q, k, v)
    assert np.isnan(y[0, 3:, HEADS // KV :]).all()
    assert np.isfinite(y[0, :, : HEADS // KV]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.astype(np.float64), k, v), "attention q: is float64"),
        (lambda q, k, v: (q[:, :, :3], k, v), r"q: is float32 \[1, 5, 3, 16\]; expected float32 \[1, tokens, 4"),
        (lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0]), "attention q: is float32"),
        (lambda q, k, v: (q, k[:, :4], v), "attention k: has shape .* expected 5 tokens, as q has"),
        (lambda q, k, v: (q, k[..., :8], v), "cache k: is float32"),
        (lambda q, k, v: (q, k, v[:, :, :1]), "cache v: is float32"),
        (lambda q, k, v: (np.repeat(q, 2, 0), k, v), "attention q: is float32"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(change: Any, message: str) -> None:
    attention = make()
    with pytest.raises(InputError, match=message):
        attention(*change(*tokens(5)))
    assert attention.cache.lengths.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "kv_heads 3: does not divide the 4 heads"),
        ({"activation_bits": 16}, "activation_bits 16: does not exist here; expected 1, 8 or 32"),
        ({"planes": 4}, "cache key_planes 4: does not exist; expected 1 to 3"),
        ({"planes": (2, 1, 1)}, r"planes \(2, 1, 1\): are not for keys and values; expected one number or two"),
        ({"planes": "2"}, "planes 2: are not for keys and values"),
        ({"window": 10}, "cache window 10: is no multiple of 64"),
        ({"batch": 0}, "cache batch 0: is too small"),
        ({"target": "cuda-sm_90"}, "target cuda-sm_90: is no CPU"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cached_attention(HEADS, SIZE, CAPACITY, **{"kv_heads": KV, **options})


def test_a_target_that_does_not_run_here() -> None:
    other = "x86-64-v2" if platform.machine() == "aarch64" else "aarch64"
    with pytest.raises(HostError, match=f"target {other}: "):
        make(target=other)
