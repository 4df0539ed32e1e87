"""Attention over a whole text whose keys are rounded on the way: packed by one function, attended to by another.

All keys and values come in float. Keys that are older than a window are packed, whole blocks of them, and multiplied by
byte dot products (`many_packed`); where the tier multiplies pairs of 16-bit numbers, their values are rounded to those
(`many_paired`). All others are read as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import PrimFunc, Var

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, packed_words
from tvm_ternary.schedule.cpu.attention.many_packed import PackedOperands
from tvm_ternary.schedule.cpu.attention.operands import Operands, place
from tvm_ternary.schedule.cpu.attention.packed import Cache, Packed
from tvm_ternary.schedule.cpu.attention.parts import KeyPart
from tvm_ternary.schedule.cpu.attention.prefill import over_packed
from tvm_ternary.schedule.cpu.attention.values import PairedValues
from tvm_ternary.schedule.cpu.nest import index, scope, sequence, space
from tvm_ternary.schedule.cpu.simd import Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math

_OPERATIONS = 16
"""On the way of an element into a block of keys, and as a value to a 16-bit number half as many."""


def rooms(keys: Expr) -> Expr:
    """Blocks that there is memory for; at least one, so that no tensor is empty."""
    return Analyzer().simplify(tirx.floordiv(keys, index(BLOCK)) + 1)


@dataclass(frozen=True)
class _Block(KeyPart):
    """One block of the keys as they are: what is the tail of a cache elsewhere is all of them."""

    number: Expr

    def _tail(self, head: list[Expr], token: Expr, d: Expr) -> Expr:  # type: ignore[override]
        return self.tail[tuple(place(self.layout, head[0], head[1], self.number * BLOCK + token, d))]


@dataclass(frozen=True)
class _Operands(PackedOperands):
    """With all keys in float."""

    @cached_property
    def k(self) -> Var:
        return self._operand("k", self.shape.key, self.shape.kv_heads, self.keys, self.shape.size)

    def key_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.k[tuple(place(self.shape.key, batch, kv, key, d))]


def pack_keys(shape: Attention, packed: Packed, window: int, lengths: tuple[int | None, ...], simd: Simd) -> PrimFunc:
    """The scheduled function ``(k, v, key words ..., key_scale[, value words, value_scale])``.

    Parameters
    ----------
    shape : Attention
    packed : Packed
    window : int
        Last keys that stay as they are.
    lengths : tuple of (int or None)
        Batch and keys; None where it is known at run time.
    simd : Simd

    Returns
    -------
    PrimFunc
        Words and scales for `rooms` blocks, of which those behind the last packed one are not written: of values only
        if ``packed`` has a dot product of pairs.
    """
    batch, keys = _extents(("batch", "keys"), lengths)
    on = Operands(shape, simd, batch, index(1), index(0), keys)
    cache = Cache(shape, packed, batch, rooms(keys))
    kv_heads, blocks = index(shape.kv_heads), _packed_blocks(keys, window)

    def block(at: list[Expr]) -> tirx.Stmt:
        part = _Block(
            new=on.k,
            tail=on.k,
            new_layout=shape.key,
            layout=shape.key,
            words=cache.keys,
            scale=cache.key_scale,
            size=shape.size,
            planes=packed.key_planes,
            lanes=on.lanes,
            number=at[2],
        )
        return part.pack(at)

    extents, found = [batch, kv_heads, blocks], [*cache.keys, cache.key_scale]
    body = space(extents, BLOCK * shape.size * _OPERATIONS, block)
    if packed.pairs is not None:
        values = PairedValues(shape, batch, rooms(keys))
        work = BLOCK * shape.value_size * _OPERATIONS // 2
        body = sequence(body, space(extents, work, lambda at: values.round(on, on.lanes, at)))
        found += values.params
    function = PrimFunc([on.k, on.v, *found], scope("root", body))
    function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
    return expand_vector_math(function)


def rounded_attention(
    shape: Attention, packed: Packed, window: int, lengths: tuple[int | None, ...], simd: Simd
) -> PrimFunc:
    """The scheduled function over what `pack_keys` has packed.

    ``(q, key words ..., key_scale[, value words, value_scale], k, v[, mask], out)``

    Parameters
    ----------
    shape, packed, window, simd
        As of `pack_keys`; there has to be a dot product.
    lengths : tuple of (int or None)
        Batch, queries and keys.
    """
    assert packed.dot is not None
    batch, queries, keys = _extents(("batch", "queries", "keys"), lengths)
    blocks = _packed_blocks(keys, window)
    on = _Operands(shape, simd, batch, queries, index(0), keys, blocks, keys - blocks * BLOCK)
    return over_packed(on, Cache(shape, packed, batch, rooms(keys)), PairedValues(shape, batch, rooms(keys)))


def words_of(shape: Attention, packed: Packed, batch: Expr, keys: Expr) -> list[tuple[list[Expr], str]]:
    """Shapes and dtypes of what `pack_keys` gives."""
    outer = [batch, index(shape.kv_heads), rooms(keys)]
    words = [packed_words(BLOCK, shape.size, part) for part in digits(packed.key_planes)]
    values = PairedValues(shape, batch, rooms(keys)).extents if packed.pairs is not None else []
    of_keys = [([*outer, *map(index, one)], "uint32") for one in words]
    return [*of_keys, ([*outer, index(shape.size)], "float32"), *values]


def _packed_blocks(keys: Expr, window: int) -> Expr:
    return Analyzer().simplify(tirx.floordiv(tirx.max(keys - window, index(0)), index(BLOCK)))


def _extents(names: tuple[str, ...], lengths: tuple[int | None, ...]) -> list[Expr]:
    return [Var(n, "int64") if given is None else index(given) for n, given in zip(names, lengths, strict=True)]
