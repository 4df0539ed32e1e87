"""Words of bits, packed while what they say is computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tirx

from tests.schedule.cpu.graphs import TIERS
from tvm_ternary.kernels.attention import pack_mask
from tvm_ternary.kernels.mask_words import mask_words
from tvm_ternary.schedule.cpu.rules import schedule_function
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.target import resolve

KINDS = ["as it is", "computed", "computed before"]


def seen_by(kind: str, kept: te.Tensor) -> te.Tensor:
    """Of what is kept, bool or int64 (rows, keys), all; or what lies no later; or that behind a choice."""
    if kind == "as it is":
        return kept

    def one(i: Any, j: Any) -> Any:
        seen = tirx.all(kept[i, j] != 0, j <= i)
        return tirx.if_then_else(j < 3, tirx.const(True), seen) if kind == "computed before" else seen

    return te.compute(kept.shape, one, "seen")


@cache
def packer(tier: str, kind: str, keys: int | None) -> tuple[Any, str]:
    rows, known = tirx.Var("rows", "int64"), tirx.Var("keys", "int64") if keys is None else tirx.IntImm("int64", keys)
    kept = te.placeholder([rows, known], "bool" if kind == "as it is" else "int64", "kept")
    function = te.create_prim_func([kept, mask_words(seen_by(kind, kept))])
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    scheduled, source = schedule_function(function, simd_of(target))
    return tvm.compile(tvm.IRModule({"main": scheduled}), target)["main"], source


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3), keys=st.integers(1, 200), seed=st.integers(0, 9))
def test_any_keys(tier: str, kind: str, rows: int, keys: int, seed: int) -> None:
    check(tier, kind, rows, keys, seed, None)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128])
def test_known_keys(keys: int) -> None:
    check("portable", "computed", 3, keys, 0, keys)


def check(tier: str, kind: str, rows: int, keys: int, seed: int, known: int | None) -> None:
    kept = np.random.default_rng(seed).random((rows, keys)) < 0.5
    function, source = packer(tier, kind, known)
    assert source == "rule:mask"
    words = tvm.runtime.tensor(np.full((rows, -(-keys // 64)), -7, np.int64))
    function(tvm.runtime.tensor(kept if kind == "as it is" else kept.astype(np.int64)), words)
    seen = kept if kind == "as it is" else kept & np.tri(rows, keys, dtype=bool)
    if kind == "computed before":
        seen[:, :3] = True
    np.testing.assert_array_equal(words.numpy(), pack_mask(seen))


def test_words_that_are_cut_out() -> None:
    kept = te.placeholder([tirx.IntImm("int64", n) for n in (4, 130)], "bool", "kept")
    words = mask_words(kept)
    some = te.compute([tirx.IntImm("int64", n) for n in (2, 3)], lambda i, j: words[i + 2, j], "some")
    target = tvm.target.Target(resolve(TIERS["portable"]).tvm)
    scheduled, source = schedule_function(te.create_prim_func([kept, some]), simd_of(target))
    assert source == "rule:mask"
    seen, got = np.random.default_rng(0).random((4, 130)) < 0.5, tvm.runtime.tensor(np.zeros((2, 3), np.int64))
    tvm.compile(tvm.IRModule({"main": scheduled}), target)["main"](tvm.runtime.tensor(seen), got)
    np.testing.assert_array_equal(got.numpy(), pack_mask(seen)[2:])


def test_bits_are_keys() -> None:
    seen = np.zeros((2, 1, 1, 130), bool)
    seen[1, 0, 0, [0, 63, 64, 129]] = True
    words = pack_mask(seen)
    assert words.tolist() == [[[[0, 0, 0]]], [[[1 - 2**63, 1, 2]]]]
