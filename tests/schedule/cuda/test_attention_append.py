"""Tokens appended to a cache on the emulated GPU: what the definition of a block says, and a CPU's bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from tests.cuda_emulator import InOut, Out, Worker
from tests.schedule.cpu.test_attention_append import ALL, SHAPE, Kept, laid
from tests.schedule.cuda.attention import Step
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention import append as cpu
from tvm_ternary.schedule.cpu.attention.packed import Packed
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.cuda.attention.append import append_tokens
from tvm_ternary.schedule.cuda.attention.step import attention_step
from tvm_ternary.target import resolve


@dataclass
class OnGpu(Kept):
    """A cache whose tokens are appended on the GPU."""

    gpu: Worker | None = None

    def add(self, new: list[np.ndarray], past: tuple[int, ...] | int = ALL) -> None:
        """Append, after cutting."""
        keep = np.broadcast_to(np.array(past, np.int32), self.batch)
        self.made = [self._appended(b, [x[b] for x in new], int(keep[b])) for b in range(self.batch)]
        room = self.room or self.window + BLOCK
        lengths = (self.batch, None, self.blocks, room)
        function = append_tokens(self.shape, self.planes, self.window, lengths, self.new)
        arrays = [*(laid(x, layout) for x, layout in zip(new, self.new, strict=True)), np.ascontiguousarray(keep)]
        state = [x.numpy() for x in self.state]
        assert self.gpu is not None
        self.gpu.run(function, *arrays, *map(InOut, state))
        for tensor, array in zip(self.state, state, strict=True):
            tensor.copyfrom(array)


@cache
def of_cpu(shape: Attention, planes: tuple[int, int], window: int) -> Any:
    """A CPU's function with vectors of sixteen, for this host whatever vectors it has."""
    simd = simd_of(tvm.target.Target(resolve("x86-64-v4").tvm))
    assert simd.lanes("float32") == 16
    function = cpu.append_tokens(shape, Packed(*planes, None), window, (None,) * 4, simd)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, tvm.target.Target(resolve("x86-64-v3").tvm))["main"]


def held(kept: Kept) -> list[np.ndarray]:
    """What a cache says it holds: of each sequence all its blocks and last tokens, and how many they are."""
    *arrays, full, recent = (tensor.numpy() for tensor in kept.state)
    packed, tails = arrays[:-2], arrays[-2:]
    parts = [array[b, :, :count] for array in packed for b, count in enumerate(full)]
    return [*parts, *(tail[b, :, :count] for tail in tails for b, count in enumerate(recent)), full, recent]


@pytest.mark.parametrize("planes", [(3, 1), (2, 2), (1, 3)])
def test_bits_are_those_of_a_cpu(gpu: Worker, planes: tuple[int, int]) -> None:
    """Of sequences that are cut to nothing, within blocks, between, and not at all; one token at once, and many.

    Where a block becomes full, tails move that hold more than a block, and others that do not.
    """
    ours, theirs = (OnGpu(planes=planes, batch=5, gpu=gpu) for _ in range(2))
    cuts = ((0, 100, 128, 260, ALL), (5, 70, 127, 191, 192))
    for count, past in ((270, ALL), (50, cuts[0]), (130, ALL), (1, ALL), (0, cuts[1]), (65, ALL)):
        new = ours.tokens(count)
        ours.add(new, past)
        keep = np.ascontiguousarray(np.broadcast_to(np.array(past, np.int32), 5))
        arrays = [*(laid(x, "blhd") for x in new), keep]
        of_cpu(ours.shape, planes, 64)(*map(tvm.runtime.tensor, arrays), *theirs.state)
        for got, want in zip(held(ours), held(theirs), strict=True):
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
        ours.check()


def test_layouts_and_windows(gpu: Worker) -> None:
    """No window, heads that fill no group of sixteen and more than one, tails by tokens."""
    shape = replace(SHAPE, size=36, value_size=44, key="blhd", value="hlbd")
    kept = OnGpu(shape, (2, 1), window=0, new=("bhld", "lbhd"), room=131, gpu=gpu)
    for count in (63, 1, 140):
        kept.add(kept.tokens(count))
        kept.check()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_shows(gpu: Worker, value: float) -> None:
    """A scale that is no number, of what shares it alone; the last value stands for a sum that overflows."""
    kept = OnGpu(window=0, batch=1, gpu=gpu)
    k, v = kept.tokens(64)
    k[0, 1, 7 if value != 3e38 else slice(None), 5] = value
    v[0, 0, 9, 3 if value != 3e38 else slice(None)] = value
    kept.add([k, v])
    for n, place in enumerate(((1, 5), (0, 9))):
        codes, scale = kept.packed(0, 0, n)
        assert [tuple(map(int, at)) for at in np.argwhere(np.isnan(scale))] == [place]
        assert not (codes[place[0], :, place[1]] if n == 0 else codes[place[0], place[1]]).any()


@pytest.mark.parametrize("magnitude", [0.0, 1e-42])
def test_what_is_too_small_is_zero(gpu: Worker, magnitude: float) -> None:
    kept = OnGpu(window=0, batch=1, gpu=gpu)
    kept.add([x * np.float32(magnitude) for x in kept.tokens(64)])
    kept.check()
    assert not any(part.any() for n in range(2) for part in kept.packed(0, 0, n))


def _blocks(kept: Kept, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales of the first two blocks of both sequences."""
    found = [[kept.packed(b, block, n) for block in range(2)] for b in range(2)]
    codes, scale = (np.stack([np.stack([one[i] for one in row], 1) for row in found]) for i in range(2))
    return codes, scale


def test_a_step_reads_what_was_appended(gpu: Worker) -> None:
    shape = replace(SHAPE, size=16, query="bhld", out="bhld")
    kept = OnGpu(shape, (3, 3), gpu=gpu)
    kept.add(kept.tokens(200))
    kept.add(kept.tokens(1), (190, 200))
    case = Step(shape, (3, 3), 1, (2, 2), (63, 73), room=128)
    case.k, case.v = (_blocks(kept, n) for n in range(2))
    case.tails = [tail.numpy() for tail in kept.tails]
    gpu.run(attention_step(shape, (3, 3), (2, 1, 6, 128)), case.q, *(x.numpy() for x in kept.state), Out(case.out))
    case.check()


@pytest.mark.parametrize(
    ("window", "room", "what"), [(3, 200, "window of 3"), (64, 127, "window of 64 needs 128"), (-64, 64, "-64")]
)
def test_what_is_refused(window: int, room: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        append_tokens(SHAPE, (2, 2), window, (1, 1, 1, room))


def test_as_many_sequences_as_a_grid_holds() -> None:
    """Twice, once for keys and once for values."""
    shape = replace(SHAPE, heads=1, kv_heads=1)
    append_tokens(shape, (1, 1), 0, (32767, 1, 1, 64))
    with pytest.raises(ValueError, match="1 by 65536 thread blocks"):
        append_tokens(shape, (1, 1), 0, (32768, 1, 1, 64))
