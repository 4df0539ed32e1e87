"""Attention with its cache, call after call, against float64 on what a list of tokens stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedule.cpu.graphs import EPSILON, TIERS, normal
from tvm_ternary.kernels.attention import Attention, pack_mask, reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, quantize_block
from tvm_ternary.runtime.kv_cache import CacheShape
from tvm_ternary.schedule.cpu.attention.cached import cached_attention
from tvm_ternary.schedule.cpu.attention.packed import Packed
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.intrinsics import BYTE_DOTS
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import resolve

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, mask="bms")
Lengths = tuple[int | None, int | None]
UNKNOWN: Lengths = (None, None)
LARGE = 1_000_000
FLOAT_LOWEST = float(np.finfo(np.float32).min)


@cache
def compiled(tier: str, shape: Attention, planes: tuple[int, int], rounded: bool, lengths: Lengths) -> Any:
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    packed = Packed(*planes, BYTE_DOTS[tier] if rounded else None)
    function = cached_attention(shape, packed, lengths, simd_of(target)).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target, tir_pipeline=TIR_PIPELINE)["main"]


def laid(x: np.ndarray, layout: str) -> np.ndarray:
    """An array of axes bhld in another layout."""
    return np.ascontiguousarray(x.transpose(["bhld".index(axis) for axis in layout]))


class Remembered:
    """The keys, or the values, of one sequence: blocks as numbers and scales, then tokens in float.

    Without planes the numbers are the tokens, and scales one.
    """

    def __init__(self, heads: int, size: int, planes: int, axis: int) -> None:
        self.planes, self.axis = planes, axis
        self.blocks: list[tuple[np.ndarray, np.ndarray]] = []
        self.tail = np.zeros((heads, 0, size), np.float32)

    def cut(self, past: int) -> None:
        whole = past // BLOCK
        if whole < len(self.blocks):
            self.tail = dequantize_block(*self.blocks[whole], self.axis).astype(np.float32)
            self.blocks = self.blocks[:whole]
        self.tail = self.tail[:, : past - BLOCK * len(self.blocks)]

    def seen(self, new: np.ndarray) -> np.ndarray:
        """All of it in float64, and new ones."""
        return np.concatenate([*(dequantize_block(*x, self.axis) for x in self.blocks), self.tail, new], 1)

    def append(self, new: np.ndarray, window: int) -> None:
        self.tail = np.concatenate([self.tail, new], 1)
        while self.tail.shape[1] >= window + BLOCK:
            block = self.tail[:, :BLOCK]
            exact = block, np.ones(block.shape[:-1], np.float32)
            self.blocks.append(quantize_block(block, self.planes, self.axis) if self.planes else exact)
            self.tail = self.tail[:, BLOCK:]


class Layer:
    """A cache, and beside it what it stands for. Of what is not set yet, nothing is a number."""

    def __init__(
        self,
        shape: Attention = SHAPE,
        planes: tuple[int, int] = (2, 2),
        *,
        rounded: bool = False,
        window: int = 64,
        batch: int = 2,
        capacity: int = 700,
    ) -> None:
        self.shape, self.planes, self.rounded, self.window, self.batch = shape, planes, rounded, window, batch
        of_cache = CacheShape(batch, shape.kv_heads, shape.size, shape.value_size, capacity, *planes, window)
        self.state = [
            tvm.runtime.tensor(
                np.full(extents, np.nan if dtype == "float32" else 0xFFFFFFFF if dtype == "uint32" else 0, dtype)
            )
            for extents, dtype in of_cache.arrays
        ]
        self.sequences = [
            [
                Remembered(shape.kv_heads, size, count, axis)
                for size, count, axis in zip((shape.size, shape.value_size), planes, (-2, -1), strict=True)
            ]
            for _ in range(batch)
        ]
        self.calls = 0

    @property
    def lengths(self) -> list[int]:
        return [len(k.blocks) * BLOCK + k.tail.shape[1] for k, _ in self.sequences]

    def tokens(self, count: int) -> list[np.ndarray]:
        """Queries, keys and values of axes bhld, others each time."""
        self.calls += 1
        shape = self.shape
        return [
            normal(100 * self.calls + n, self.batch, heads, count, size)
            for n, (heads, size) in enumerate(
                [(shape.heads, shape.size), (shape.kv_heads, shape.size), (shape.kv_heads, shape.value_size)]
            )
        ]

    def call(
        self,
        tier: str,
        tokens: list[np.ndarray],
        mask: np.ndarray | None = None,
        past: list[int] | None = None,
        lengths: Lengths = UNKNOWN,
    ) -> np.ndarray:
        """What the function gives, of axes bhld."""
        shape, q = self.shape, tokens[0]
        past = self.lengths if past is None else past
        out = np.full((*q.shape[:-1], shape.value_size), np.nan, np.float32)
        layouts = (shape.query, shape.key, shape.value)
        given = [*(laid(x, layout) for x, layout in zip(tokens, layouts, strict=True))]
        if mask is not None:
            given.append(mask if shape.hidden is None else pack_mask(mask == 0))
        given.append(np.array(past, np.int32))
        result = tvm.runtime.tensor(laid(out, shape.out))
        main = compiled(tier, shape, self.planes, self.rounded, lengths)
        main(*map(tvm.runtime.tensor, given), *self.state, result)
        return np.asarray(result.numpy()).transpose([shape.out.index(axis) for axis in "bhld"])

    def check(
        self,
        tier: str,
        tokens: list[np.ndarray],
        mask: np.ndarray | None = None,
        past: list[int] | None = None,
        lengths: Lengths = UNKNOWN,
    ) -> None:
        got = self.call(tier, tokens, mask, past, lengths)
        for b, (sequence, kept) in enumerate(zip(self.sequences, past or self.lengths, strict=True)):
            new = [x[b] for x in tokens]
            for part in sequence:
                part.cut(kept)
            keys, values = (part.seen(x) for part, x in zip(sequence, new[1:], strict=True))
            shown = None
            if mask is not None:
                shown = np.broadcast_to(
                    mask[b if len(mask) > 1 else 0], (self.shape.heads, len(new[0][0]), mask.shape[-1])
                )
                shown = shown[..., : keys.shape[1]] if mask.shape[-1] > 1 else shown
            want = reference_attention(new[0][None], keys[None], values[None], self.shape.scale, shown)[0]
            bound = self._bound(new[0].astype(np.float64), keys, values, sequence, shown)
            error = np.abs(got[b] - want)
            assert np.all(error <= bound), (b, error.max(), bound.min())
            for part, x in zip(sequence, new[1:], strict=True):
                part.append(x, self.window)
        full, recent = (x.numpy().tolist() for x in self.state[-2:])
        assert full == [len(k.blocks) for k, _ in self.sequences]
        assert recent == [k.tail.shape[1] for k, _ in self.sequences]

    def _bound(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, sequence: list[Remembered], mask: np.ndarray | None
    ) -> np.ndarray:
        """How far a result may be off.

        A score that is off by e moves weights by the factor exp(e), and so does their sum. The scales of a block are
        off by (n + 8) / 2 epsilon (`append_tokens`). Rounded, a query's element is off by half a step of its block,
        which counts as often as the key's number says; and so is a weight by half a step of its span.
        """
        shape, total, group = self.shape, k.shape[1], self.shape.group
        wide_k, wide_v = (np.repeat(x, group, 0) for x in (k, v))
        products = shape.scale * np.abs(q) @ np.abs(wide_k).swapaxes(-1, -2)
        scores = shape.scale * q @ wide_k.swapaxes(-1, -2)
        added = np.zeros_like(scores) if mask is None else scores * 0 + mask
        # A score that is hidden has no weight, whatever it is, and of a row of the lowest number all are that number;
        # beside any other large one, float has few bits left for them.
        shown = np.where((added > -1e4) | (added.max(-1, keepdims=True) == -1e9), np.abs(added), 0)
        off = ((shape.size + BLOCK + 16) * products + 4 * (products + shown)).max(-1, keepdims=True) * EPSILON
        scores = scores + added
        peak = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1)
        rounded = self.rounded and q.shape[1] <= 4 and sequence[0].blocks
        if rounded:
            kc, ks = (np.stack(x, 1) for x in zip(*sequence[0].blocks, strict=True))
            asked = np.abs(shape.scale * q[:, None] * np.repeat(ks, group, 0)[:, :, None])
            codes = np.abs(np.repeat(kc, group, 0).astype(np.float64)).sum(-1)
            steps = 0.5 * asked.max(-1)[..., None] / 127 * codes[:, :, None]  # heads, blocks, queries, tokens
            off = off + steps.max((1, 3))[..., None]
        with np.errstate(over="ignore"):
            moved = np.expm1(2 * off) + 2 * (3e-7 + (2 * BLOCK + total + 4 * total // BLOCK) * EPSILON)
        bound = moved * (weights @ np.abs(wide_v))
        if rounded and self.planes[1]:
            vc, vs = (np.stack(x, 1) for x in zip(*sequence[1].blocks, strict=True))
            blocks = vs.shape[1]
            packed = weights[..., : blocks * BLOCK].reshape(*weights.shape[:2], blocks, BLOCK)
            # Which blocks are weighed together depends on the mask.
            step = (packed * np.repeat(vs, group, 0)[:, None]).max((-1, -2)) / 127
            bound = bound + (1 + moved) * 0.5 * step[..., None] * np.abs(np.repeat(vc, group, 0)).sum((1, 2))[:, None]
        return np.asarray(bound + 1e-30)


def seen(layer: Layer, queries: int, window: int = LARGE, padded: tuple[int, ...] = ()) -> np.ndarray:
    """Which of all tokens there will be a new one sees, axes bms: none behind it, a window before, or padded."""
    numbers = np.arange(max(layer.lengths) + queries)
    own = np.array(layer.lengths)[:, None, None] + np.arange(queries)[:, None]
    result = (numbers <= own) & (numbers > own - window)
    for b, count in enumerate(padded):
        result[b, :, :count] = False
    return result


def mask_of(shown: np.ndarray, hide: float = -np.inf) -> np.ndarray:
    """Axes b1ms."""
    return np.where(shown, 0, hide).astype(np.float32)[:, None]


@pytest.mark.parametrize("window", [0, 64, 1024])
def test_calls(tier: str, window: int) -> None:
    """Prompts and steps, also of a cache in which nothing is ever packed.

    On one tier masks are of floats and the function takes any length; on others they are of bits, and two lengths are
    known, which compiles in half the time.
    """
    open_ = tier == "avx2"
    layer = Layer(SHAPE if open_ else replace(SHAPE, hidden=-np.inf), window=window, batch=1)
    for count in (1, 5, 64, 1, 200, 1, 1, 3, 70) if open_ else (1, 70, 1, 70, 70, 1, 1, 70):
        lengths = UNKNOWN if open_ else (1, count)
        layer.check(tier, layer.tokens(count), mask_of(seen(layer, count)), lengths=lengths)


@pytest.mark.parametrize("hide", [-np.inf, FLOAT_LOWEST, -1e9])
def test_masks(hide: float) -> None:
    """Of sequences of different lengths: padding, a sliding window, and what looks ahead; in steps and prompts."""
    layer = Layer()
    layer.check("avx2", layer.tokens(300), mask_of(seen(layer, 300, padded=(70, 3)), hide))
    layer.check("avx2", layer.tokens(2), mask_of(seen(layer, 2), hide)[..., :302], [130, 300])
    for count in (1, 4, 21, 100):
        layer.check("avx2", layer.tokens(count), mask_of(seen(layer, count, padded=(1, 129)), hide))
        layer.check("avx2", layer.tokens(count), mask_of(seen(layer, count, window=40), hide))
        random = normal(count, 2, 1, count, max(layer.lengths) + count + 5)
        layer.check("avx2", layer.tokens(count), np.where(random > -1, random, np.float32(hide)))


def test_bits_are_what_they_stand_for() -> None:
    """To the bit, in prompts and steps."""
    layers = Layer(), Layer(replace(SHAPE, hidden=FLOAT_LOWEST))

    def call(count: int, **kind: Any) -> None:
        tokens = layers[0].tokens(count)
        mask = mask_of(seen(layers[0], count, **kind), FLOAT_LOWEST)
        got = [layer.call("avx2", tokens, mask, layers[0].lengths) for layer in layers]
        np.testing.assert_array_equal(got[1], got[0])
        for part, x in zip(np.transpose(layers[0].sequences), tokens[1:], strict=True):
            for b, sequence in enumerate(part):
                sequence.append(x[b], layers[0].window)

    call(300, padded=(70, 3))
    for count in (1, 4, 21, 100):
        call(count, padded=(1, 129))
        call(count, window=40)
    call(2, padded=(300, 600))


CALLS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 4, 5, 17, 64, 130]),
        st.sampled_from(["causal", "window", "padded", "random", "all"]),
        st.tuples(st.floats(0, 1), st.floats(0, 1)) | st.none(),
        st.sampled_from([-np.inf, FLOAT_LOWEST]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=15, deadline=None)
@given(calls=CALLS, window=st.sampled_from([0, 64, 192]), seed=st.integers(0, 99))
def test_whatever_comes(
    calls: list[tuple[int, str, tuple[float, float] | None, float]], window: int, seed: int
) -> None:
    """Prompts and steps with masks of all kinds, and cuts to any part of what each sequence has."""
    layer = Layer(window=window)
    layer.calls = 10 * seed
    for count, kind, cut, hide in calls:
        kept = [int(have * part) for have, part in zip(layer.lengths, cut or (1, 1), strict=True)]
        shown = np.ones((2, count, max(kept) + count), bool)
        if kind in ("causal", "window", "padded"):
            numbers, own = np.arange(shown.shape[-1]), np.array(kept)[:, None, None] + np.arange(count)[:, None]
            shown = (numbers <= own) & (numbers > own - (30 if kind == "window" else LARGE))
            shown[1, :, : kept[1] // 2 if kind == "padded" else 0] = False
        elif kind == "random":
            shown = normal(seed, *shown.shape) > -0.5
        # A row that sees nothing is another test's.
        shown[..., 0] |= ~shown.any(-1)
        layer.check("avx2", layer.tokens(count), mask_of(shown, hide), kept)


@pytest.mark.parametrize("count", [3, 40])
def test_queries_that_see_nothing(count: int) -> None:
    """Zeros; but if all that hides is a number, however large, nothing is hidden."""
    layer = Layer()
    layer.check("avx2", layer.tokens(200), mask_of(seen(layer, 200)))
    shown = seen(layer, count)
    shown[0, :2] = shown[1] = False
    got = layer.call("avx2", layer.tokens(count), mask_of(shown))
    assert not got[0, :, :2].any()
    assert not got[1].any()
    assert np.abs(got[0, :, 2:]).min() > 0
    layer.check("avx2", layer.tokens(count), mask_of(shown, FLOAT_LOWEST), [200, 200])


def test_cuts() -> None:
    """To nothing, within blocks and the tail, and not at all, however much is asked for."""
    layer = Layer(window=0)
    for count, past in (
        (200, [0, 0]),
        (5, [100, 199]),
        (1, [0, 204]),
        (70, [1, 64]),
        (3, [70, 0]),
        (30, [LARGE, LARGE]),
    ):
        have = layer.lengths
        kept = [min(a, b) for a, b in zip(past, have, strict=True)]
        mask = np.zeros((2, 1, count, max(kept) + count), np.float32)
        layer.check("avx2", layer.tokens(count), mask, past)


@pytest.mark.parametrize("planes", [(2, 2), (3, 1), (1, 0)])
def test_planes(planes: tuple[int, int]) -> None:
    """Many queries see all numbers as they are; few may be rounded. Last, a cut brings tokens of a block back.

    Of few queries that are not rounded, other planes are in the tests of the step alone.
    """
    layer = Layer(planes=planes, batch=1)
    for count, rounded in ((300, False), (300, False), (1, True)):
        layer.rounded = rounded
        mask = mask_of(seen(layer, count, window=400))
        layer.check("avx2", layer.tokens(count), mask, lengths=(1, count))
    layer.check("avx2", layer.tokens(1), np.zeros((1, 1, 1, 101), np.float32), [100], lengths=(1, 1))


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        (Attention(3, 1, 64, 64, 0.125, mask="hms"), (150, 1)),
        (Attention(2, 2, 96, 20, 0.1, query="bhld", key="bhdl", value="bhld", out="lbhd"), (150, 3)),
        (Attention(2, 1, 40, 16, 0.2, mask="bs"), (150, 1)),
        (Attention(2, 1, 16, 16, 0.2, mask="bm"), (150,)),
    ],
    ids=["one head of keys", "no groups, no mask, other layouts", "padding", "no axis of keys"],
)
def test_shapes(shape: Attention, counts: tuple[int, ...]) -> None:
    layer = Layer(shape, batch=1)
    for count in counts * 2:
        extents = {"b": 1, "h": shape.heads, "m": count, "s": max(layer.lengths) + count}
        mask = normal(count, *(extents[axis] if axis in shape.mask else 1 for axis in "bhms"))
        layer.check("avx2", layer.tokens(count), mask if shape.mask else None, lengths=(1, count))


@pytest.mark.parametrize(("count", "hide"), [(1, -np.inf), (3, FLOAT_LOWEST), (40, -np.inf), (40, FLOAT_LOWEST)])
def test_what_is_hidden_moves_no_bit(count: int, hide: float) -> None:
    """Tokens in float and packed ones; and blocks of which nothing is seen need not even hold numbers."""
    results = []
    for changed in (False, True):
        # One of the masks is bits.
        layer = Layer(SHAPE if hide == -np.inf else replace(SHAPE, hidden=hide))
        layer.check("avx2", layer.tokens(500), mask_of(seen(layer, 500)))
        tokens = layer.tokens(count)
        shown = seen(layer, count, padded=(130, 130))
        shown[:, :, [140, 150, 470, 480]] = False
        if changed:
            words, key_scale, value_words, value_scale, tail_k, tail_v = (x.numpy() for x in layer.state[:6])
            words[:, :, :2], value_words[:, :, :2] = 0x12345678, 0x87654321
            key_scale[:, :, :2] = value_scale[:, :, :2] = np.nan
            for token in (140, 150):
                block, row = divmod(token, BLOCK)
                words[:, :, block, row // 16, :, row % 16] ^= 0x33333333
                value_scale[:, :, block, row] *= -3
            start = BLOCK * int(layer.state[-2].numpy()[0])
            tail_k[:, :, [470 - start, 480 - start]] = 100
            tail_v[:, :, [470 - start, 480 - start]] = -1e30
            for to, x in zip(layer.state, (words, key_scale, value_words, value_scale, tail_k, tail_v), strict=False):
                to.copyfrom(x)
        results.append(layer.call("avx2", tokens, mask_of(shown, hide)))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("count", [1, 40])
def test_a_block_that_is_no_number_shows(count: int) -> None:
    """Where something of it is seen, as in float attention; the other sequence has nothing of it."""
    layer = Layer()
    layer.check("avx2", layer.tokens(300), mask_of(seen(layer, 300)))
    scale = layer.state[1].numpy()
    scale[1, 1, 1, 3] = np.nan
    layer.state[1].copyfrom(scale)
    got = layer.call("avx2", layer.tokens(count), mask_of(seen(layer, count)))
    assert np.isfinite(got[0]).all()
    assert np.isfinite(got[1, :2]).all()
    assert np.isnan(got[1, 2:]).all()
