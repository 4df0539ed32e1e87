"""Attention of many queries over ternary keys on the emulated GPU, given whole or as a cache.

Against its definition in float64 on what is multiplied: numbers times scales, each rounded to 16 bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda_emulator import InOut, Out, Worker
from tests.schedule.cpu.graphs import normal
from tests.schedule.cuda.test_attention_prompt import SHAPE, UNITS, check, laid, rounded
from tvm_ternary.kernels.attention import Attention, pack_mask
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, digits, pack, quantize_block, unpack
from tvm_ternary.schedule.cuda.attention.prompt import (
    attention_packed,
    attention_prompt,
    attention_prompt_cached,
    pack_operands,
)


def stand_for(codes: np.ndarray, scale: np.ndarray, axis: int, kind: str) -> np.ndarray:
    """What blocks (..., blocks, tokens, elements) are multiplied as, (..., blocks * tokens, elements)."""
    exact = dequantize_block(codes, rounded(scale, kind).astype(np.float32), axis)
    return rounded(exact.astype(np.float32), kind).reshape(*codes.shape[:-3], -1, codes.shape[-1])


def causal(queries: int, keys: int) -> np.ndarray:
    return np.where(np.arange(keys) <= np.arange(queries)[:, None] + keys - queries, 0.0, -np.inf)


class Whole:
    """Keys of which the first ones are packed, those in float not numbers there."""

    def __init__(
        self,
        gpu: Worker,
        shape: Attention,
        planes: int,
        lengths: tuple[int, int, int],
        *,
        window: int = 0,
        kind: str = "bfloat16",
        hidden: bool = False,
        mask: np.ndarray | None = None,
    ) -> None:
        batch, queries, keys = lengths
        self.shape, self.kind = shape, kind
        self.mask = causal(queries, keys) if hidden else mask
        sizes = (shape.heads, queries, shape.size), (shape.kv_heads, keys, shape.size)
        self.q, self.k, self.v = (
            normal(n, batch, *extents) for n, extents in enumerate((*sizes, (shape.kv_heads, keys, shape.value_size)))
        )
        blocks = max(keys - window, 0) // BLOCK
        given = self.k[:, :, : blocks * BLOCK].reshape(batch, shape.kv_heads, blocks, BLOCK, shape.size)
        codes, scale = quantize_block(given, planes, -2)
        self.k = rounded(self.k, kind)
        self.k[:, :, : blocks * BLOCK] = stand_for(codes, scale, -2, kind)
        floats = np.where(np.arange(keys)[:, None] < blocks * BLOCK, np.nan, self.k).astype(np.float32)
        # One block more than there may be, for no array is empty.
        spare = [(0, 0), (0, 0), (0, keys // BLOCK + 1 - blocks)]
        packed = [np.pad(x, [*spare, (0, 0), (0, 0), (0, 0)], constant_values=99) for x in pack(codes, planes)]
        packed.append(np.pad(scale, [*spare, (0, 0)], constant_values=np.nan))
        out = np.full((batch, shape.heads, queries, shape.value_size), np.nan, np.float32)
        held = laid(out, shape.out)
        function = attention_prompt(shape, lengths, causal=hidden, kind=kind, planes=planes, window=window)
        arrays = [laid(self.q, shape.query), *packed, laid(floats, shape.key), laid(self.v, shape.value)]
        masks = [] if mask is None else [mask if shape.hidden is None else pack_mask(mask == 0)]
        gpu.run(function, *arrays, *masks, Out(held))
        self.result = held.transpose([shape.out.index(axis) for axis in "bhld"])

    def check(self) -> None:
        operands = rounded(self.q, self.kind), self.k, rounded(self.v, self.kind)
        check(self.result, self.shape, operands, self.mask, self.kind)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("kind", UNITS)
def test_planes(gpu: Worker, planes: int, kind: str) -> None:
    """Heads of sizes that fill no word, two packed blocks and a rest, fewer queries than keys."""
    Whole(gpu, SHAPE, planes, (1, 9, 150), kind=kind).check()


def test_sizes_windows_layouts_and_masks(gpu: Worker) -> None:
    """All warps; three packed blocks of five, all of two, none of one."""
    shape = replace(SHAPE, size=128, value_size=64, key="bhld", value="lbhd", out="bhld")
    Whole(gpu, shape, 2, (1, 70, 300), window=64, hidden=True).check()
    Whole(gpu, replace(SHAPE, size=64, value_size=32), 1, (2, 66, 128), kind="float16", hidden=True).check()
    mask = normal(3, 2, 1, 1, 70)
    mask[0, ..., 50:] = -np.inf
    Whole(gpu, replace(SHAPE, size=96, heads=1, kv_heads=1, mask="bs"), 3, (2, 3, 70), mask=mask).check()
    Whole(gpu, SHAPE, 2, (1, 3, 70), window=64).check()


def test_blocks_that_a_mask_hides(gpu: Worker) -> None:
    """Of packed ones and of those in float: every other one, or the first ones."""
    mask = np.zeros((2, 1, 1, 450), np.float32)
    mask[0, ..., 64:128] = mask[0, ..., 192:256] = mask[0, ..., 384:448] = mask[1, ..., :200] = -np.inf
    Whole(gpu, replace(SHAPE, mask="bs", hidden=-np.inf), 2, (2, 5, 450), window=128, mask=mask).check()


@pytest.mark.parametrize(("planes", "window", "keys"), [(1, 0, 128), (2, 64, 200), (3, 64, 70)])
def test_keys_that_are_packed_in_the_run(gpu: Worker, planes: int, window: int, keys: int) -> None:
    """All of them, some, none; by a function of their own, whose results another one reads."""
    shape, lengths = replace(SHAPE, key="lbhd"), (2, 5, keys)
    sizes = (shape.heads, 5, shape.size), (shape.kv_heads, keys, shape.size), (shape.kv_heads, keys, shape.value_size)
    q, k, v = (normal(n, 2, *extents) for n, extents in enumerate(sizes))
    k[..., 3] *= 20
    function, outputs = pack_operands(shape, planes, window, lengths, kind="float16")
    made = [np.full(extents, 99, dtype) for extents, dtype in outputs]
    gpu.run(function, laid(k, shape.key), laid(v, shape.value), *map(InOut, made))
    blocks, count = max(keys - window, 0) // BLOCK, len(digits(planes))
    given = k[:, :, : blocks * BLOCK].reshape(2, shape.kv_heads, blocks, BLOCK, shape.size)
    codes, scale = (
        unpack(made[:count], BLOCK, shape.size, planes)[:, :, :blocks],
        made[count][:, :, :blocks],
    )
    want, wanted_scale = quantize_block(given, planes, -2)
    # In the middle of two numbers a last place of the mean decides.
    assert np.sum(codes != want) <= 1e-3 * want.size
    np.testing.assert_allclose(scale, wanted_scale, rtol=1e-3)
    out = np.full((2, 5, shape.heads, shape.value_size), np.nan, np.float32)
    attend = attention_packed(shape, planes, window, lengths, kind="float16")
    unread = [np.full_like(laid(x, layout), np.nan) for x, layout in ((k, shape.key), (v, shape.value))]
    gpu.run(attend, laid(q, shape.query), *made, *unread, Out(out))
    k = rounded(k, "float16")
    k[:, :, : blocks * BLOCK] = stand_for(codes, scale, -2, "float16")
    check(out.transpose(0, 2, 1, 3), shape, (rounded(q, "float16"), k, rounded(v, "float16")), None, "float16")


class Cached:
    """A prompt behind a cache; what lies behind a sequence's blocks and tail is not a number."""

    def __init__(
        self,
        gpu: Worker,
        shape: Attention,
        planes: tuple[int, int],
        full: tuple[int, ...],
        recent: tuple[int, ...],
        queries: int,
        *,
        kind: str = "bfloat16",
        hidden: bool = True,
        room: int = 70,
        mask: bool = False,
        seen: np.ndarray | None = None,
        broken: str = "",
    ) -> None:
        batch, blocks = len(full), max(1, *full)
        self.shape, self.kind, self.full, self.recent, self.hidden = shape, kind, full, recent, hidden
        self.q = normal(0, batch, shape.heads, queries, shape.size)
        sizes = shape.size, shape.value_size
        self.tails = [normal(1 + n, batch, shape.kv_heads, room, size) for n, size in enumerate(sizes)]
        self.new = [normal(3 + n, batch, shape.kv_heads, queries, size) for n, size in enumerate(sizes)]
        self.blocks, packed = [], []
        for n, size in enumerate(sizes):
            x = normal(5 + n, batch, shape.kv_heads, blocks, BLOCK, size)
            codes, scale = quantize_block(x, planes[n], n - 2)
            self.blocks.append(stand_for(codes, scale, n - 2, kind))
            if broken == "kv"[n]:
                scale[1, 0, 1, 7] = np.nan
            for b in range(batch):
                scale[b, :, full[b] :] = np.nan
                self.tails[n][b, :, recent[b] :] = np.nan
            packed += [*pack(codes.swapaxes(-1, -2) if n else codes, planes[n]), scale]
        most = blocks * BLOCK + room + queries
        self.mask = normal(9, batch, 1, queries, most) if mask else None
        hiding = None
        if seen is not None:
            self.mask, hiding = np.where(seen, 0, -np.inf), float(np.finfo(np.float32).min)
        counts = [np.array(x, np.int32) for x in (full, recent)]
        out = np.full((batch, shape.heads, queries, shape.value_size), np.nan, np.float32)
        held = laid(out, shape.out)
        lengths = batch, queries, blocks, room
        shape = replace(shape, mask="" if self.mask is None else "bms", hidden=hiding)
        function = attention_prompt_cached(shape, planes, lengths, causal=hidden, kind=kind, new=("blhd", "bhld"))
        tails = [laid(x, layout) for x, layout in zip(self.tails, (shape.key, shape.value), strict=True)]
        new = [laid(x, layout) for x, layout in zip(self.new, ("blhd", "bhld"), strict=True)]
        masks = [] if self.mask is None else [self.mask if seen is None else pack_mask(seen)]
        gpu.run(function, laid(self.q, shape.query), *packed, *tails, *new, *counts, *masks, Out(held))
        self.result = held.transpose([shape.out.index(axis) for axis in "bhld"])

    def check(self) -> None:
        for b, (full, recent) in enumerate(zip(self.full, self.recent, strict=True)):
            k, v = (
                np.concatenate(
                    [blocks[b, :, : full * BLOCK], *(rounded(x, self.kind) for x in (tail[b, :, :recent], new[b]))], 1
                )
                for blocks, tail, new in zip(self.blocks, self.tails, self.new, strict=True)
            )
            queries = self.q.shape[2]
            mask = causal(queries, k.shape[1]) if self.hidden else np.zeros((1, k.shape[1]))
            if self.mask is not None:
                mask = mask + self.mask[b, 0, :, : k.shape[1]]
            q = rounded(self.q[b], self.kind)
            check(self.result[b : b + 1], self.shape, (q[None], k[None], v[None]), mask[None, None], self.kind)


@pytest.mark.parametrize("planes", [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_behind_a_cache(gpu: Worker, planes: tuple[int, int]) -> None:
    """Sequences of other lengths than each other: none before, blocks alone, blocks and a tail."""
    shape = replace(SHAPE, key="bhld", value="bhld")
    Cached(gpu, shape, planes, (0, 2, 3), (0, 0, 67), 5).check()


def test_behind_a_cache_without_order_or_with_masks(gpu: Worker) -> None:
    shape = replace(SHAPE, size=64, value_size=128, heads=2, kv_heads=1, key="bhld", value="bhld")
    Cached(gpu, shape, (2, 2), (1, 0), (3, 70), 67, hidden=False, kind="float16").check()
    Cached(gpu, replace(SHAPE, key="bhld"), (2, 1), (1,), (3,), 3, mask=True).check()


def test_bits_behind_a_cache(gpu: Worker) -> None:
    """A key's bit is that of its number in the sequence. One that sees but what is not there gives the mean of all."""
    shape = replace(SHAPE, key="bhld", value="bhld")
    seen = np.random.default_rng(3).random((2, 1, 4, 3 * BLOCK + 70 + 4)) < 0.6
    seen[..., BLOCK : 2 * BLOCK] = False
    # Of the first sequence there are 195 keys, 199 with the new ones.
    seen[0, :, 2] = np.arange(seen.shape[-1]) == 210
    case = Cached(gpu, shape, (2, 1), (3, 1), (3, 20), 4, hidden=False, seen=seen)
    values = [case.blocks[1][0], *(rounded(x[0], case.kind) for x in (case.tails[1][:, :, :3], case.new[1]))]
    mean = np.concatenate(values, 1).mean(1)
    np.testing.assert_allclose(case.result[0, :, 2], np.repeat(mean, shape.group, 0), atol=2e-3)
    case.result[0, :, 2] = 0
    case.check()


@pytest.mark.parametrize("where", ["k", "v"])
def test_a_scale_that_is_no_number_shows_where_it_is_seen(gpu: Worker, where: str) -> None:
    """In all that its head of keys gives, and nowhere else."""
    shape = replace(SHAPE, key="bhld", value="bhld")
    got = Cached(gpu, shape, (2, 2), (2, 2), (0, 3), 3, broken=where).result
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1, : SHAPE.group]).all()
    assert np.isfinite(got[1, SHAPE.group :]).all()


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_comes(gpu: Worker, data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    sizes = [4 * draw(st.integers(8, 32)) for _ in range(2)]
    shape = Attention(kv_heads * group, kv_heads, *sizes, scale=0.2, key="bhld", value="bhld")
    planes = tuple(draw(st.integers(1, 3)) for _ in range(2))
    counts = draw(st.integers(0, 3)), draw(st.integers(0, 70))
    kind = draw(st.sampled_from(sorted(UNITS)))
    Cached(gpu, shape, planes, counts[:1], counts[1:], draw(st.integers(1, 70)), kind=kind).check()
    keys = draw(st.integers(1, 200))
    lengths, window = (1, draw(st.integers(1, keys)), keys), draw(st.sampled_from([0, 64]))
    Whole(gpu, shape, planes[0], lengths, window=window, kind=kind, hidden=draw(st.booleans())).check()
