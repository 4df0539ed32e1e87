"""Attention over ternary caches on a GPU: filled there, checked against float64, timed beside torch's."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.cases import Cache, cache_name, chunk_name
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.prompts import BFLOAT16, multiplied, wrong_in_head
from benchmarks.gpu.reference import rounded
from tvm_ternary.kernels.attention import reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK, STEPS, dequantize_block, digits, quantize_block, unpack
from tvm_ternary.runtime.kv_cache import CacheShape

if TYPE_CHECKING:
    from benchmarks.gpu.device import Call, Device

EPSILON = float(np.finfo(np.float32).eps)
MOST = 32639
"""Queries and weights are rounded to whole numbers of at most that."""
ONE_BY_ONE = 3
"""Tokens that are appended alone, behind all others."""
_POISON = {"uint32": 0x55555555, "float32": np.nan, "int32": 0}
_MOST_SETS = 32

Floats = npt.NDArray[np.float64]


def shape_of(cache: Cache) -> CacheShape:
    """One sequence, with room for so many tokens."""
    _, kv_heads, size, planes, tokens = cache
    return CacheShape(1, kv_heads, size, size, tokens, planes, planes)


class CheckedCache:
    """A cache on a GPU, filled with random tokens by the kernel that appends.

    Parameters
    ----------
    kernels : Kernels
    cache : Cache
    generator : numpy Generator
    """

    def __init__(self, kernels: Kernels, cache: Cache, generator: np.random.Generator) -> None:
        heads, kv_heads, self._size, self._planes, tokens = cache
        gpu, self._shape = kernels.gpu, shape_of(cache)
        self._kernels, self._cache = kernels, cache
        state = [gpu.array(np.full(shape, _POISON[kind], kind), kind) for shape, kind in self._shape.arrays]
        append, step = (gpu.function(kernels.path, f"{kind}_{cache_name(cache)}") for kind in ("append", "step"))
        self._new = [generator.standard_normal((1, tokens, kv_heads, self._size), np.float32) for _ in range(2)]
        starts = [0, *range(tokens - ONE_BY_ONE, tokens + 1)]
        for start, stop in pairwise(starts):
            new = [gpu.array(x[:, start:stop], "float32") for x in self._new]
            append(*new, gpu.array(np.array([start], np.int32), "int32"), *state)
        self._q = generator.standard_normal((1, 1, heads, self._size), np.float32)
        out = gpu.array(np.full(self._q.shape, np.nan, np.float32), "float32")
        step(gpu.array(self._q, "float32"), *state, out)
        self._out, self._held = gpu.read(out)[0, 0], state
        # As bytes, whatever they are.
        self._state = [gpu.read(x).view(kind) for x, (_, kind) in zip(state, self._shape.arrays, strict=True)]
        self._full, self._recent = (int(x[0]) for x in self._state[-2:])

    def wrong(self) -> dict[str, int]:
        """How many results of each kernel are not what they should be."""
        tokens = self._shape.capacity
        full = max(tokens - self._shape.window, 0) // BLOCK
        if (self._full, self._recent) != (full, tokens - full * BLOCK):
            return {"append": tokens, "step": self._out.size}
        found = {"append": 0, "step": 0}
        group = self._out.shape[0] // self._shape.kv_heads
        for head in range(self._shape.kv_heads):
            (k, wrong_k), (v, wrong_v) = (self._head(head, n) for n in range(2))
            found["append"] += wrong_k + wrong_v
            rows = np.s_[head * group : (head + 1) * group]
            want, bound = self._expected(self._q[0, 0, rows].astype(np.float64), k, v)
            found["step"] += int((~(np.abs(self._out[rows] - want) <= bound)).sum())
        return found

    def wrong_behind(self, tokens: int, generator: np.random.Generator) -> int:
        """How many results of a prompt of new tokens, of the first and the last head, are not what they should be."""
        gpu, (heads, kv_heads, size, *_) = self._kernels.gpu, self._cache
        q, k, v = (generator.standard_normal((1, tokens, n, size), np.float32) for n in (heads, kv_heads, kv_heads))
        out = gpu.array(np.full(q.shape, np.nan, np.float32), "float32")
        function = gpu.function(self._kernels.path, f"prompt_{chunk_name((*self._cache, tokens))}")
        new = [gpu.array(x, "float32") for x in (q, k, v)]
        function(new[0], *self._held[:-2], *new[1:], *self._held[-2:], out)
        got, found = gpu.read(out)[0], 0
        for head in {0, heads - 1}:
            kv = head // (heads // kv_heads)
            states = []
            for n, x in enumerate((k, v)):
                (codes, scale, tail), _ = self._head(kv, n)
                floats = np.concatenate([tail, x[0, :, kv]])
                states.append(
                    np.concatenate([multiplied(codes[None], scale[None], n - 2)[0], rounded(floats, BFLOAT16)])
                )
            operands = rounded(np.ascontiguousarray(q[0, :, head]), BFLOAT16), states[0], states[1]
            found += wrong_in_head(got[:, head], operands, generator, causal=True)
        return found

    def _head(self, head: int, n: int) -> tuple[tuple[Any, Any, Any], int]:
        """Numbers, scales and last tokens of a head of keys (0) or values (1); how many are not as they should be."""
        count, full, axis = len(digits(self._planes)), self._full, (-2, -1)[n]
        words = [array[0, head, :full] for array in self._state[n * (count + 1) :][:count]]
        matrix = (self._size, BLOCK) if n else (BLOCK, self._size)
        codes = unpack(words, *matrix, self._planes)
        codes = codes.swapaxes(-1, -2) if n else codes
        scale = self._state[n * (count + 1) + count][0, head, :full]
        tail = self._state[2 * (count + 1) + n][0, head, : self._recent]
        x = self._new[n][0, :, head]
        packed = x[: full * BLOCK].reshape(full, BLOCK, self._size)
        wrong = int((tail != x[full * BLOCK :]).sum()) + _wrong_in_blocks(packed, codes, scale, self._planes, axis)
        return (codes, scale, tail), wrong

    def _expected(self, q: Floats, keys: tuple[Any, Any, Any], values: tuple[Any, Any, Any]) -> tuple[Floats, Floats]:
        """What should come of the queries of a head of keys, and how far it may be off: see the kernels' tests."""
        (kc, ks, kt), (vc, vs, vt), scale = keys, values, self._size**-0.5
        k = np.concatenate([dequantize_block(kc, ks, -2).reshape(-1, self._size), kt])
        v = np.concatenate([dequantize_block(vc, vs, -1).reshape(-1, self._size), vt])
        want = reference_attention(q[None, :, None], k[None, None], v[None, None], scale)[0, :, 0]
        products = scale * np.abs(q) @ np.abs(k).T
        off = (self._size + 8) * products.max(-1) * EPSILON
        half = 0.5 * scale * np.abs(q[:, None] * ks).max(-1) / MOST  # (rows, blocks)
        off = off + (half * np.abs(kc.astype(np.float64)).sum(-1).max(-1)).max(-1, initial=0)
        moved = np.expm1(2 * off)[:, None] + 2 * (4 + len(k) + 4 * len(kc)) * EPSILON
        scores = scale * q @ k.T
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        packed = weights[:, : vs.size].reshape(len(q), *vs.shape)
        steps = (packed * np.abs(vs)).max(-1) / MOST
        codes = np.abs(vc.astype(np.float64)).sum(-2)
        return want, moved * (weights @ np.abs(v)) + (1 + moved) * 0.5 * steps @ codes


def _wrong_in_blocks(
    x: npt.NDArray[Any], codes: npt.NDArray[Any], scale: npt.NDArray[Any], planes: int, axis: int
) -> int:
    """Numbers that are not those of the definition, but in the middle of two, and scales that are not of these."""
    bound = (x.shape[axis] + 8) * EPSILON
    want, _ = quantize_block(x, planes, axis)
    steps = np.abs(x) / (np.abs(x.astype(np.float64)).mean(axis, keepdims=True) * STEPS[planes])
    middle = np.abs(steps - np.floor(steps) - 0.5) <= bound * steps
    wide = codes.astype(np.float64)
    fitted = (x * wide).sum(axis) / np.maximum((wide * wide).sum(axis), 1)
    return int((np.abs(codes.astype(int) - want) > middle).sum() + (~(np.abs(scale - fitted) <= bound * fitted)).sum())


class TimedCache:
    """A full cache of random bits on a GPU: times do not depend on them."""

    def __init__(self, device: Device, cache: Cache) -> None:
        self._device, self._cache, self._shape, self.name = device, cache, shape_of(cache), cache_name(cache)
        self._full = (self._shape.capacity - self._shape.window) // BLOCK

    def times(self) -> dict[str, Any]:
        """A line of results: seconds of a step, of appending a token, and of torch's attention in bfloat16.

        torch's is given queries that share a head of keys as rows of one head, and as its own grouped heads.
        """
        contestants = {"seconds": self._steps(), "append": self._appends()}
        contestants |= {f"torch_bf16_{how}": self._torch(grouped=how == "grouped") for how in ("rows", "grouped")}
        found = dict(zip(contestants, self._device.seconds(list(contestants.values())), strict=True))
        return {
            "case": self.name,
            **{key: value.seconds for key, value in found.items()},
            "spread": max(value.spread for value in found.values()),
            "bytes": self._bytes(),
        }

    def _bytes(self) -> int:
        """What a step reads of the cache."""
        packed = sum(math.prod(shape) * 4 for shape, _ in self._shape.arrays[:-4]) // self._shape.blocks * self._full
        return packed + 8 * self._shape.kv_heads * self._shape.size * (self._shape.capacity - self._full * BLOCK)

    def _state(self) -> list[Any]:
        torch, place = self._device.torch, self._device.place
        made = []
        for shape, kind in self._shape.arrays[:-2]:
            if kind == "uint32":
                made.append(torch.randint(-(2**31), 2**31, shape, device=place, dtype=torch.int32).view(torch.uint32))
            else:
                made.append(torch.rand(shape, device=place))
        counts = self._full, self._shape.capacity - self._full * BLOCK
        return [*made, *(torch.full((1,), count, device=place, dtype=torch.int32) for count in counts)]

    def _steps(self) -> list[Call]:
        torch, place, (heads, _, size, *_) = self._device.torch, self._device.place, self._cache
        step = self._device.library[f"step_{self.name}"]
        calls: list[Call] = []
        for _ in range(self._sets(self._bytes())):
            q, out = torch.randn(1, 1, heads, size, device=place), torch.empty(1, 1, heads, size, device=place)
            calls.append(_call(step, q, *self._state(), out))
        return calls

    def _appends(self) -> list[Call]:
        """Of the last token, again and again: the others are kept."""
        torch, place, (_, kv_heads, size, *_) = self._device.torch, self._device.place, self._cache
        new = [torch.randn(1, 1, kv_heads, size, device=place) for _ in range(2)]
        past = torch.full((1,), self._shape.capacity - 1, device=place, dtype=torch.int32)
        return [_call(self._device.library[f"append_{self.name}"], *new, past, *self._state())]

    def _torch(self, *, grouped: bool) -> list[Call]:
        torch, place, (heads, kv_heads, size, _, tokens) = self._device.torch, self._device.place, self._cache
        kind = {"device": place, "dtype": torch.bfloat16}
        calls: list[Call] = []
        attend = torch.nn.functional.scaled_dot_product_attention
        options = {"enable_gqa": True} if grouped else {}
        rows = (1, heads, 1, size) if grouped else (1, kv_heads, heads // kv_heads, size)
        for _ in range(self._sets(4 * kv_heads * size * tokens)):
            k, v = (torch.randn(1, kv_heads, tokens, size, **kind) for _ in range(2))
            calls.append(_call(attend, torch.randn(rows, **kind), k, v, **options))
        return calls

    def prompt_times(self, tokens: int) -> dict[str, Any]:
        """A line of results: seconds of a prompt of new tokens, and of torch's attention in bfloat16.

        torch's queries see all new tokens, which is what it has a fast kernel for; ours half of them.
        """
        torch, place, (heads, kv_heads, size, _, past) = self._device.torch, self._device.place, self._cache
        q, k, v, out = (torch.randn(1, tokens, n, size, device=place) for n in (heads, kv_heads, kv_heads, heads))
        function, state = self._device.library[f"prompt_{chunk_name((*self._cache, tokens))}"], self._state()
        kind = {"device": place, "dtype": torch.bfloat16}
        theirs = [
            torch.randn(1, n, length, size, **kind) for n, length in ((heads, tokens), *[(kv_heads, past + tokens)] * 2)
        ]
        attend = torch.nn.functional.scaled_dot_product_attention
        ours, other = self._device.seconds(
            [
                [_call(function, q, *state[:-2], k, v, *state[-2:], out)],
                [_call(attend, *theirs, enable_gqa=heads != kv_heads)],
            ]
        )
        return {
            "case": chunk_name((*self._cache, tokens)),
            "seconds": ours.seconds,
            "torch_bf16": other.seconds,
            "spread": max(ours.spread, other.spread),
            "operations": 4 * heads * size * tokens * (past + tokens // 2),
        }

    @staticmethod
    def _sets(size: int) -> int:
        from benchmarks.gpu.device import CACHE_BYTES

        return max(1, min(_MOST_SETS, -(-CACHE_BYTES // size)))


def _call(function: Any, *arguments: Any, **options: Any) -> Call:
    return lambda: function(*arguments, **options)
