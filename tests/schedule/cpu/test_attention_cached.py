"""Attention with its cache, call after call, against float64 on what a list of tokens stands for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from tests.schedule.cpu.graphs import EPSILON, TIERS, normal
from tvm_ternary.kernels.attention import Attention, reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, quantize_block
from tvm_ternary.runtime.kv_cache import CacheShape
from tvm_ternary.schedule.cpu.attention.cached import cached_attention
from tvm_ternary.schedule.cpu.attention.packed import Packed
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.intrinsics import BYTE_DOTS
from tvm_ternary.target import resolve

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, mask="bms")
Lengths = tuple[int | None, int | None]
UNKNOWN: Lengths = (None, None)
LARGE = 1_000_000


@cache
def compiled(tier: str, shape: Attention, planes: tuple[int, int], rounded: bool, lengths: Lengths) -> Any:
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    packed = Packed(*planes, BYTE_DOTS[tier] if rounded else None)
    function = cached_attention(shape, packed, lengths, simd_of(target)).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target)["main"]


def laid(x: np.ndarray, layout: str) -> np.ndarray:
    """An array of axes bhld in another layout."""
    return np.ascontiguousarray(x.transpose(["bhld".index(axis) for axis in layout]))


class Remembered:
    """The keys, or the values, of one sequence: blocks as numbers and scales, then tokens in float."""

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
            self.blocks.append(quantize_block(self.tail[:, :BLOCK], self.planes, self.axis))
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
        given += [*([] if mask is None else [mask]), np.array(past, np.int32)]
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
        # A score that is hidden has no weight, whatever it is.
        shown = np.where(added > -1e30, np.abs(added), 0)
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
        moved = np.expm1(2 * off) + 2 * (3e-7 + (2 * BLOCK + total + 4 * total // BLOCK) * EPSILON)
        bound = moved * (weights @ np.abs(wide_v))
        if rounded:
            vc, vs = (np.stack(x, 1) for x in zip(*sequence[1].blocks, strict=True))
            blocks = vs.shape[1]
            packed = weights[..., : blocks * BLOCK].reshape(*weights.shape[:2], blocks, BLOCK)
            # Which blocks are weighed together depends on the mask.
            step = (packed * np.repeat(vs, group, 0)[:, None]).max((-1, -2)) / 127
            bound = bound + (1 + moved) * 0.5 * step[..., None] * np.abs(np.repeat(vc, group, 0)).sum((1, 2))[:, None]
        return np.asarray(bound + 1e-30)


def causal(
    layer: Layer, queries: int, hide: float = -np.inf, window: int = LARGE, padded: tuple[int, ...] = ()
) -> np.ndarray:
    """A mask bms of all tokens there will be: none sees a later one, one a window before, or what is padded."""
    starts = np.array(layer.lengths)[:, None, None]
    numbers = np.arange(max(layer.lengths) + queries)
    own = starts + np.arange(queries)[:, None]
    seen = (numbers <= own) & (numbers > own - window)
    for b, count in enumerate(padded):
        seen[b, :, :count] = False
    return np.where(seen, 0, hide).astype(np.float32)[:, None]


CALLS = (1, 5, 64, 1, 200, 1, 1, 3, 70)


@pytest.mark.parametrize("window", [0, 64, 1024])
def test_calls(tier: str, window: int) -> None:
    layer = Layer(window=window)
    for count in CALLS:
        layer.check(tier, layer.tokens(count), causal(layer, count))
