"""Prefill over packed keys and a few in float, against its definition in float64 on what the keys stand for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedule.cpu.graphs import EPSILON, TIERS, normal, runs_here
from tests.schedule.cpu.test_attention import causal, placed
from tvm_ternary.kernels.attention import AXES, Attention, reference_attention
from tvm_ternary.kernels.paired_values import LARGEST_VALUE, LARGEST_WEIGHT, pair, round_block
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, pack, quantize_block
from tvm_ternary.kernels.ternary_queries import ternary_scores
from tvm_ternary.schedule.cpu.attention.packed import Packed
from tvm_ternary.schedule.cpu.attention.prefill import attention_prefill
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.intrinsics import BYTE_DOTS, PAIR_DOTS
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import host_features, resolve

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, key="bhld", value="bhld", mask="ms")
VNNI = "avx512-vnni"
DOTS = {"avx512": "avx512", "avx2": "avx2", "portable": "portable", VNNI: VNNI}
"""Tier of a test to the one whose dot products it takes; the portable one multiplies values in float."""
Lengths = tuple[int | None, ...]
UNKNOWN: Lengths = (None,) * 4


@cache
def compiled(
    tier: str, shape: Attention, planes: int, lengths: Lengths, trits: bool = False, bits: bool = False
) -> Any:
    target = tvm.target.Target(resolve(TIERS.get(tier, tier)).tvm)
    packed = Packed(planes, planes, BYTE_DOTS[DOTS[tier]], PAIR_DOTS.get(DOTS[tier]), trits, bits)
    function = attention_prefill(shape, packed, lengths, simd_of(target)).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target, tir_pipeline=TIR_PIPELINE)["main"]


@dataclass
class Case:
    """So many queries, packed blocks and keys behind them."""

    shape: Attention
    planes: int
    queries: int
    blocks: int
    latest: int
    batch: int = 1
    seed: int = 0
    trits: bool = False
    bits: bool = False

    def __post_init__(self) -> None:
        shape, batch, seed = self.shape, self.batch, self.seed
        self.keys = self.blocks * BLOCK + self.latest
        self.q = normal(seed, batch, shape.heads, self.queries, shape.size)
        k = normal(seed + 1, batch, shape.kv_heads, self.blocks, BLOCK, shape.size)
        # Some elements of keys are larger than others, as they are in models.
        k[..., ::7] *= 5
        self.codes, self.key_scale = quantize_block(k, self.planes, -2)
        self.k = normal(seed + 2, batch, shape.kv_heads, self.latest, shape.size)
        self.v = normal(seed + 3, batch, shape.kv_heads, self.keys, shape.value_size)
        extents = {"b": batch, "h": shape.heads, "m": self.queries, "s": self.keys}
        dims = [extents[axis] if axis in shape.mask else 1 for axis in "bhms"]
        self.mask = normal(seed + 4, *dims) if shape.mask else None

    def run(self, tier: str, lengths: Lengths = UNKNOWN) -> np.ndarray:
        shape = self.shape
        out = np.full((self.batch, shape.heads, self.queries, shape.value_size), np.nan, np.float32)
        operands = [placed(self.q, shape.query), *pack(self.codes, self.planes), self.key_scale]
        if DOTS[tier] in PAIR_DOTS:
            numbers, scale = round_block(self.packed_values())
            operands += [pair(numbers), scale]
        operands += [placed(self.k, shape.key), placed(self.v, shape.value)]
        operands += [] if self.mask is None else [self.mask]
        tensors = [tvm.runtime.tensor(x) for x in (*operands, placed(out, shape.out))]
        compiled(tier, shape, self.planes, lengths, self.trits, self.bits)(*tensors)
        return tensors[-1].numpy().transpose([shape.out.index(axis) for axis in AXES])

    def all_keys(self) -> np.ndarray:
        """What is packed and what is not, (batch, kv heads, keys, size) float64."""
        packed = dequantize_block(self.codes, self.key_scale, -2)
        return np.concatenate([packed.reshape(*packed.shape[:2], -1, self.shape.size), self.k], 2)

    def packed_values(self) -> np.ndarray:
        """(batch, kv heads, blocks, tokens, elements)"""
        outer = self.batch, self.shape.kv_heads, self.blocks, BLOCK
        return self.v[:, :, : self.blocks * BLOCK].reshape(*outer, self.shape.value_size)

    def want(self) -> np.ndarray:
        if not self.trits:
            return reference_attention(self.q, self.all_keys(), self.v, self.shape.scale, self.mask)
        # With an identity for keys, queries are scores.
        keys = np.broadcast_to(np.eye(self.keys), (self.batch, self.shape.kv_heads, self.keys, self.keys))
        return reference_attention(self.scores(), keys, self.v, 1.0, self.mask)

    def scores(self) -> np.ndarray:
        """Before a mask is added."""
        keys = np.repeat(self.all_keys(), self.shape.group, axis=1)
        scores = self.shape.scale * self.q.astype(np.float64) @ keys.swapaxes(-1, -2)
        if self.trits:
            found = ternary_scores(self.q, self.codes, self.key_scale, self.shape.scale)
            scores[..., : self.blocks * BLOCK] = found
        return scores

    def check(self, tier: str, lengths: Lengths = UNKNOWN) -> None:
        got, want, bound = self.run(tier, lengths), self.want(), self.bound(paired=DOTS[tier] in PAIR_DOTS)
        assert np.all(np.abs(got - want) <= bound), (np.abs(got - want) / bound).max()

    def bound(self, *, exact: bool = False, paired: bool = False) -> np.ndarray:
        """A score that is off by e moves weights by the factor exp(e), and so does their sum.

        Scores are sums of rounded products as those of `attention`, of bytes as of floats. An element of a query times
        its scale in a block is off by half a step, unless ``exact``, and by what three products are rounded; that
        counts as often as the key's number says. If values and weights are rounded to be multiplied in pairs, that is
        `rounding`.
        """
        shape, group = self.shape, self.shape.group
        keys = np.repeat(np.abs(self.all_keys()), group, axis=1)
        products = shape.scale * np.abs(self.q.astype(np.float64)) @ keys.swapaxes(-1, -2)
        mask = np.zeros(1) if self.mask is None else np.abs(np.where(self.mask > -1e30, self.mask, 0))
        products = np.maximum(products, np.abs(self.scores()))
        off = ((shape.size + 8) * products + 4 * (products + mask)).max(-1, keepdims=True) * EPSILON
        scales = np.repeat(self.key_scale.astype(np.float64), group, axis=1)
        step = np.abs(shape.scale * self.q[:, :, None] * scales[:, :, :, None]).max(-1) / 127  # (b, h, blocks, queries)
        numbers = np.abs(np.repeat(self.codes.astype(np.float64), group, axis=1)).sum(-1).max(-1)  # (b, h, blocks)
        wrong = (0 if exact or self.trits else 0.5) + 4 * 127 * EPSILON
        off = off + (wrong * step * numbers[..., None]).max(2, initial=0)[..., None]
        moved = np.expm1(2 * off) + 2 * (3e-7 + (self.keys + 4 * self.keys // BLOCK) * EPSILON)
        bound = moved * reference_attention(self.q, self.all_keys(), np.abs(self.v), shape.scale, self.mask)
        # Scores that are off move what rounding costs by as much as they move the result.
        return np.asarray(bound + np.exp(2 * off) * self.rounding() if paired else bound)

    def rounding(self) -> np.ndarray:
        """What rounding the values of blocks, and weights relative to the largest of a query in a block, may cost.

        With weights w and values v, rounded ones u and x, the result r and W the sum of w, it is the sum of
        (u - w) (x - r) + w (x - v) over the sum of u. A weight is off by half a step, and 3e-6 of itself for its
        polynomial, a value by half a step and by what two products are rounded.
        """
        v = np.repeat(self.v.astype(np.float64), self.shape.group, axis=1)
        scores = self.scores() if self.mask is None else self.scores() + self.mask
        blocks = np.arange(self.blocks * BLOCK).reshape(self.blocks, BLOCK)
        peak = scores.max(-1, keepdims=True)
        w = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
        largest = w[..., blocks].max(-1)  # (b, h, queries, blocks)
        off = np.zeros_like(w)
        off[..., blocks] = largest[..., None] * 0.5 / LARGEST_WEIGHT + 4e-6 * w[..., blocks]
        step = np.zeros_like(v)
        step[:, :, blocks] = np.abs(v[:, :, blocks]).max(3, keepdims=True) * (0.5 / LARGEST_VALUE + 2 * EPSILON)
        result = np.abs(self.want())
        total = w.sum(-1, keepdims=True) - off.sum(-1, keepdims=True)
        apart = off @ (np.abs(v) + step) + off.sum(-1, keepdims=True) * result
        return np.asarray((apart + w @ step) / np.where(total > 0, total, 1))


@pytest.mark.parametrize("mask", ["", "ms"])
def test_lengths(tier: str, mask: str) -> None:
    """Around the borders of vectors, tiles and blocks, all from one function, which other tests share."""
    shape = replace(SHAPE, mask=mask)
    for queries, (blocks, latest) in itertools.product((1, 16, 17, 33), ((1, 0), (0, 5), (1, 1), (3, 63), (2, 130))):
        Case(shape, 2, queries, blocks, latest, batch=2).check(tier)


def test_planes(tier: str) -> None:
    """Two are elsewhere; and all three on all tiers, with numbers at their ends, in the next test."""
    Case(SHAPE, {"avx512": 1, "avx2": 3, "portable": 1}[tier], 35, 3, 7).check(tier, (1, 35, 3, 7))


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_the_least_and_the_most_numbers(tier: str, planes: int) -> None:
    """All numbers and queries at their ends: sums of bytes are as large as they get."""
    case = Case(replace(SHAPE, size=128, mask="", scale=2.0**-10), planes, 17, 2, 0)
    for sign in (-1, 1):
        case.codes[:] = sign * ((3**planes - 1) // 2)
        case.key_scale[:] = 0.5
        case.q[:] = np.where(np.arange(17)[:, None] % 2, 1, -1) * 127
        got = case.run(tier, (1, 17, 2, 0))
        assert np.all(np.abs(got - case.want()) <= case.bound(exact=True, paired=DOTS[tier] in PAIR_DOTS))


def test_known_lengths(tier: str) -> None:
    """All on one tier, on others half of them."""
    every = ((7, 1, 0), (16, 2, 64), (40, 1, 70), (33, 0, 9))
    for queries, blocks, latest in {"avx512": every[::2], "portable": every[1::2]}.get(tier, every):
        Case(SHAPE, 2, queries, blocks, latest).check(tier, (1, queries, blocks, latest))


@pytest.mark.parametrize(
    ("heads", "size", "planes"),
    [((1, 1), 3, 3), ((6, 6), 16, 2), ((3, 1), 20, 3), ((6, 2), 64, 2), ((5, 1), 80, 3), ((8, 2), 128, 2)],
)
def test_heads_and_sizes(heads: tuple[int, int], size: int, planes: int) -> None:
    shape = Attention(*heads, size, size + 5, size**-0.5, mask="bhms")
    Case(shape, planes, 35, 2, 9).check("avx2", (1, 35, 2, 9))


@pytest.mark.parametrize("mask", ["m", "bm", "hms", "bhs"])
def test_masks(mask: str) -> None:
    Case(replace(SHAPE, mask=mask), 2, 35, 2, 9, batch=2).check(
        "avx512" if runs_here("avx512") else "avx2", (2, 35, 2, 9)
    )


def test_layouts() -> None:
    shape = replace(SHAPE, query="bhdl", key="lbhd", value="blhd", out="lbhd")
    Case(shape, 2, 35, 2, 9, batch=2).check("avx2", (2, 35, 2, 9))


def test_exact_queries_of_large_scores(tier: str) -> None:
    """Where queries are whole numbers of steps, scores are as near as those of floats, however large."""
    case = Case(replace(SHAPE, mask=""), 2, 40, 3, 0)
    case.q = np.rint(30 * case.q).clip(-126, 126)
    case.q[..., 0] = 127
    case.key_scale[:] = 2.0 ** np.arange(3)[:, None]
    scores = case.q @ np.repeat(case.all_keys(), 2, axis=1).swapaxes(-1, -2) * case.shape.scale
    assert np.abs(scores).max() > 1000
    assert np.all(np.abs(case.run(tier) - case.want()) <= case.bound(exact=True, paired=DOTS[tier] in PAIR_DOTS))


def test_large_scores_are_finite(tier: str) -> None:
    case = Case(replace(SHAPE, mask=""), 2, 40, 2, 7)
    case.q *= np.float32(1e4)
    assert np.isfinite(case.run(tier)).all()


@pytest.mark.parametrize("hidden", [-np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("latest", [0, 22])
def test_what_is_masked_moves_no_bit(tier: str, hidden: float, latest: int) -> None:
    case = Case(SHAPE, 2, 2 * BLOCK + latest, 2, latest)
    case.mask = causal(case.queries, case.keys, hidden)
    case.check(tier)
    before = case.run(tier)
    case.codes[:, :, 1, -20:] *= -1
    case.k[:] = 1e30
    case.v[:, :, 2 * BLOCK - 20 :] = np.float32(1e30)
    seen = 2 * BLOCK - 20
    np.testing.assert_array_equal(case.run(tier)[:, :, :seen], before[:, :, :seen])


@pytest.mark.parametrize("mask", ["ms", "bs"])
def test_a_query_without_keys_gives_zeros(tier: str, mask: str) -> None:
    case = Case(replace(SHAPE, mask=mask), 2, 40, 2, 6, batch=2)
    assert case.mask is not None
    case.mask[-1, :, -1] = -np.inf
    got = case.run(tier, (2, 40, 2, 6) if mask == "bs" else UNKNOWN)
    # The last query of all batches and heads, or all queries of the last batch.
    hidden = got[:, :, -1:] if mask == "ms" else got[1:]
    assert np.all(hidden == 0)
    assert np.count_nonzero(got) == got.size - hidden.size


def test_queries_and_keys_of_zeros_leave_the_mean(tier: str) -> None:
    """There is no step to round by."""
    for name in ("q", "key_scale"):
        case = Case(replace(SHAPE, mask=""), 2, 18, 2, 0)
        getattr(case, name)[:] = 0
        mean = np.repeat(case.v.mean(axis=2, keepdims=True, dtype=np.float64), SHAPE.group, axis=1)
        np.testing.assert_allclose(case.want(), np.broadcast_to(mean, (1, 4, 18, 12)))
        case.check(tier)


@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_what_is_not_finite_stays_where_it_is(tier: str, what: float) -> None:
    case = Case(replace(SHAPE, mask=""), 2, 40, 2, 5)
    case.q[0, 1, 0, 3] = what
    got = case.run(tier)
    assert np.isnan(got[0, 1, 0]).all()
    assert np.isfinite(np.delete(got[0], 1, axis=0)).all()
    assert np.isfinite(got[0, 1, 1:]).all()
    case = Case(replace(SHAPE, mask=""), 2, 40, 2, 5)
    case.key_scale[0, 1, 1, 7] = what
    got = case.run(tier)
    assert np.isfinite(got[0, : SHAPE.group]).all()
    assert np.isnan(got[0, SHAPE.group :]).all()
    case = Case(replace(SHAPE, mask=""), 2, 40, 2, 5)
    case.v[0, 1, 70, 3] = what
    got = case.run(tier)
    assert not np.isfinite(got[0, SHAPE.group :, :, 3]).any()
    got[0, SHAPE.group :, :, 3] = 0
    assert np.isfinite(got).all()


def test_one_large_weight_and_a_long_flat_tail(tier: str) -> None:
    """The tail has a ninth of all weight, and beside the largest its weights are half a step each."""
    case = Case(replace(SHAPE, mask=""), 2, 3, 64, 0)
    case.q[:] = 0
    case.q[..., 0] = 1
    case.codes[:], case.key_scale[:] = 0, np.log(8 * case.keys) / SHAPE.scale
    case.codes[:, :, 5, 3, 0] = 1
    case.v[:, :, 5 * BLOCK + 3] = 30
    want = (8 * 30 + case.v[:, :, np.arange(case.keys) != 5 * BLOCK + 3].mean(2)) / 9
    # What is lost is the tail within the block of the largest.
    lost = np.abs(case.run(tier) - np.repeat(want, SHAPE.group, 1)[:, :, None]).max()
    assert lost <= 34 * BLOCK / case.keys / 9
    case.check(tier)


@pytest.mark.skipif("avx512_vnni" not in host_features(), reason="needs avx512_vnni")
def test_one_instruction_for_pairs_and_one_for_bits() -> None:
    Case(SHAPE, 2, 35, 2, 9).check(VNNI, (1, 35, 2, 9))
    Case(replace(SHAPE, size=64), 1, 35, 2, 0, trits=True, bits=True).check(VNNI, (1, 35, 2, 0))


@pytest.mark.parametrize(("planes", "size", "bits"), [(2, 20, False), (1, 20, True), (1, 100, True)])
def test_queries_of_trits(planes: int, size: int, bits: bool) -> None:
    """An integer that is off by one would move a weight by more than the bound, which is that of a float's digits."""
    case = Case(replace(SHAPE, size=size, mask=""), planes, 35, 2, 9, trits=True, bits=bits)
    case.check("avx2", (1, 35, 2, 9))
    case.q[0, 1, 0, 3] = np.nan
    got = case.run("avx2", (1, 35, 2, 9))
    assert np.isnan(got[0, 1, 0]).all()
    assert np.isfinite(np.delete(got[0], 1, axis=0)).all()
    case.q[:] = 0
    case.check("avx2", (1, 35, 2, 9))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    spread=st.floats(0, 12),
    sizes=st.floats(0, 12),
    hidden=st.sampled_from([0.0, -1.0, -np.inf]),
)
def test_whatever_weights_and_values_are(seed: int, spread: float, sizes: float, hidden: float) -> None:
    """Scores far apart, values of many magnitudes in a block, and masks that hide some keys of it or none."""
    case = Case(SHAPE, 2, 20, 3, 4, seed=seed)
    rng = np.random.default_rng(seed)
    case.q *= np.float32(spread)
    case.v *= np.exp2(rng.uniform(-sizes, sizes, case.v.shape)).astype(np.float32)
    case.mask = np.where(rng.random((1, 1, 20, case.keys)) < 0.3, hidden, 0).astype(np.float32)
    case.mask[..., BLOCK : 2 * BLOCK] = 0
    case.check("avx512" if runs_here("avx512") else "avx2")


def test_bytes_need_a_dot_product() -> None:
    simd = simd_of(tvm.target.Target(resolve("x86-64-v3").tvm))
    with pytest.raises(ValueError, match="dot product"):
        attention_prefill(SHAPE, Packed(2, 2, None), UNKNOWN, simd)
