"""A cache of ternary keys and values: its memory, its counts, and what it refuses. Functions come from a library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, packed_words
from tvm_ternary.runtime import kv_cache
from tvm_ternary.runtime.kv_cache import CacheShape, KVCache
from tvm_ternary.runtime.library import load_runtime

from .conftest import ROOT

SHAPE = CacheShape(batch=2, kv_heads=2, size=20, value_size=16, capacity=300, key_planes=3, value_planes=2)
# In a process of its own: this one must not need ``tvm``.
BUILD = """
import sys, tvm
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.schedule.cpu.attention.append import append_tokens
from tvm_ternary.schedule.cpu.attention.packed import Packed
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.target import resolve
target = tvm.target.Target(resolve("native").tvm)
shape = Attention(4, 2, 20, 16, 0.25, key="bhld", value="bhld")
function = append_tokens(shape, Packed(3, 2, None), 64, (None,) * 4, simd_of(target))
module = tvm.IRModule({"append": function.with_attr("global_symbol", "append")})
tvm.compile(module, target).export_library(sys.argv[1])
"""


@pytest.fixture(scope="session")
def functions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What appends, and what makes a tensor of an array."""
    path = tmp_path_factory.mktemp("cache") / "append.so"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", BUILD, path], check=True, env=environment, timeout=120)
    tvm_ffi = load_runtime(path.parent)
    return tvm_ffi.load_module(str(path))["append"], tvm_ffi.from_dlpack


@pytest.fixture
def cache(functions: tuple[Callable[..., Any], Callable[..., Any]]) -> KVCache:
    return KVCache(SHAPE, *functions)


def tokens(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((2, count, 2, size)).astype(np.float32) for size in (20, 16))
    return k, v


def contents(cache: KVCache) -> list[np.ndarray]:
    return [np.from_dlpack(x).copy() for x in cache.arguments(cache.shape)]


def assert_same(cache: KVCache, before: list[np.ndarray]) -> None:
    for got, want in zip(contents(cache), before, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_arrays_are_those_of_the_kernels(planes: int) -> None:
    shape = replace(SHAPE, key_planes=planes, value_planes=planes, value_size=20)
    keys, values = ([packed_words(*at, field) for field in digits(planes)] for at in ((BLOCK, 20), (20, BLOCK)))
    blocks = (2, 2, 3)
    words = [[((*blocks, *one), "uint32") for one in each] for each in (keys, values)]
    scales = [((*blocks, 20), "float32"), ((*blocks, BLOCK), "float32")]
    assert shape.arrays[:-4] == [*words[0], scales[0], *words[1], scales[1]]
    assert kv_cache.BLOCK == BLOCK


def test_memory_is_there_before_the_first_token(cache: KVCache) -> None:
    before = cache.bytes
    assert before == sum(x.nbytes for x in contents(cache))
    cache.append_block(*tokens(300))
    assert cache.bytes == before
    stats = cache.stats()
    assert (stats.tokens, stats.blocks, stats.recent) == ((300, 300), (3, 3), (108, 108))
    assert (stats.bytes, stats.capacity) == (before, 300)
    assert stats.float_bytes == 4 * 2 * 600 * 36
    # Of a head: words of one and of two planes of keys, their scales, words of values, theirs; and the tail.
    block = 4 * (64 * 2 + 64 * 3 + 20 + 16 * 8 + 64)
    assert stats.used_bytes == 2 * 6 * block + 4 * 2 * 216 * 36


def test_at_once_is_one_by_one(cache: KVCache, functions: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    other = KVCache(SHAPE, *functions)
    k, v = tokens(200)
    cache.append_block(k, v)
    for n in range(200):
        other.append(k[:, n], v[:, n])
    assert_same(cache, contents(other))
    assert cache.lengths.tolist() == [200, 200]


def test_sequences_have_lengths_of_their_own(cache: KVCache) -> None:
    cache.append_block(*tokens(200))
    cache.truncate([130, 70])
    assert (cache.lengths.tolist(), cache.stats().blocks) == ([130, 70], (2, 1))
    cache.append_block(*tokens(130, 1))
    assert (cache.lengths.tolist(), cache.stats().blocks) == ([260, 200], (3, 2))
    cache.reset(1)
    assert cache.lengths.tolist() == [260, 0]
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]


def test_a_cut_keeps_what_was_there(cache: KVCache) -> None:
    k, v = tokens(200)
    cache.append_block(k, v)
    before = contents(cache)
    cache.truncate([200, 140])
    for got, want in zip(contents(cache)[:-1], before[:-1], strict=True):
        np.testing.assert_array_equal(got, want)
    # 36 tokens of a block come back from what they were rounded to.
    cache.truncate([200, 100])
    tail = contents(cache)[-4][1, :, :36]
    want = k[1, 64:100].swapaxes(0, 1)
    assert 0 < np.linalg.norm(tail - want) < 0.15 * np.linalg.norm(want)
    assert_same_sequence(before, contents(cache), 0)


def assert_same_sequence(before: list[np.ndarray], after: list[np.ndarray], sequence: int) -> None:
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[sequence], other[sequence])


def test_what_does_not_fit_leaves_it_unharmed(cache: KVCache) -> None:
    cache.append_block(*tokens(290))
    cache.truncate([200, 290])
    before = contents(cache)
    with pytest.raises(InputError, match="sequence 1: has 290 tokens and room for 300; 11 more do not fit; cut it"):
        cache.append_block(*tokens(11))
    assert_same(cache, before)
    cache.append_block(*tokens(10))
    with pytest.raises(InputError, match="sequence 1: has 300 tokens"):
        cache.append(*(x[:, 0] for x in tokens(1)))
    assert cache.lengths.tolist() == [210, 300]


def test_other_arrays_are_refused(cache: KVCache) -> None:
    cache.append_block(*tokens(70))
    before = contents(cache)
    k, v = tokens(3)
    for given, message in (
        ((k[:1], v[:1]), r"cache k: is float32 \[1, 3, 2, 20\]; expected float32 \[2, 3, 2, 20\]"),
        ((k, v[:, :2]), r"cache v: is float32 \[2, 2, 2, 16\]; expected float32 \[2, 3, 2, 16\]"),
        ((k.astype(np.float64), v), "cache k: is float64"),
        ((k[..., :19], v), "cache k"),
        ((k[:, 0], v[:, 0]), "cache k"),
    ):
        with pytest.raises(InputError, match=message):
            cache.append_block(*given)
    with pytest.raises(InputError, match="cache k"):
        cache.append(k, v)
    assert_same(cache, before)


def test_any_layout_in_memory_will_do(cache: KVCache, functions: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    k, v = tokens(150)
    cache.append_block(k, v)
    other = KVCache(SHAPE, *functions)
    k.flags.writeable = False
    other.append_block(k, np.asfortranarray(v))
    assert_same(other, contents(cache))


def test_lengths_that_cannot_be(cache: KVCache) -> None:
    cache.append_block(*tokens(70))
    for lengths, message in (
        ([71, 0], "sequence 0: cannot be cut to 71 tokens; expected 0 to 70"),
        ([0, -1], "sequence 1: cannot be cut to -1"),
        ([5], "expected 2 whole numbers"),
        ([1.5, 2.0], "expected 2 whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            cache.truncate(lengths)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sequence 2: does not exist; expected 0 to 1"):
        cache.reset(2)
    assert cache.lengths.tolist() == [70, 70]


def test_a_cache_of_another_shape_is_refused(cache: KVCache) -> None:
    assert len(cache.arguments(SHAPE)) == len(SHAPE.arrays)
    for other in (replace(SHAPE, batch=3), replace(SHAPE, capacity=400), replace(SHAPE, key_planes=2)):
        with pytest.raises(InputError, match="cache: is CacheShape"):
            cache.arguments(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch 0: is too small"),
        ({"capacity": -1}, "capacity -1"),
        ({"key_planes": 4}, "key_planes 4: does not exist; expected 1 to 3"),
        ({"window": 32}, "window 32: is no multiple of 64"),
    ],
)
def test_shapes_that_cannot_be(change: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(SHAPE, **change)
