"""Keys of a whole text, packed in the run: the words that packing gives, and attention over them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from tests.schedule.cpu.graphs import TIERS, normal, runs_here
from tests.schedule.cpu.test_attention import placed
from tests.schedule.cpu.test_attention_many_packed import DOTS
from tvm_ternary.kernels.attention import AXES, Attention, pack_mask
from tvm_ternary.kernels.paired_values import pair, round_block
from tvm_ternary.kernels.rounded_attention import Rounding, Sight
from tvm_ternary.kernels.rounded_attention import rounded_attention as reference
from tvm_ternary.kernels.ternary_keys import BLOCK, pack, quantize_block
from tvm_ternary.schedule.cpu.attention.packed import Packed
from tvm_ternary.schedule.cpu.attention.rounded import pack_keys, rounded_attention, words_of
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.intrinsics import BYTE_DOTS, PAIR_DOTS
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import resolve

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, mask="bms", hidden=-np.inf)
Function = Any


def ways(tier: str, planes: int) -> Packed:
    return Packed(planes, planes, BYTE_DOTS[DOTS[tier]], PAIR_DOTS.get(DOTS[tier]))


@cache
def compiled(tier: str, planes: int, window: int, lengths: tuple[int | None, ...]) -> tuple[Function, Function]:
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    packed, simd = ways(tier, planes), simd_of(target)
    batch, _, keys = lengths
    functions = {
        "pack": pack_keys(SHAPE, packed, window, (batch, keys), simd),
        "attend": rounded_attention(SHAPE, packed, window, lengths, simd),
    }
    module = tvm.compile(
        tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()}),
        target,
        tir_pipeline=TIR_PIPELINE,
    )
    return module["pack"], module["attend"]


@pytest.mark.parametrize(
    ("planes", "window", "keys", "queries", "dynamic"),
    [(2, 64, 200, 200, True), (2, 64, 40, 40, True), (1, 0, 130, 130, True), (3, 64, 192, 7, False)],
)
def test_what_is_packed_and_what_is_seen(planes: int, window: int, keys: int, queries: int, dynamic: bool) -> None:
    # Tiers differ in what is made of tiles, which other tests run on each.
    batch, tier = 2, next(tier for tier in TIERS if runs_here(tier))
    lengths = (None, None, None) if dynamic else (batch, queries, keys)
    pack_function, attend = compiled(tier, planes, window, lengths)
    q = normal(1, batch, SHAPE.heads, queries, SHAPE.size)
    k = normal(2, batch, SHAPE.kv_heads, keys, SHAPE.size)
    v = normal(3, batch, SHAPE.kv_heads, keys, SHAPE.value_size)
    seen = np.random.default_rng(4).random((batch, queries, keys)) < 0.8
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]
    extents = words_of(SHAPE, ways(tier, planes), *(tvm.tirx.const(n, "int64") for n in (batch, keys)))
    words = [tvm.runtime.tensor(np.zeros([int(n) for n in shape], dtype)) for shape, dtype in extents]
    out = tvm.runtime.tensor(
        np.full(placed(np.empty((batch, SHAPE.heads, queries, SHAPE.value_size)), SHAPE.out).shape, np.nan, np.float32)
    )
    given = [
        tvm.runtime.tensor(placed(x, layout)) for x, layout in ((k, SHAPE.key), (q, SHAPE.query), (v, SHAPE.value))
    ]
    pack_function(given[0], given[2], *words)
    attend(given[1], *words, given[0], given[2], tvm.runtime.tensor(pack_mask(seen[:, None])), out)

    used = max(0, keys - window) // BLOCK
    blocks = k[:, :, : used * BLOCK].reshape(batch, SHAPE.kv_heads, used, BLOCK, SHAPE.size)
    codes, scale = quantize_block(blocks, planes, -2)
    wanted = [*pack(codes, planes), scale]
    if DOTS[tier] in PAIR_DOTS:
        of_blocks = v[:, :, : used * BLOCK].reshape(batch, SHAPE.kv_heads, used, BLOCK, SHAPE.value_size)
        numbers, value_scale = round_block(of_blocks)
        got_words, got_scale = (one.numpy()[:, :, :used] for one in words[-2:])
        halves, want_halves = (
            one[..., : SHAPE.value_size, None].view(np.int16).astype(int) for one in (got_words, pair(numbers))
        )
        # Between two numbers it may be either.
        assert np.abs(halves - want_halves).max(initial=0) <= 1
        assert np.count_nonzero(halves != want_halves) <= 0.01 * halves.size
        np.testing.assert_array_equal(got_scale, value_scale)
    for got, want in zip(words, wanted, strict=False):
        got = got.numpy()[:, :, :used]
        # Sums of float32 in another order: a scale may be some roundings away, and a number at an edge another one.
        if got.dtype == np.float32:
            assert np.allclose(got, want, rtol=1e-5)
        else:
            assert np.count_nonzero(got != want) <= 0.01 * want.size
    wanted = [
        reference(
            q[b],
            k[b],
            v[b],
            SHAPE.scale,
            mask[b],
            Rounding(planes, 0, window),
            Sight(np.ones(keys, bool), np.full(queries, used * BLOCK), seen[b][None]),
        )
        for b in range(batch)
    ]
    got = out.numpy().transpose([SHAPE.out.index(axis) for axis in AXES])
    # Queries become bytes, by the largest of each: half a step of 127.
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) <= (0.5 / 127 * 3 if used else 1e-6)
