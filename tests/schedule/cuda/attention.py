"""A ternary cache with something in it, and what a step over it should give, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.schedule.cpu.graphs import EPSILON, normal
from tvm_ternary.kernels.attention import Attention, reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, pack, quantize_block

Floats = npt.NDArray[np.float64]
MOST = 32639
"""Numbers that queries and weights are rounded to are not larger."""


@dataclass
class Step:
    """Sequences with so many blocks and last tokens each; what lies behind them is not a number.

    Parameters
    ----------
    shape : Attention
        Tails of layout ``bhld``.
    planes : (int, int)
    queries : int
    full, recent : tuple of int
        Of each sequence.
    room : int
        Last tokens that there is memory for.
    """

    shape: Attention
    planes: tuple[int, int]
    queries: int
    full: tuple[int, ...]
    recent: tuple[int, ...]
    room: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        shape, batch, seed = self.shape, len(self.full), self.seed
        self.blocks, self.room = max(1, *self.full), max(1, self.room, *self.recent)
        self.q = normal(seed, batch, shape.heads, self.queries, shape.size)
        k = normal(seed + 1, batch, shape.kv_heads, self.blocks, BLOCK, shape.size)
        v = normal(seed + 2, batch, shape.kv_heads, self.blocks, BLOCK, shape.value_size)
        self.tails = [
            normal(seed + 3 + n, batch, shape.kv_heads, self.room, size)
            for n, size in enumerate((shape.size, shape.value_size))
        ]
        self.k, self.v = quantize_block(k, self.planes[0], -2), quantize_block(v, self.planes[1], -1)
        for b, (full, recent) in enumerate(zip(self.full, self.recent, strict=True)):
            for one in (self.k[1], self.v[1]):
                one[b, :, full:] = np.nan
            for one in self.tails:
                one[b, :, recent:] = np.nan

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        """What the function is compiled for."""
        return len(self.full), self.queries, self.blocks, self.room

    @property
    def arguments(self) -> list[npt.NDArray[Any]]:
        """All that the function reads, in order."""
        keys, values = pack(self.k[0], self.planes[0]), pack(self.v[0].swapaxes(-1, -2), self.planes[1])
        counts = [np.array(x, np.int32) for x in (self.full, self.recent)]
        q = self.q.transpose(["bhld".index(axis) for axis in self.shape.query])
        arrays = [q, *keys, self.k[1], *values, self.v[1], *self.tails, *counts]
        return [np.ascontiguousarray(array) for array in arrays]

    @cached_property
    def out(self) -> npt.NDArray[np.float32]:
        """Where results go."""
        extents = dict(zip("bhld", (*self.q.shape[:-1], self.shape.value_size), strict=True))
        return np.full([extents[axis] for axis in self.shape.out], np.nan, np.float32)

    @property
    def result(self) -> npt.NDArray[np.float32]:
        """What came, (batch, heads, queries, value_size)."""
        return self.out.transpose([self.shape.out.index(axis) for axis in "bhld"])

    def check(self) -> None:
        """Whether what came is within what rounding may change."""
        for b in range(len(self.full)):
            want, bound = self.expected(b)
            off = np.abs(self.result[b] - want)
            assert np.all(off <= bound), (b, float(off.max()), float(bound.min()))

    def expected(self, b: int) -> tuple[Floats, Floats]:
        """What should come of a sequence, and how far it may be off.

        A score that is off by e moves weights by the factor exp(e), and so does their sum. A query's element is off by
        half a step of its block, which counts as often as the key's number says, and a weight by half a step of its.
        """
        shape, group, full, recent = self.shape, self.shape.group, self.full[b], self.recent[b]
        here = np.s_[b, :, :full]
        kc, ks, vc, vs = self.k[0][here], self.k[1][here], self.v[0][here], self.v[1][here]
        blocks = [dequantize_block(kc, ks, -2), dequantize_block(vc, vs, -1)]
        k, v = (
            np.concatenate([x.reshape(shape.kv_heads, full * BLOCK, x.shape[-1]), tail[b, :, :recent]], 1)
            for x, tail in zip(blocks, self.tails, strict=True)
        )
        total = full * BLOCK + recent
        if not total:
            nothing = np.zeros((shape.heads, self.queries, shape.value_size))
            return nothing, nothing
        mask = np.where(np.arange(total) <= total - self.queries + np.arange(self.queries)[:, None], 0.0, -np.inf)
        q = self.q[b].astype(np.float64)
        want = reference_attention(q[None], k[None], v[None], shape.scale, mask)[0]
        wide_k, wide_v = (np.repeat(x, group, 0) for x in (k, v))
        products = shape.scale * np.abs(q) @ np.abs(wide_k).swapaxes(-1, -2)
        off = ((shape.size + 8) * products).max(-1, keepdims=True) * EPSILON
        asked = np.abs(shape.scale * q[:, None] * np.repeat(ks, group, 0)[:, :, None])
        codes = np.abs(np.repeat(kc, group, 0).astype(np.float64)).sum(-1)  # (heads, blocks, tokens)
        half = 0.5 * asked.max(-1, initial=0) / MOST  # (heads, blocks, queries)
        off = off + (half[..., None] * codes[:, :, None]).max((1, 3), initial=0)[..., None]
        # Powers of two are off by two last places, and weights are added one by one.
        moved = np.expm1(2 * off) + 2 * (4 + total + 4 * full) * EPSILON
        scores = shape.scale * q @ wide_k.swapaxes(-1, -2) + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        bound = moved * (weights @ np.abs(wide_v))
        packed = weights[..., : full * BLOCK].reshape(*weights.shape[:2], full, BLOCK)
        steps = (packed * np.repeat(vs, group, 0)[:, None]).max(-1, initial=0) / MOST  # (heads, queries, blocks)
        codes = np.abs(np.repeat(vc, group, 0).astype(np.float64)).sum(-2)  # (heads, blocks, elements)
        return want, bound + (1 + moved) * 0.5 * steps @ codes
