"""A step over packed blocks and last tokens, against its definition in float64 on what the blocks stand for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from tests.schedule.cpu.graphs import EPSILON, TIERS, normal
from tvm_ternary.kernels.attention import Attention, reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, pack, quantize_block
from tvm_ternary.kernels.ternary_queries import ternary_scores
from tvm_ternary.schedule.cpu.attention.packed import SPAN, Packed, attention_step
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.intrinsics import BYTE_DOTS
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import resolve

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, key="bhld", value="bhld")
DOTS = {"avx512": "avx512", "avx2": "avx2", "portable": "portable"}
Lengths = tuple[int | None, ...]
UNKNOWN: Lengths = (None,) * 4


@cache
def compiled(
    tier: str, shape: Attention, planes: tuple[int, int], rounded: bool, lengths: Lengths, trits: bool = False
) -> Any:
    target = tvm.target.Target(resolve(TIERS.get(tier, tier)).tvm)
    packed = Packed(*planes, BYTE_DOTS[DOTS[tier]] if rounded else None, trits=trits)
    function = attention_step(shape, packed, lengths, simd_of(target)).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target, tir_pipeline=TIR_PIPELINE)["main"]


@dataclass
class Case:
    """A batch of sequences, each with so many blocks and last tokens; what lies behind them is not a number."""

    shape: Attention
    planes: tuple[int, int]
    queries: int
    full: tuple[int, ...]
    recent: tuple[int, ...]
    seed: int = 0
    trits: bool = False

    def __post_init__(self) -> None:
        shape, batch, seed = self.shape, len(self.full), self.seed
        blocks, latest = max(self.full), max(self.recent)
        self.q = normal(seed, batch, shape.heads, self.queries, shape.size)
        k = normal(seed + 1, batch, shape.kv_heads, blocks, BLOCK, shape.size)
        v = normal(seed + 2, batch, shape.kv_heads, blocks, BLOCK, shape.value_size)
        self.tail = [
            normal(seed + 3 + n, batch, shape.kv_heads, latest, size)
            for n, size in enumerate((shape.size, shape.value_size))
        ]
        self.k, self.v = quantize_block(k, self.planes[0], -2), quantize_block(v, self.planes[1], -1)
        for b, (full, recent) in enumerate(zip(self.full, self.recent, strict=True)):
            for one in (self.k[1], self.v[1]):
                one[b, :, full:] = np.nan
            for one in self.tail:
                one[b, :, recent:] = np.nan

    def run(self, tier: str, rounded: bool, lengths: Lengths = UNKNOWN) -> np.ndarray:
        words = [pack(self.k[0], self.planes[0]), pack(self.v[0].swapaxes(-1, -2), self.planes[1])]
        counts = [np.array(x, np.int32) for x in (self.full, self.recent)]
        out = np.full((*self.q.shape[:-1], self.shape.value_size), np.nan, np.float32)
        arrays = [self.q, *words[0], self.k[1], *words[1], self.v[1], *self.tail, *counts]
        dims = {"b": 0, "h": 1, "l": 2, "d": 3}
        arrays[0] = self.q.transpose([dims[axis] for axis in self.shape.query])
        out = out.transpose([dims[axis] for axis in self.shape.out])
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(x)) for x in (*arrays, out)]
        compiled(tier, self.shape, self.planes, rounded, lengths, self.trits)(*tensors)
        return np.asarray(tensors[-1].numpy()).transpose([self.shape.out.index(axis) for axis in "bhld"])

    def check(self, tier: str, rounded: bool, lengths: Lengths = UNKNOWN) -> None:
        got = self.run(tier, rounded, lengths)
        for b, (full, recent) in enumerate(zip(self.full, self.recent, strict=True)):
            want, bound = self._sequence(b, full, recent, rounded)
            assert np.all(np.abs(got[b] - want) <= bound), (b, np.abs(got[b] - want).max(), bound.min())

    def _sequence(self, b: int, full: int, recent: int, rounded: bool) -> tuple[np.ndarray, np.ndarray]:
        """What should come of one sequence, and how far it may be off.

        A score that is off by e moves weights by the factor exp(e), and so does their sum. Rounded, a query's element
        is off by half a step of its block, which counts as often as the key's number says; and so is a weight by half a
        step of its span. Trits of a query are what they should be.
        """
        shape, group = self.shape, self.shape.group
        here = np.s_[b, :, :full]
        kc, ks, vc, vs = self.k[0][here], self.k[1][here], self.v[0][here], self.v[1][here]
        blocks = [dequantize_block(kc, ks, -2), dequantize_block(vc, vs, -1)]
        k, v = (
            np.concatenate([x.reshape(shape.kv_heads, full * BLOCK, x.shape[-1]), tail[b, :, :recent]], 1)
            for x, tail in zip(blocks, self.tail, strict=True)
        )
        total = full * BLOCK + recent
        mask = np.where(np.arange(total) <= total - self.queries + np.arange(self.queries)[:, None], 0.0, -np.inf)
        q = self.q[b].astype(np.float64)
        wide_k, wide_v = (np.repeat(x, group, 0) for x in (k, v))
        products = shape.scale * np.abs(q) @ np.abs(wide_k).swapaxes(-1, -2)
        scores = shape.scale * q @ wide_k.swapaxes(-1, -2)
        if self.trits:
            scores[..., : full * BLOCK] = ternary_scores(self.q[[b]], kc[None], ks[None], shape.scale)[0]
            products = np.maximum(products, np.abs(scores))
        off = ((shape.size + 8) * products).max(-1, keepdims=True) * EPSILON
        if rounded and not self.trits:
            asked = np.abs(shape.scale * q[:, None] * np.repeat(ks, group, 0)[:, :, None])
            step = asked.max(-1) / 127  # (heads, blocks, queries)
            codes = np.abs(np.repeat(kc, group, 0).astype(np.float64)).sum(-1)  # (heads, blocks, tokens)
            off = off + (0.5 * step[..., None] * codes[:, :, None]).max((1, 3), initial=0)[..., None]
        moved = np.expm1(2 * off) + 2 * (3e-7 + (total + 4 * total // BLOCK) * EPSILON)
        weights = np.exp(scores + mask - (scores + mask).max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        # An identity for keys makes scores of queries.
        ones = np.eye(total)[None].repeat(shape.kv_heads, 0)
        want = reference_attention(scores[None], ones[None], v[None], 1.0, mask)[0]
        bound = moved * (weights @ np.abs(wide_v))
        if rounded and full:
            packed = weights[..., : full * BLOCK].reshape(*weights.shape[:2], full, BLOCK)
            steps = (packed * np.repeat(vs, group, 0)[:, None]).max(-1) / 127  # (heads, queries, blocks)
            spans = np.arange(full) // SPAN
            steps = np.stack([steps[..., spans == span].max(-1) for span in spans], -1)
            codes = np.abs(np.repeat(vc, group, 0).astype(np.float64)).sum(-2)  # (heads, blocks, elements)
            bound = bound + (1 + moved) * 0.5 * steps @ codes
        return want, bound


@pytest.mark.parametrize("rounded", [False, True])
def test_lengths(tier: str, rounded: bool) -> None:
    """All from one function, the one of most tests below: with lengths unknown it compiles for seconds."""
    for queries, full, recent in itertools.product((1, 3), ((0, 2), (7, 4)), ((5, 70), (64, 3))):
        Case(SHAPE, (2, 2), queries, full, recent).check(tier, rounded)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("planes", [(1, 1), (3, 1)])
def test_planes(planes: tuple[int, int], rounded: bool) -> None:
    """On one tier: how planes become numbers is the same for all widths of vectors."""
    Case(SHAPE, planes, 3, (7, 4), (64, 3)).check("avx2", rounded, (2, 3, 7, 64))


def test_queries_of_trits() -> None:
    known = (2, 3, 7, 64)
    case = Case(SHAPE, (2, 2), 3, (7, 4), (64, 3), trits=True)
    case.check("avx2", True, known)
    case.q[1, 2, 1, 5] = np.inf
    got = case.run("avx2", True, known)
    assert np.isnan(got[1, 2, 1]).all()
    assert np.isfinite(np.delete(got[1], 2, axis=0)).all()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("heads", "size"), [((1, 1), 3), ((5, 1), 80)])
def test_heads_and_sizes(heads: tuple[int, int], size: int, rounded: bool) -> None:
    shape = replace(SHAPE, heads=heads[0], kv_heads=heads[1], size=size, value_size=size + 5)
    Case(shape, (2, 2), 2, (2, 1), (9, 66)).check("avx2", rounded, (2, 2, 2, 66))


@pytest.mark.parametrize(("queries", "rounded"), [(1, True), (2, False)])
def test_known_lengths(tier: str, queries: int, rounded: bool) -> None:
    shape = replace(SHAPE, kv_heads=4, query="blhd", out="blhd")
    Case(shape, (2, 2), queries, (3, 3), (17, 17)).check(tier, rounded, (2, queries, 3, 17))


@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_behind_the_end_moves_no_bit(tier: str, rounded: bool) -> None:
    case = Case(SHAPE, (2, 2), 2, (1, 2), (5, 9))
    before = case.run(tier, rounded)
    for (codes, _), full in itertools.product((case.k, case.v), [case.full]):
        for b, count in enumerate(full):
            codes[b, :, count:] = -codes[b, :, count:]
    np.testing.assert_array_equal(case.run(tier, rounded), before)


@pytest.mark.parametrize("rounded", [False, True])
def test_large_scores(tier: str, rounded: bool) -> None:
    case = Case(SHAPE, (2, 2), 1, (2,), (5,))
    case.q *= np.float32(1e4)
    assert np.isfinite(case.run(tier, rounded)).all()
    if not rounded:
        case.check(tier, rounded)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_not_finite_shows(tier: str, where: str, rounded: bool) -> None:
    """A scale of a block that is no number: keys make all of a query's outputs one, values those of their heads."""
    case = Case(SHAPE, (2, 2), 1, (2, 2), (5, 5))
    (case.k if where == "k" else case.v)[1][1, 0, 1, 7] = np.nan
    got = case.run(tier, rounded)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1, : SHAPE.group]).all()
    assert np.isfinite(got[1, SHAPE.group :]).all()
