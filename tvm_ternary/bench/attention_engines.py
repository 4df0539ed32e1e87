"""Our attention kernels on one case: float keys and values, and ternary ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from tvm_ternary.bench.attention_case import AttentionEngine, Case, Exact, Floats, HeadShape, Operands
from tvm_ternary.bench.memory import aligned, aligned_copy
from tvm_ternary.errors import OptionError
from tvm_ternary.kernels.attention import Attention, pack_mask
from tvm_ternary.kernels.ternary_keys import BLOCK, bytes_a_token, dequantize_block, pack, quantize_block
from tvm_ternary.schedule.cpu.attention import attention
from tvm_ternary.schedule.cpu.attention.packed import Packed, attention_step
from tvm_ternary.schedule.cpu.attention.rounded import pack_keys, rounded_attention, words_of
from tvm_ternary.schedule.cpu.kernel import build_kernel
from tvm_ternary.schedule.cpu.nest import index
from tvm_ternary.schedule.intrinsics import BIT_COUNTS, BYTE_DOTS, PAIR_DOTS
from tvm_ternary.target import Target

FULL = "full"
"""The name of keys and values that stay float32."""

# Of Gaussian operands, queries and weights rounded to int8, too.
_INT8_BOUND = 3e-2
_FLOAT_BYTES = 4
_FLOAT_BITS = 32


@dataclass(frozen=True)
class CacheScheme:
    """How keys and values are held: ``full``, or ``t2a8`` for two planes and queries rounded to 8 bits.

    With ``a1`` queries become trits.

    A step's cache holds both so, a prompt only keys.

    Attributes
    ----------
    planes : int
        0 for float32.
    bits : int
        Of what they are multiplied by, 8 or 32; 1 if queries are trits, and weights bytes.
    """

    planes: int = 0
    bits: int = 32

    @classmethod
    def parse(cls, text: str) -> CacheScheme:
        """Read a name.

        Raises
        ------
        OptionError
            If it is none.
        """
        if text == FULL:
            return cls()
        match = re.fullmatch("t([1-3])a(1|8|32)", text)
        if match is None:
            raise OptionError(f"scheme {text!r}", "unknown; expected full or t{1-3}a{1|8|32}", "for example full,t2a8")
        return cls(int(match[1]), int(match[2]))

    def check_prompt(self) -> None:
        """Refuse what a prompt's keys cannot be.

        Raises
        ------
        OptionError
            If they are ternary and queries are not rounded.
        """
        if self.planes and not self.rounded:
            problem = "queries of a prompt are rounded where keys are; expected full or t{1-3}a{1|8}"
            raise OptionError(f"prompt scheme {self}", problem, "for example full,t2a8")

    @property
    def rounded(self) -> bool:
        """Whether what they are multiplied by is."""
        return self.bits < _FLOAT_BITS

    @property
    def trits(self) -> bool:
        """Whether queries are trits."""
        return self.bits == 1

    def __str__(self) -> str:
        return f"t{self.planes}a{self.bits}" if self.planes else FULL

    def token_bytes(self, shape: HeadShape, *, values: bool = True) -> float:
        """Bytes of a packed token's keys and values of all heads; ``values`` says whether these are packed, too."""
        in_float = _FLOAT_BYTES * shape.size
        if not self.planes:
            return shape.kv_heads * 2 * in_float
        both, of_values = (bytes_a_token(size, shape.size, self.planes) for size in (shape.size, 0))
        return shape.kv_heads * (both if values else both - of_values + in_float)

    def cache_bytes(self, shape: HeadShape, tokens: int, window: int, *, values: bool = True) -> float:
        """Bytes of a layer's cache: packed blocks, and the last tokens in float32."""
        packed = BLOCK * blocks_of(tokens, window) if self.planes else 0
        return packed * self.token_bytes(shape, values=values) + (tokens - packed) * CacheScheme().token_bytes(shape)


def blocks_of(tokens: int, window: int) -> int:
    """Packed blocks of so many tokens: a block is packed once ``window`` newer tokens are there."""
    return max(0, (tokens - window) // BLOCK)


@dataclass(frozen=True)
class _Blocks:
    """The packed blocks of a cache in the kernel's order, and what attention over them gives exactly.

    Attributes
    ----------
    arrays : sequence of array
    want : array
    keys : (numbers, scales)
    values : array
        What all values stand for.
    """

    arrays: Sequence[npt.NDArray[Any]]
    want: Exact
    keys: tuple[npt.NDArray[np.int8], Floats]
    values: Exact


class Engines:
    """Makes engines, and keeps compiled kernels, which are the same for all lengths.

    Parameters
    ----------
    target : Target
        A CPU that this host can be.
    window : int
        Last tokens that stay float32, a multiple of 64.
    """

    def __init__(self, target: Target, window: int) -> None:
        self._target, self._window = target, window
        self._kernels: dict[Any, Any] = {}

    def make(self, operands: Operands, schemes: Sequence[CacheScheme]) -> dict[CacheScheme, AttentionEngine]:
        """An engine for each scheme."""
        if not operands.case.step:
            return {one: self._prompt(operands, one) if one.planes else self._full(operands) for one in schemes}
        blocks = {p: self._quantized(operands, p) for p in sorted({one.planes for one in schemes}) if p}
        return {
            one: self._step(operands, one, blocks[one.planes]) if one.planes else self._full(operands)
            for one in schemes
        }

    def _full(self, operands: Operands) -> AttentionEngine:
        case = operands.case
        shape = _attention(case.shape, "bhld" if case.step else "blhd", "ms" if case.causal else "")
        if shape not in self._kernels:
            lengths = (1, 1 if case.step else None, None)
            self._kernels[shape] = build_kernel(partial(attention, shape, lengths), self._target)
        masks = [_causal_mask(case)] if case.causal else []
        inputs: list[npt.NDArray[Any]] = [operands.q, operands.k, operands.v, *masks]
        return _engine(FULL, self._kernels[shape], inputs, operands.exact, _float_bound(case))

    def _step(self, operands: Operands, scheme: CacheScheme, blocks: _Blocks) -> AttentionEngine:
        case = operands.case
        shape, packed = _attention(case.shape, "bhld"), self._ways(scheme)
        if (shape, scheme) not in self._kernels:
            schedule = partial(attention_step, shape, packed, (1, 1, None, None))
            self._kernels[shape, scheme] = build_kernel(schedule, self._target)
        full = blocks_of(case.keys, self._window)
        latest = [aligned_copy(one[:, :, full * BLOCK :]) for one in operands.by_head]
        counts = [_count(full), _count(case.keys - full * BLOCK)]
        bound = _INT8_BOUND if scheme.rounded else _float_bound(case)
        inputs = [operands.q, *blocks.arrays, *latest, *counts]
        want = operands.attend_trits(*blocks.keys, blocks.values) if scheme.trits else blocks.want
        return _engine(str(scheme), self._kernels[shape, scheme], inputs, want, bound)

    def _ways(self, scheme: CacheScheme) -> Packed:
        tier, planes = self._target.tier, scheme.planes
        dot = BYTE_DOTS[tier] if scheme.rounded else None
        return Packed(planes, planes, dot, PAIR_DOTS.get(tier), scheme.trits, tier in BIT_COUNTS)

    def _prompt(self, operands: Operands, scheme: CacheScheme) -> AttentionEngine:
        """Keys are packed in every call, but for the last ones, and their values are rounded as the tier wants it."""
        scheme.check_prompt()
        case, planes = operands.case, scheme.planes
        shape = _attention(case.shape, "blhd", "ms" if case.causal else "")
        packed = self._ways(scheme)
        ways = packed, self._window
        # A mask is nothing to the keys.
        unmasked = replace(shape, mask="", hidden=None)
        if (pack_keys, unmasked, planes) not in self._kernels:
            schedule = partial(pack_keys, unmasked, *ways, (1, None))
            self._kernels[pack_keys, unmasked, planes] = build_kernel(schedule, self._target)
        if (shape, scheme) not in self._kernels:
            schedule = partial(rounded_attention, shape, *ways, (1, None, None))
            self._kernels[shape, scheme] = build_kernel(schedule, self._target)
        pack_them, attend = self._kernels[pack_keys, unmasked, planes], self._kernels[shape, scheme]
        room = words_of(shape, packed, index(1), index(case.keys))
        blocks = [aligned(tuple(int(size) for size in extents), dtype) for extents, dtype in room]
        masks = [_causal_mask(case)] if case.causal else []
        inputs = [operands.q, *blocks, operands.k, operands.v, *masks]
        want = self._prompt_want(operands, scheme)
        engine = _engine(str(scheme), attend, inputs, want, _INT8_BOUND)
        to_pack = [tvm_ffi.from_dlpack(array) for array in (operands.k, operands.v, *blocks)]

        def call() -> Floats:
            pack_them(*to_pack)
            out: Floats = engine.call()
            return out

        # Keys and values are read once more, and blocks written before they are read.
        moved = engine.bytes + operands.k.nbytes + operands.v.nbytes + sum(array.nbytes for array in blocks)
        return replace(engine, call=call, bytes=moved)

    def _prompt_want(self, operands: Operands, scheme: CacheScheme) -> Exact:
        k, v = operands.by_head
        full = blocks_of(operands.case.keys, self._window)
        if scheme.trits:
            return operands.attend_trits(*_quantize(k, scheme.planes, -2, full), v)
        return operands.attend(rounded(k, scheme.planes, -2, full), v)

    def _quantized(self, operands: Operands, planes: int) -> _Blocks:
        """Quantize and pack all but the last tokens."""
        case = operands.case
        full = blocks_of(case.keys, self._window)
        if not full:
            problem = f"{case.keys} tokens are all among the last {self._window}, which stay float32"
            raise OptionError("cached", problem, f"give at least {self._window + BLOCK}")
        arrays: list[npt.NDArray[Any]] = []
        meant = []
        for one, axis in zip(operands.by_head, (-2, -1), strict=True):
            codes, scale = _quantize(one, planes, axis, full)
            arrays += [*pack(codes if axis == -2 else codes.swapaxes(-1, -2), planes), scale]
            meant.append(rounded(one, planes, axis, full))
        keys = _quantize(operands.by_head[0], planes, -2, full)
        return _Blocks([aligned_copy(array) for array in arrays], operands.attend(*meant), keys, meant[1])


def _quantize(one: Floats, planes: int, axis: int, blocks: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Numbers and scales of so many blocks of keys (``axis`` -2) or values (-1), by head and token."""
    parts = one[:, :, : blocks * BLOCK].reshape(*one.shape[:2], blocks, BLOCK, one.shape[-1])
    return quantize_block(parts, planes, axis)


def rounded(one: Floats, planes: int, axis: int, blocks: int) -> Exact:
    """Keys (``axis`` -2) or values (-1), by head and token, with so many blocks as they are once packed."""
    stands_for = dequantize_block(*_quantize(one, planes, axis, blocks), axis)
    return np.concatenate([stands_for.reshape(*one.shape[:2], -1, one.shape[-1]), one[:, :, blocks * BLOCK :]], 2)


def _float_bound(case: Case) -> float:
    """Largest relative error (2-norm) of float32, for random keys and values and roundings independent of each other.

    Of n keys with weights p and normal values the sum has size sqrt(n mean(p^2)), and on the way to it the root of m
    grows in place of that of n. Added one by one, each of n roundings errs by up to eps/2, evenly, of what there is by
    then: together eps/2 / sqrt(3) n sqrt(mean(p^2) / 2), relative to the sum eps sqrt(n / 24). The sum of the weights
    alone, which all results are divided by, errs by at most eps sqrt(n) / 6. The root of both squares is
    0.27 eps sqrt(n), and the bound nearly four of it. Blocks that are summed before they are added err less. Scores and
    exponentials err by a few eps whatever n is, which is below the floor.
    """
    return max(1e-5, float(np.finfo(np.float32).eps * case.keys**0.5))


def _attention(shape: HeadShape, layout: str, mask: str = "") -> Attention:
    """Of keys and values that lie so."""
    heads = (shape.heads, shape.kv_heads, shape.size, shape.size)
    hidden = float("-inf") if mask else None
    return Attention(*heads, shape.scale, key=layout, value=layout, mask=mask, hidden=hidden)


def _causal_mask(case: Case) -> npt.NDArray[np.int64]:
    """Words of (1, 1, queries, keys), as the masks of models become them."""
    words: npt.NDArray[np.int64] = aligned_copy(
        pack_mask(np.tri(case.queries, case.keys, case.keys - case.queries, dtype=bool)[None, None])
    )
    return words


def _count(number: int) -> npt.NDArray[np.int32]:
    return aligned((1,), np.int32, number)


def _engine(
    name: str, kernel: Any, inputs: Sequence[npt.NDArray[Any]], want: Exact, error_bound: float
) -> AttentionEngine:
    """Called with tensors that lie where the arrays do; its result is written where the last one did."""
    out = aligned(inputs[0].shape, np.float32)
    tensors = [tvm_ffi.from_dlpack(array) for array in (*inputs, out)]

    def call() -> Floats:
        kernel(*tensors)
        return out

    moved = sum(array.nbytes for array in (*inputs, out))
    return AttentionEngine(name, call, lambda got: got, want, error_bound, moved)
