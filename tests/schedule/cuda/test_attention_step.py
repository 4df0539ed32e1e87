"""A step over a ternary cache on the emulated GPU, against its definition in float64 on what the blocks stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.cuda_emulator import Out, Worker
from tests.schedule.cuda.attention import Step
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.schedule.cuda.attention.step import attention_step

SHAPE = Attention(heads=4, kv_heads=2, size=20, value_size=12, scale=0.25, key="bhld", value="bhld")


def run(gpu: Worker, case: Step, splits: int | None = 1) -> None:
    function = attention_step(case.shape, case.planes, case.lengths, splits)
    gpu.run(function, *case.arguments, Out(case.out))


@pytest.mark.parametrize("planes", [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_planes(gpu: Worker, planes: tuple[int, int]) -> None:
    """Sequences of other lengths than each other, heads of sizes that fill no word, warps without a block."""
    case = Step(SHAPE, planes, 1, (0, 3), (13, 2))
    run(gpu, case)
    case.check()


def test_many_rows_and_queries(gpu: Worker) -> None:
    """Two tiles of rows in a warp, two thread blocks for them, several for the keys, whole words."""
    shape = replace(SHAPE, heads=5, kv_heads=1, size=80, value_size=64, query="blhd", out="blhd")
    case = Step(shape, (2, 2), 2, (2, 9), (3, 70))
    run(gpu, case, 2)
    case.check()


def test_no_tokens(gpu: Worker) -> None:
    """Nothing comes of nothing, and of a first token its value."""
    case = Step(SHAPE, (2, 2), 1, (0, 0), (0, 1), room=128)
    run(gpu, case, None)
    case.check()
    assert not case.result[0].any()


@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_not_finite_shows(gpu: Worker, where: str) -> None:
    """A scale of a block that is no number makes all that its head gives one, and no other."""
    case = Step(SHAPE, (2, 2), 1, (2, 2), (2, 13))
    (case.k if where == "k" else case.v)[1][1, 0, 1, 7] = np.nan
    run(gpu, case)
    got = case.result
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1, : SHAPE.group]).all()
    assert np.isfinite(got[1, SHAPE.group :]).all()


def test_large_scores(gpu: Worker) -> None:
    case = Step(SHAPE, (2, 2), 1, (0, 3), (13, 2))
    case.q *= np.float32(1e4)
    run(gpu, case)
    case.check()


@pytest.mark.parametrize(
    ("change", "what"),
    [({"size": 18}, "size of 18"), ({"value_size": 7}, "value_size of 7"), ({"key": "bhdl"}, "bhdl")],
)
def test_what_is_refused(change: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        attention_step(replace(SHAPE, **change), (2, 2), (1, 1, 1, 1))  # type: ignore[arg-type]


def test_what_is_too_large_is_refused() -> None:
    shape = Attention(32, 32, 128, 128, 1.0, key="bhld", value="bhld")
    with pytest.raises(ValueError, match="key_words0 has extents"):
        attention_step(shape, (2, 2), (256, 1, 511, 128))
    with pytest.raises(ValueError, match="1 by 65536 thread blocks"):
        attention_step(replace(SHAPE, heads=1, kv_heads=1), (1, 1), (65536, 1, 1, 1))
