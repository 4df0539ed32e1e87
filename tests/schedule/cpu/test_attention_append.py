"""Tokens appended to a cache of packed blocks and last tokens, against the definition of a block in numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from tests.schedule.cpu.graphs import EPSILON, TIERS, normal
from tvm_ternary.kernels.attention import Attention, reference_attention
from tvm_ternary.kernels.hadamard import hadamard_rows
from tvm_ternary.kernels.ternary_keys import (
    BLOCK,
    STEPS,
    dequantize_block,
    digits,
    pack,
    packed_words,
    quantize_block,
    unpack,
)
from tvm_ternary.schedule.cpu.attention.append import append_tokens
from tvm_ternary.schedule.cpu.attention.packed import Packed, attention_step
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import resolve

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, key="bhld", value="bhld")
ALL = 2**31 - 1
Lengths = tuple[int | None, ...]
UNKNOWN: Lengths = (None,) * 4
Block = tuple[np.ndarray, np.ndarray]


@cache
def compiled(
    tier: str, shape: Attention, planes: tuple[int, int], window: int, new: tuple[str, str], lengths: Lengths
) -> Any:
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    function = append_tokens(shape, Packed(*planes, None), window, lengths, simd_of(target), new)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target, tir_pipeline=TIR_PIPELINE)["main"]


def laid(x: np.ndarray, layout: str) -> np.ndarray:
    """An array of axes bhld in another layout."""
    return np.ascontiguousarray(x.transpose(["bhld".index(axis) for axis in layout]))


@dataclass
class Kept:
    """A cache, and beside it what every block and tail was made of. Of what is not set yet, nothing is a number."""

    shape: Attention = SHAPE
    planes: tuple[int, int] = (2, 2)
    window: int = 64
    batch: int = 2
    blocks: int = 6
    room: int = 0
    new: tuple[str, str] = ("blhd", "blhd")
    seed: int = 0

    def __post_init__(self) -> None:
        shape, rng = self.shape, np.random.default_rng(self.seed)
        heads, self.appended = (self.batch, shape.kv_heads), 0
        self.sizes = (shape.size, shape.value_size)
        self.matrices = ((BLOCK, shape.size), (shape.value_size, BLOCK))
        self.words, self.scales, self.tails = [], [], []
        for n, size in enumerate(self.sizes):
            outer = (*heads, self.blocks)
            extents = [(*outer, *packed_words(*self.matrices[n], field)) for field in digits(self.planes[n])]
            self.words.append([tvm.runtime.tensor(rng.integers(0, 2**32, e, np.uint32)) for e in extents])
            scale = np.full((*outer, (size, BLOCK)[n]), np.nan, np.float32)
            tail = np.full((*heads, self.room or self.window + BLOCK, size), np.nan, np.float32)
            self.scales.append(tvm.runtime.tensor(scale))
            self.tails.append(tvm.runtime.tensor(laid(tail, (shape.key, shape.value)[n])))
        self.counts = [tvm.runtime.tensor(np.zeros(self.batch, np.int32)) for _ in range(2)]
        # Of each sequence, for keys and values: the blocks and the tail in float.
        self.made = [([[], []], [np.zeros((shape.kv_heads, 0, size), np.float32) for size in self.sizes])] * self.batch

    @property
    def state(self) -> list[Any]:
        (keys, values), (key_scale, value_scale) = self.words, self.scales
        return [*keys, key_scale, *values, value_scale, *self.tails, *self.counts]

    def tokens(self, count: int) -> list[np.ndarray]:
        """New keys and values, of axes bhld, others each time."""
        self.appended += 2
        first = 1000 * self.seed + self.appended
        return [
            normal(first + n, self.batch, self.shape.kv_heads, count, size) * np.float32(1 + n)
            for n, size in enumerate(self.sizes)
        ]

    def append(
        self, tier: str, new: list[np.ndarray], past: tuple[int, ...] | int = ALL, lengths: Lengths = UNKNOWN
    ) -> None:
        keep = np.broadcast_to(np.array(past, np.int32), self.batch)
        self.made = [self._appended(b, [x[b] for x in new], int(keep[b])) for b in range(self.batch)]
        arrays = [*(laid(x, layout) for x, layout in zip(new, self.new, strict=True)), np.ascontiguousarray(keep)]
        main = compiled(tier, self.shape, self.planes, self.window, self.new, lengths)
        main(*(tvm.runtime.tensor(x) for x in arrays), *self.state)

    def _appended(self, b: int, new: list[np.ndarray], past: int) -> Any:
        (k_blocks, v_blocks), tail = self.made[b]
        full, past = len(k_blocks), max(past, 0)
        if past < BLOCK * full:
            cut = past // BLOCK
            back = [self.read(b, cut, n)[:, : past % BLOCK] for n in range(2)]
            blocks, tail = [k_blocks[:cut], v_blocks[:cut]], back
        else:
            blocks, tail = [list(k_blocks), list(v_blocks)], [x[:, : past - BLOCK * full] for x in tail]
        tail = [np.concatenate(pair, 1) for pair in zip(tail, new, strict=True)]
        while tail[0].shape[1] >= self.window + BLOCK:
            for n in range(2):
                blocks[n].append(tail[n][:, :BLOCK])
            tail = [x[:, BLOCK:] for x in tail]
        return blocks, tail

    def packed(self, b: int, block: int, n: int) -> Block:
        """Numbers, tokens by elements, and scales of a block of keys (0) or values (1), (heads, ...)."""
        words = [x.numpy()[b, :, block] for x in self.words[n]]
        codes = unpack(words, *self.matrices[n], self.planes[n])
        for got, want in zip(words, pack(codes, self.planes[n]), strict=True):
            np.testing.assert_array_equal(got, want)
        return codes.swapaxes(-1, -2) if n else codes, self.scales[n].numpy()[b, :, block]

    def read(self, b: int, block: int, n: int) -> np.ndarray:
        """What a block stands for."""
        return dequantize_block(*self.packed(b, block, n), (-2, -1)[n]).astype(np.float32)

    def tail(self, b: int, n: int) -> np.ndarray:
        layout = (self.shape.key, self.shape.value)[n]
        return self.tails[n].numpy().transpose([layout.index(axis) for axis in "bhld"])[b]

    def check(self) -> None:
        full, recent = (x.numpy() for x in self.counts)
        for b, (blocks, tail) in enumerate(self.made):
            assert (full[b], recent[b]) == (len(blocks[0]), tail[0].shape[1])
            for n in range(2):
                np.testing.assert_array_equal(self.tail(b, n)[:, : recent[b]], tail[n])
                for number, x in enumerate(blocks[n]):
                    check_block(x, *self.packed(b, number, n), self.planes[n], (-2, -1)[n])


def check_block(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, planes: int, axis: int) -> None:
    """Numbers are those of the definition but where an element is in the middle of two, and scales are of these.

    Two sums of n magnitudes in any order differ by at most n epsilon of their value, and what is done with them rounds
    a few times more. All terms of a scale's sum have one sign, so the same holds for it.
    """
    bound = (x.shape[axis] + 8) * EPSILON
    want, _ = quantize_block(x, planes, axis)
    mean = np.abs(x.astype(np.float64)).mean(axis, keepdims=True)
    steps = np.abs(x) / np.where(mean > 0, mean * STEPS[planes], 1)
    middle = np.abs(steps - np.floor(steps) - 0.5) <= bound * steps
    moved = np.abs(codes.astype(int) - want)
    assert np.all(moved <= middle)
    wide = codes.astype(np.float64)
    norm = (wide * wide).sum(axis)
    fitted = (x * wide).sum(axis) / np.where(norm > 0, norm, 1)
    assert np.all(np.abs(scale - fitted) <= bound * np.abs(fitted))


@pytest.mark.parametrize("planes", [(1, 1), (2, 2), (3, 3), (2, 1), (1, 3)])
def test_planes(tier: str, planes: tuple[int, int]) -> None:
    kept = Kept(planes=planes)
    for count in (5, 1, 70, 130):
        kept.append(tier, kept.tokens(count))
        kept.check()
    assert [len(blocks[0]) for blocks, _ in kept.made] == [2, 2]


@pytest.mark.parametrize(("size", "planes"), [(3, 1), (20, 3), (64, 2), (80, 1), (80, 3), (128, 2), (128, 3)])
def test_sizes_of_heads(tier: str, size: int, planes: int) -> None:
    kept = Kept(replace(SHAPE, size=size, value_size=size), (planes, planes), window=0, batch=1)
    kept.append(tier, kept.tokens(140))
    kept.check()


@pytest.mark.parametrize("window", [0, 64, 128])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 127, 128, 129, 192, 300])
def test_tokens_at_once(tier: str, window: int, count: int) -> None:
    kept = Kept(window=window, batch=1)
    for _ in range(2):
        kept.append(tier, kept.tokens(count), 70)
        kept.check()


@pytest.mark.parametrize("window", [0, 64, 128])
@pytest.mark.parametrize("room", [0, 300])
def test_at_once_is_bit_for_bit_one_by_one(tier: str, window: int, room: int) -> None:
    """Of sequences of different lengths."""
    caches = [Kept(window=window, room=room) for _ in range(3)]
    for kept, pieces in zip(caches, ([300], [1] * 300, [100, 1, 62, 65, 72]), strict=True):
        kept.append(tier, kept.tokens(100))
        new, start = kept.tokens(300), 0
        for count in pieces:
            piece = [x[:, :, start : start + count] for x in new]
            kept.append(tier, piece, (100, 37) if start == 0 else ALL)
            start += count
    caches[0].check()
    for other in caches[1:]:
        for got, want in zip(other.state, caches[0].state, strict=True):
            np.testing.assert_array_equal(got.numpy(), want.numpy())


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_sequences_are_cut(tier: str, planes: int, window: int) -> None:
    """To nothing; within a block; between two; within the tail; not at all; and then within a block that came back."""
    kept = Kept(planes=(planes, planes), window=window, batch=6)
    kept.append(tier, kept.tokens(270))
    kept.append(tier, kept.tokens(3), (0, 100, 128, 260, 270, ALL))
    kept.check()
    kept.append(tier, kept.tokens(130))
    kept.check()
    kept.append(tier, kept.tokens(1), (5, 70, 127, 191, 192, 1))
    kept.check()


def test_a_count_below_zero_keeps_nothing() -> None:
    kept = Kept()
    kept.append("avx2", kept.tokens(200))
    new = kept.tokens(70)
    kept.append("avx2", new, (-1, -(2**31)))
    assert [x.numpy().tolist() for x in kept.counts] == [[0, 0], [70, 70]]
    np.testing.assert_array_equal(kept.tail(1, 0)[:, :70], new[0][1])


@pytest.mark.parametrize(
    ("tail", "new"), [(("blhd", "bhld"), ("bhld", "bhld")), (("bhld", "bhdl"), ("bhdl", "lbhd")), (("hlbd",) * 2,) * 2]
)
def test_layouts(tier: str, tail: tuple[str, str], new: tuple[str, str]) -> None:
    kept = Kept(replace(SHAPE, key=tail[0], value=tail[1]), new=new, room=131)
    kept.append(tier, kept.tokens(200))
    kept.append(tier, kept.tokens(9), (33, 150))
    kept.check()


def test_known_lengths(tier: str) -> None:
    kept = Kept()
    kept.append(tier, kept.tokens(191), lengths=(2, 191, 6, 128))
    kept.check()
    kept.append(tier, kept.tokens(1), lengths=(2, 1, 6, 128))
    kept.check()


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_shows(tier: str, planes: int, value: float) -> None:
    """As in the definition: a scale that is no number, and numbers that are zero; elsewhere nothing is moved."""
    kept = Kept(planes=(planes, planes), window=0, batch=1)
    k, v = kept.tokens(64)
    # The last one stands for a sum that overflows.
    k[0, 1, 7 if np.isnan(value) or np.isinf(value) else slice(None), 5] = value
    v[0, 0, 9, 3 if np.isnan(value) or np.isinf(value) else slice(None)] = value
    kept.append(tier, [k, v])
    for n, x in enumerate((k, v)):
        codes, scale = kept.packed(0, 0, n)
        want_codes, want_scale = quantize_block(x[0], planes, (-2, -1)[n])
        np.testing.assert_array_equal(np.isnan(scale), np.isnan(want_scale))
        assert np.isnan(scale).sum() == 1
        fine = np.expand_dims(~np.isnan(scale), (-2, -1)[n])
        assert not codes[~np.broadcast_to(fine, codes.shape)].any()
        assert not want_codes[~np.broadcast_to(fine, codes.shape)].any()
        check_block(np.where(fine, x[0], 0), codes, np.where(np.isnan(scale), 0, scale), planes, (-2, -1)[n])


@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-30, 1e30])
def test_magnitudes(tier: str, magnitude: float) -> None:
    """What is too small to be divided by is zero."""
    kept = Kept(window=0, batch=1)
    kept.append(tier, [x * np.float32(magnitude) for x in kept.tokens(64)])
    kept.check()
    for n in range(2):
        assert all(part.any() == (magnitude > 1e-37) for part in kept.packed(0, 0, n))


@cache
def compiled_alone(function: str, shape: Attention) -> Any:
    target = tvm.target.Target(resolve(TIERS["avx2"]).tvm)
    main = (
        hadamard_rows(shape.size, shape.size)
        if function == "hadamard"
        else attention_step(shape, Packed(3, 3, None), (None,) * 4, simd_of(target))
    )
    return tvm.compile(
        tvm.IRModule({"main": main.with_attr("global_symbol", "main")}), target, tir_pipeline=TIR_PIPELINE
    )["main"]


def rotate(x: np.ndarray, shape: Attention) -> np.ndarray:
    """Turn every head."""
    y = tvm.runtime.tensor(np.empty_like(x).reshape(-1, shape.size))
    compiled_alone("hadamard", shape)(tvm.runtime.tensor(x.reshape(-1, shape.size)), y)
    return y.numpy().reshape(x.shape)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_step_reads_what_was_appended(rotated: bool) -> None:
    """And, where keys and queries are rotated, what a step gives is what their products give unrotated."""
    shape = replace(SHAPE, size=16)
    kept = Kept(shape, (3, 3), batch=2)
    k, v = kept.tokens(200)
    q = normal(3, 2, shape.heads, 1, shape.size)
    exact = reference_attention(q, k, v, shape.scale)
    if rotated:
        k, q = rotate(k, shape), rotate(q, shape)
    kept.append("avx2", [k, v])
    kept.append("avx2", [k[:, :, 190:], v[:, :, 190:]], (190, 190))
    out = tvm.runtime.tensor(np.empty((2, 1, shape.heads, shape.value_size), np.float32))
    compiled_alone("step", shape)(tvm.runtime.tensor(laid(q, "blhd")), *kept.state, out)
    full, recent = (x.numpy() for x in kept.counts)
    assert full.tolist() == [2, 2]
    for b in range(2):
        read = [
            np.concatenate([*(kept.read(b, i, n) for i in range(full[b])), kept.tail(b, n)[:, : recent[b]]], 1)
            for n in range(2)
        ]
        want = reference_attention(q[b : b + 1], read[0][None], read[1][None], shape.scale)[0]
        # A score that is off by e moves weights by the factor exp(e), and so does their sum.
        products = shape.scale * np.abs(q[b, :, 0]).max(0) @ np.abs(read[0]).max(0).T
        off = (shape.size + 8) * EPSILON * products.max()
        moved = np.expm1(2 * off) + 2 * (3e-7 + 208 * EPSILON)
        assert np.abs(out.numpy()[b].swapaxes(0, 1) - want).max() <= moved * np.abs(read[1]).max()
        # Three planes leave some percent of a key's and a value's size; of a turned key beside a query as it was, all.
        assert np.linalg.norm(want - exact[b]) < 0.1 * np.linalg.norm(exact[b])


@pytest.mark.parametrize(
    ("window", "room", "message"), [(32, None, "multiple of 64"), (-64, None, "multiple"), (64, 127, "needs 128")]
)
def test_a_window_that_cannot_be(window: int, room: int | None, message: str) -> None:
    simd = simd_of(tvm.target.Target(resolve(TIERS["avx2"]).tvm))
    with pytest.raises(ValueError, match=message):
        append_tokens(SHAPE, Packed(2, 2, None), window, (None, None, None, room), simd)
