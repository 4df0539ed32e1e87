"""Attention against its definition in float64, within a bound derived from the data; masks hide what they hide."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from tests.schedule.cpu.graphs import EPSILON, TIERS, normal, runs_here
from tvm_ternary.kernels.attention import AXES, Attention, pack_mask, reference_attention
from tvm_ternary.schedule.cpu.attention import FEW, KEYS, Lengths, attention
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import resolve

UNKNOWN: Lengths = (None, None, None)
WIDEST = next(tier for tier in TIERS if runs_here(tier))
BASE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, mask="ms")


@cache
def compiled(tier: str, shape: Attention, lengths: Lengths = UNKNOWN) -> Any:
    target = tvm.target.Target(resolve(TIERS.get(tier, tier)).tvm)
    function = attention(shape, lengths, simd_of(target)).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target, tir_pipeline=TIR_PIPELINE)["main"]


def placed(x: np.ndarray, layout: str) -> np.ndarray:
    """(B, H, L, D) in another order."""
    return np.ascontiguousarray(x.transpose([AXES.index(axis) for axis in layout]))


class Case:
    """Operands, and what should come of them. Where a mask is bits, ``mask`` is what they stand for."""

    def __init__(self, shape: Attention, batch: int, queries: int, keys: int, seed: int = 0) -> None:
        self.shape = shape
        self.q = normal(seed, batch, shape.heads, queries, shape.size)
        self.k = normal(seed + 1, batch, shape.kv_heads, keys, shape.size)
        self.v = normal(seed + 2, batch, shape.kv_heads, keys, shape.value_size)
        extents = {"b": batch, "h": shape.heads, "m": queries, "s": keys}
        dims = [extents[axis] if axis in shape.mask else 1 for axis in "bhms"]
        self.mask = normal(seed + 3, *dims) if shape.mask else None
        if shape.hidden is not None:
            self.mask = np.where(normal(seed + 3, *dims) > 0, np.float32(0), np.float32(shape.hidden))

    @property
    def masks(self) -> list[np.ndarray]:
        """The mask as an operand, if there is one."""
        if self.mask is None:
            return []
        return [self.mask if self.shape.hidden is None else pack_mask(self.mask == 0)]

    def run(self, tier: str, lengths: Lengths = UNKNOWN) -> np.ndarray:
        shape = self.shape
        out = np.full((len(self.q), shape.heads, self.q.shape[2], shape.value_size), np.nan, np.float32)
        operands = [placed(x, o) for x, o in ((self.q, shape.query), (self.k, shape.key), (self.v, shape.value))]
        operands += self.masks
        tensors = [tvm.runtime.tensor(x) for x in (*operands, placed(out, shape.out))]
        compiled(tier, shape, lengths)(*tensors)
        return tensors[-1].numpy().transpose([shape.out.index(axis) for axis in AXES])

    def run_joined(self, tier: str, past: int, lengths: Lengths) -> list[np.ndarray]:
        """The result, and the joined keys and values, which are handed in apart."""
        shape = self.shape
        parts = [
            placed(part, layout)
            for x, layout in ((self.k, shape.key), (self.v, shape.value))
            for part in (x[:, :, :past], x[:, :, past:])
        ]
        out = np.empty((*self.q.shape[:-1], shape.value_size), np.float32)
        layouts = shape.out, shape.key, shape.value
        results = [
            np.full_like(placed(x, layout), np.nan) for x, layout in zip((out, self.k, self.v), layouts, strict=True)
        ]
        tensors = [tvm.runtime.tensor(x) for x in (placed(self.q, shape.query), *parts, *self.masks, *results)]
        compiled(tier, shape, lengths)(*tensors)
        return [
            tensor.numpy().transpose([layout.index(axis) for axis in AXES])
            for tensor, layout in zip(tensors[-3:], layouts, strict=True)
        ]

    def check(self, tier: str, lengths: Lengths = UNKNOWN) -> None:
        got = self.run(tier, lengths)
        want = reference_attention(self.q, self.k, self.v, self.shape.scale, self.mask)
        assert np.all(np.abs(got - want) <= self.bound())

    def bound(self) -> np.ndarray:
        """To first order: a score that is off by e moves weights by the factor 1 + e, and so does their sum.

        Scores are sums of D products of rounded factors, weights are exp within 2e-7, sums are of S terms, which fade
        once a block.
        """
        group, keys = self.shape.group, self.k.shape[2]
        k = np.repeat(np.abs(self.k.astype(np.float64)), group, axis=1)
        products = self.shape.scale * np.abs(self.q.astype(np.float64)) @ k.swapaxes(-1, -2)
        # A score that is hidden has no weight, whatever it is.
        mask = np.zeros(1) if self.mask is None else np.abs(np.where(self.mask > -1e30, self.mask, 0))
        score = ((self.shape.size + 4) * products + 4 * (products + mask)).max(axis=-1, keepdims=True) * EPSILON
        relative = 2 * (score + 3e-7 + (keys + 4 * keys // KEYS) * EPSILON)
        weighed = reference_attention(self.q, self.k, np.abs(self.v), self.shape.scale, self.mask)
        return np.asarray(relative * weighed)


@pytest.mark.parametrize(("mask", "hidden"), [("bms", -np.inf), ("ms", None)], ids=["bits", "floats"])
def test_lengths(tier: str, mask: str, hidden: float | None) -> None:
    """Around the borders of vectors, tiles and blocks, all from one function."""
    shape = replace(BASE, mask=mask, hidden=hidden)
    for queries, keys in itertools.product((1, FEW, FEW + 1, 16, 17, 33), (1, 7, KEYS, KEYS + 1, 2 * KEYS + 5)):
        Case(shape, 2, queries, keys).check(tier)


def test_known_lengths(tier: str) -> None:
    """All on one tier, on others half of them."""
    every = ((1, 65), (2, 70), (16, 64), (40, 130))
    for queries, keys in {"avx512": every[::2], "portable": every[1::2]}.get(tier, every):
        Case(BASE, 1, queries, keys).check(tier, (1, queries, keys))


def test_a_single_row(tier: str) -> None:
    shape = replace(BASE, heads=3, kv_heads=3)
    Case(shape, 2, 1, 2 * KEYS + 5).check(tier, (2, 1, None))


def test_joined() -> None:
    """One tile a head, several, and many queries; new keys alone, in a block of their own, and across two.

    On one tier; all have known lengths.
    """
    shape = replace(BASE, key="bhld", value="bhld", joined=True)
    for queries, past, new in itertools.product((1, 2, FEW, 21), (0, 5, KEYS, KEYS + 3), (1, 70)):
        check_joined(Case(shape, 2, queries, past + new), "avx2", past, (None,) * 4)


@pytest.mark.parametrize("layouts", [("blhd", "lbhd"), ("bhdl", "bhld")])
def test_joined_layouts(layouts: tuple[str, str]) -> None:
    shape = replace(BASE, key=layouts[0], value=layouts[1], joined=True)
    for queries, past, new in ((1, KEYS + 3, 1), (21, 5, 21)):
        check_joined(Case(shape, 2, queries, past + new), "native", past, (2, queries, past, new))


def test_joined_of_known_lengths(tier: str) -> None:
    shape = replace(BASE, joined=True)
    for queries, past, new in ((1, KEYS + 3, 1), (21, 5, 21)):
        check_joined(Case(shape, 2, queries, past + new), tier, past, (2, queries, past, new))


def check_joined(case: Case, tier: str, past: int, lengths: Lengths) -> None:
    out, k, v = case.run_joined(tier, past, lengths)
    assert np.array_equal(k, case.k)
    assert np.array_equal(v, case.v)
    want = reference_attention(case.q, case.k, case.v, case.shape.scale, case.mask)
    assert np.all(np.abs(out - want) <= case.bound())


@pytest.mark.parametrize(
    "layouts", [("bhld", "bhld", "bhld", "bhld"), ("blhd", "bhdl", "blhd", "blhd"), ("lbhd", "blhd", "bhld", "lbhd")]
)
def test_layouts(layouts: tuple[str, str, str, str]) -> None:
    query, key, value, out = layouts
    shape = replace(BASE, query=query, key=key, value=value, out=out, mask="")
    for queries in (3, 21):
        Case(shape, 2, queries, 70).check("native", (2, queries, 70))


@pytest.mark.parametrize(("heads", "size"), [((1, 1), 3), ((6, 6), 16), ((6, 2), 64), ((5, 1), 80), ((2, 1), 128)])
def test_heads_and_sizes(heads: tuple[int, int], size: int) -> None:
    shape = Attention(*heads, size, size, size**-0.5, mask="bhms")
    for queries in (2, 18):
        Case(shape, 1, queries, 67).check("native", (1, queries, 67))


@pytest.mark.parametrize("queries", [3, 40])
def test_large_scores(queries: int) -> None:
    case = Case(BASE, 1, queries, 200)
    assert case.mask is not None
    case.mask[:] = 0
    case.q *= 300
    got = case.run(WIDEST)
    assert np.isfinite(got).all()
    assert np.all(np.abs(got - reference_attention(case.q, case.k, case.v, 0.25)) <= case.bound())


def causal(queries: int, keys: int, hidden: float) -> np.ndarray:
    later = np.arange(keys) > np.arange(queries)[:, None] + keys - queries
    return np.where(later, np.float32(hidden), np.float32(0))[None, None]


@pytest.mark.parametrize("hidden", [-np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("queries", [2, 150])
def test_what_is_masked_moves_no_bit(queries: int, hidden: float) -> None:
    case = Case(BASE, 1, queries, 150)
    case.mask = causal(queries, 150, hidden)
    case.check(WIDEST)
    before = case.run(WIDEST)
    case.k[:, :, 149:] = 1e30
    case.v[:, :, 149:] = np.float32(1e30)
    np.testing.assert_array_equal(case.run(WIDEST)[:, :, :-1], before[:, :, :-1])


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("mask", ["ms", "bs"])
def test_a_query_without_keys_gives_zeros(queries: int, mask: str) -> None:
    case = Case(replace(BASE, mask=mask), 2, queries, 70)
    assert case.mask is not None
    case.mask[-1, :, -1] = -np.inf
    got = case.run(WIDEST, (2, queries, 70) if mask == "bs" else UNKNOWN)
    # The last query of all batches and heads, or all queries of the last batch.
    hidden = got[:, :, -1:] if mask == "ms" else got[1:]
    assert np.all(hidden == 0)
    assert np.count_nonzero(got) == got.size - hidden.size


@pytest.mark.parametrize("queries", [2, 40])
def test_finite_masks_of_everything_leave_the_mean(queries: int) -> None:
    """As softmax has it: what is added absorbs all scores, which then are equal."""
    case = Case(BASE, 1, queries, 70)
    assert case.mask is not None
    case.mask[:] = np.finfo(np.float32).min
    want = np.repeat(case.v.mean(axis=2, keepdims=True), BASE.group, axis=1)
    np.testing.assert_allclose(case.run(WIDEST), np.broadcast_to(want, (1, 4, queries, 12)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [2, 40])
def test_nan_stays_where_it_is(queries: int) -> None:
    case = Case(BASE, 1, queries, 70)
    case.q[0, 1, 0] = np.nan
    got = case.run(WIDEST)
    assert np.isnan(got[0, 1, 0]).all()
    assert np.isfinite(np.delete(got[0], 1, axis=0)).all()
    assert np.isfinite(got[0, 1, 1:]).all()
