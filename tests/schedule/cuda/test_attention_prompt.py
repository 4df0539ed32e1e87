"""Attention of many queries on the emulated GPU, against its definition in float64 on what operands are rounded to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.cuda_emulator import Out, Worker
from tests.schedule.cpu.graphs import EPSILON, normal
from tvm_ternary.kernels.attention import Attention, pack_mask, reference_attention
from tvm_ternary.schedule.cuda.attention.prompt import attention_prompt, why_not

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25)
UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""By what share of itself rounding changes a number at most."""


class Case:
    """One attention, run on the GPU."""

    def __init__(
        self,
        gpu: Worker,
        shape: Attention,
        lengths: tuple[int, int, int],
        *,
        causal: bool = False,
        kind: str = "bfloat16",
        mask: np.ndarray | None = None,
        operands: list[np.ndarray] | None = None,
    ) -> None:
        batch, queries, keys = lengths
        self.shape, self.kind, self.mask = shape, kind, mask
        sizes = ((shape.heads, queries, shape.size), (shape.kv_heads, keys, shape.size))
        extents = (*sizes, (shape.kv_heads, keys, shape.value_size))
        words = [] if mask is None else [mask if shape.hidden is None else pack_mask(mask == 0)]
        self.operands = operands or [normal(7 + n, batch, *extent) for n, extent in enumerate(extents)]
        if causal:
            order = np.where(np.arange(keys) <= np.arange(queries)[:, None] + keys - queries, 0.0, -np.inf)
            self.mask = order if mask is None else order + mask
        out = np.full((batch, shape.heads, queries, shape.value_size), np.nan, np.float32)
        held = np.ascontiguousarray(laid(out, shape.out))
        layouts = (shape.query, shape.key, shape.value)
        arrays = [laid(x, layout) for x, layout in zip(self.operands, layouts, strict=True)]
        function = attention_prompt(shape, lengths, causal=causal, kind=kind)
        gpu.run(function, *arrays, *words, Out(held))
        self.result = held.transpose([shape.out.index(axis) for axis in "bhld"])

    def check(self) -> None:
        q, k, v = (rounded(x, self.kind) for x in self.operands)
        check(self.result, self.shape, (q, k, v), self.mask, self.kind)


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    dtype: Any = getattr(ml_dtypes, kind, kind)
    return np.asarray(x).astype(dtype).astype(np.float64)


def check(
    result: np.ndarray, shape: Attention, operands: tuple[np.ndarray, ...], mask: np.ndarray | None, kind: str
) -> None:
    """Against the definition on rounded operands: a weight is rounded once, beside sums that are not; all else is
    float32.
    """
    q, k, v = operands
    want = reference_attention(q, k, v, shape.scale, mask)
    wide_k, wide_v = (np.repeat(x, shape.group, 1) for x in (k, v))
    scores = shape.scale * q @ wide_k.swapaxes(-1, -2) + (0 if mask is None else mask)
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    sizes = shape.scale * np.abs(q) @ np.abs(wide_k).swapaxes(-1, -2)
    sizes = sizes + (0 if mask is None else np.where(np.isneginf(mask), 0, np.abs(mask)))
    off = ((shape.size + 8) * sizes).max(-1, keepdims=True) * EPSILON
    moved = np.expm1(2 * off) + UNITS[kind] + 2 * (8 + k.shape[2]) * EPSILON
    assert np.all(np.abs(result - want) <= moved * (weights @ np.abs(wide_v)) + 1e-30)


def laid(x: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(["bhld".index(axis) for axis in layout]))


@pytest.mark.parametrize("kind", UNITS)
def test_more_queries_than_keys_and_fewer(gpu: Worker, kind: str) -> None:
    """Heads that fill no step, blocks of keys that are not full, thread blocks whose last rows are none."""
    for lengths in ((2, 3, 70), (1, 70, 65)):
        Case(gpu, SHAPE, lengths, kind=kind).check()


def test_causal(gpu: Worker) -> None:
    """With keys of a past before the queries', and with queries that see none."""
    Case(gpu, SHAPE, (1, 70, 140), causal=True).check()
    case = Case(gpu, SHAPE, (1, 9, 6), causal=True)
    case.check()
    assert not case.result[:, :, :3].any()


@pytest.mark.parametrize("keys", [66, 68])
def test_masks_layouts_and_whole_sizes(gpu: Worker, keys: int) -> None:
    """Masks of which four numbers are loaded at once, or one."""
    shape = replace(
        SHAPE, heads=2, kv_heads=2, size=64, value_size=32, query="bhld", key="lbhd", value="bhld", out="hbld"
    )
    mask = normal(3, 2, 1, 5, keys)
    mask[0, 0, :, 3:] = -np.inf
    mask[1, 0, 2] = -np.inf
    case = Case(gpu, replace(shape, mask="bms"), (2, 5, keys), mask=mask)
    case.check()
    assert not case.result[1, :, 2].any()


@pytest.mark.parametrize("hidden", [-np.inf, float(np.finfo(np.float32).min), -1e4])
def test_masks_of_bits(gpu: Worker, hidden: float) -> None:
    """Blocks that all queries of a thread block must not see are not read, but where one of them sees nothing."""
    queries, keys, infinity = 150, 330, np.float32(np.inf)
    seen = np.random.default_rng(4).random((2, 1, queries, keys)) < 0.7
    seen[:, :, :, 64:128] = False
    seen[0, :, :, 192:256] = False
    seen[0, :, :128, 320:] = False
    mask = np.where(seen, 0, -infinity).astype(np.float32)
    shape = replace(SHAPE, heads=2, kv_heads=1, mask="bms", hidden=hidden)
    operands = [normal(n, 2, *extent) for n, extent in enumerate(((2, queries, 20), (1, keys, 20), (1, keys, 12)))]
    unread = [x.copy() for x in operands]
    if hidden < -1e30:
        for x in unread[1:]:
            x[:, :, 64:128] = np.nan
    case = Case(gpu, shape, (2, queries, keys), mask=mask, operands=unread, kind="float16")
    case.operands = operands
    case.check()
    # A query of the second thread block that sees no key.
    mask[1, 0, 140] = -infinity
    case = Case(gpu, shape, (2, queries, keys), mask=mask, operands=operands, kind="float16")
    if hidden == -np.inf:
        assert not case.result[1, :, 140].any()
    elif hidden < -1e30:
        mean = rounded(operands[2][1, 0], "float16").mean(0)
        np.testing.assert_allclose(case.result[1, :, 140], np.stack([mean, mean]), atol=1e-3)
    else:
        return
    case.result[1, :, 140] = 0
    case.check()


def test_bits_of_keys_that_order_hides_are_not_seen(gpu: Worker) -> None:
    """A query that has no others gives the mean of all up to its own, also of blocks that nobody else sees."""
    seen = np.ones((1, 1, 5, 150), bool)
    seen[..., 64:128] = False
    seen[:, :, 1, :] = np.arange(150) == 148
    mask = np.where(seen, 0, -np.float32(np.inf)).astype(np.float32)
    shape = replace(SHAPE, mask="bms", hidden=float(np.finfo(np.float32).min))
    case = Case(gpu, shape, (1, 5, 150), causal=True, mask=mask)
    mean = rounded(case.operands[2][0, :, :147], case.kind).mean(1)
    np.testing.assert_allclose(case.result[0, :, 1], np.repeat(mean, shape.group, 0), atol=1e-3)
    case.result[0, :, 1] = 0
    case.check()


def test_hidden_keys_and_values_move_no_bit(gpu: Worker) -> None:
    case = Case(gpu, SHAPE, (1, 70, 70), causal=True)
    operands = [x.copy() for x in case.operands]
    for x in operands[1:]:
        x[:, :, 40:] = -x[:, :, 40:] * np.float32(1e3)
    other = Case(gpu, SHAPE, (1, 70, 70), causal=True, operands=operands)
    np.testing.assert_array_equal(other.result[:, :, :40], case.result[:, :, :40])
    assert (other.result[:, :, 40:] != case.result[:, :, 40:]).any()


def test_what_is_not_finite_shows(gpu: Worker) -> None:
    operands = [x.copy() for x in Case(gpu, SHAPE, (1, 70, 70), causal=True).operands]
    operands[0][0, 1, 5, 3] = np.nan
    got = Case(gpu, SHAPE, (1, 70, 70), causal=True, operands=operands).result
    assert np.isnan(got[0, 1, 5]).all()
    assert np.isnan(got).sum() == SHAPE.value_size


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="float8"):
        attention_prompt(SHAPE, (1, 1, 1), kind="float8")
    with pytest.raises(ValueError, match="a head of 132 elements"):
        attention_prompt(replace(SHAPE, value_size=132), (1, 1, 1))
    with pytest.raises(ValueError, match="two parts"):
        attention_prompt(replace(SHAPE, joined=True), (1, 1, 1))
    with pytest.raises(ValueError, match="4 by 65536 thread blocks"):
        attention_prompt(SHAPE, (65536, 1, 1))
    # 32 words where there are four elements.
    with pytest.raises(ValueError, match="keys has extents"):
        attention_prompt(Attention(1, 1, 4, 4, 1.0), (1, 1, 1 << 27))


def test_why_there_is_none() -> None:
    assert why_not(SHAPE, (65535, 16, 16)) is None
    assert why_not(SHAPE, (65536, 16, 16)) == "has more than 65535 sequences or heads"
