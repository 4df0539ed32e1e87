"""A step of decoding with ternary keys and values: whole blocks as they lie packed, then the last tokens in float.

A block's scales are multiplied into the queries, and the tokens' scales into the weights, so that what is left is
products with whole numbers of a few bits. With `Packed.rounded`, queries and weights become bytes, by one scale a row
and block, and a vector of words is shifted and masked once for four bytes a lane; else each number becomes a float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, PrimFunc, Ramp, Select, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import BLOCK, Digits, digits, packed_words
from tvm_ternary.schedule.cpu.attention.few import Few, tile_rows
from tvm_ternary.schedule.cpu.attention.operands import KEYS, ZERO, Operands, across, buffer, elements, tiles
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space, vector
from tvm_ternary.schedule.cpu.simd import Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math
from tvm_ternary.schedule.intrinsics import ByteDot
from tvm_ternary.schedule.intrinsics.common import field, four_bytes

assert KEYS == BLOCK, "scores of a block have the place of a block of keys"

_MOST = 127.0
_TERMS = 16
"""Terms in a word of two bits: rows of what is multiplied are padded to a multiple."""


@dataclass(frozen=True)
class Packed:
    """How keys and values lie, and what they are multiplied with.

    Parameters
    ----------
    key_planes, value_planes : int
    dot : ByteDot or None
        Of the tier, to multiply bytes; None for floats.
    """

    key_planes: int
    value_planes: int
    dot: ByteDot | None


@dataclass(frozen=True)
class Cache:
    """The packed blocks of a batch of sequences, and how many of them, and of tokens behind them, there are.

    Parameters
    ----------
    shape : Attention
    packed : Packed
    batch, blocks : Expr
        Extents; blocks are the most of any sequence.
    """

    shape: Attention
    packed: Packed
    batch: Expr
    blocks: Expr

    @cached_property
    def keys(self) -> list[Var]:
        return self._words("key", BLOCK, self.shape.size, self.packed.key_planes)

    @cached_property
    def values(self) -> list[Var]:
        return self._words("value", self.shape.value_size, BLOCK, self.packed.value_planes)

    @cached_property
    def key_scale(self) -> Var:
        return self._buffer("key_scale", "float32", self.shape.size)

    @cached_property
    def value_scale(self) -> Var:
        return self._buffer("value_scale", "float32", BLOCK)

    @cached_property
    def full(self) -> Var:
        return tirx.decl_buffer([self.batch], "int32", "full")

    @cached_property
    def recent(self) -> Var:
        return tirx.decl_buffer([self.batch], "int32", "recent")

    def _words(self, name: str, rows: int, terms: int, planes: int) -> list[Var]:
        return [
            self._buffer(f"{name}_words{n}", "uint32", *packed_words(rows, terms, part))
            for n, part in enumerate(digits(planes))
        ]

    def _buffer(self, name: str, dtype: str, *inner: int) -> Var:
        extents = [self.batch, index(self.shape.kv_heads), self.blocks, *map(index, inner)]
        return tirx.decl_buffer(extents, dtype, name)


class _Multiplied:
    """Rows of floats, and the numbers of a block multiplied by them.

    Parameters
    ----------
    name : str
    rows, terms : int
    lanes : int
        Of a vector of float32.
    packed : Packed
    planes : int
    """

    def __init__(self, name: str, rows: int, terms: int, lanes: int, packed: Packed, planes: int) -> None:
        self.rows, self.terms, self.lanes, self.dot, self.fields = rows, terms, lanes, packed.dot, digits(planes)
        self.padded = -(-terms // _TERMS) * _TERMS
        self.largest = (3**planes - 1) // 2
        self.floats = buffer(f"{name}_floats", rows * self.padded)
        self.bytes = tirx.decl_buffer([index(rows * self.padded)], "int8", f"{name}_bytes")
        self.scale, self.total = buffer(f"{name}_scale", rows), buffer(f"{name}_total", rows)
        self.buffers = [self.floats, self.scale, self.total, *([self.bytes] if packed.dot else [])]

    def clear(self) -> Stmt:
        """What is padded is zero, and stays it."""
        zero = tirx.const(0, "int8")
        bytes_ = [loop(self.rows * self.padded, lambda i: BufferStore(self.bytes, zero, [i]))] if self.dot else []
        return sequence(loop(self.rows * self.padded, lambda i: BufferStore(self.floats, ZERO, [i])), *bytes_)

    def load(self, row: Expr, read: Callable[[Expr], Expr]) -> Stmt:
        """Take a row, and round it."""
        start = row * self.padded
        most, total = buffer("most", self.lanes), buffer("sum", self.lanes)
        inverse = buffer("inverse", 1)

        def lane(j: Expr) -> Expr:
            return tirx.floormod(j, index(self.lanes))

        def take(j: Expr) -> Stmt:
            x = self.floats[start + j]
            return sequence(
                BufferStore(self.floats, read(j), [start + j]),
                BufferStore(most, tirx.max(most[lane(j)], tirx.abs(x)), [lane(j)]),
                BufferStore(total, total[lane(j)] + x, [lane(j)]),
            )

        def rounded(j: Expr) -> Stmt:
            x = tirx.nearbyint(self.floats[start + j] * inverse[0])
            # A number that is none has no byte; the scale carries it on.
            x = Select(tirx.EQ(x, x), x, ZERO)
            return sequence(
                BufferStore(self.bytes, x.astype("int8"), [start + j]),
                BufferStore(total, total[lane(j)] + x, [lane(j)]),
            )

        def clear(one: Var) -> Stmt:
            return vector(self.lanes, lambda i: BufferStore(one, ZERO, [i]))

        def add(a: Expr, b: Expr) -> Expr:
            return a + b

        parts = [clear(most), clear(total), elements(index(self.terms), self.lanes, take)]
        if self.dot:
            some = most[0] > ZERO
            parts += [
                across(most, self.lanes, tirx.max),
                across(total, self.lanes, add),
                BufferStore(inverse, Select(some, tirx.const(_MOST, "float32") / most[0], ZERO), [0]),
                # Zero, unless an element is not finite: then NaN.
                BufferStore(self.scale, most[0] * tirx.const(1 / _MOST, "float32") + total[0] * ZERO, [row]),
                clear(total),
                elements(index(self.terms), self.lanes, rounded),
            ]
        parts += [across(total, self.lanes, add), BufferStore(self.total, total[0], [row])]
        return scope("rounded", sequence(parts), [most, total, inverse])

    def multiply(
        self, words: Sequence[Var], at: Sequence[Expr], groups: int, registers: int, store: Callable[..., list[Stmt]]
    ) -> Stmt:
        """The product of all rows with all groups of sixteen rows of a block.

        Parameters
        ----------
        words : sequence of Var
            One for each of `digits`.
        at : sequence of Expr
            Which block.
        groups : int
        registers : int
            Of the vector unit.
        store : callable (row, start, lanes, value) -> statements
            Takes ``lanes`` float sums of a row of floats, from row ``start`` of the block on.
        """
        lanes = self.dot.lanes if self.dot else self.lanes
        # Sums beside each other hide the latency of adding to one; more than half of the registers would spill.
        at_once = max(1, registers // 2 * lanes // (LANES * self.rows))
        parts = [
            self._together(words, at, range(first, min(first + at_once, groups)), lanes, store)
            for first in range(0, groups, at_once)
        ]
        return sequence(parts)

    def _together(
        self, words: Sequence[Var], at: Sequence[Expr], groups: range, lanes: int, store: Callable[..., list[Stmt]]
    ) -> Stmt:
        dtype = "int32" if self.dot else "float32"
        places = [(row, group, part) for row in range(self.rows) for group in groups for part in range(0, LANES, lanes)]
        sums = [tirx.decl_buffer([index(lanes)], dtype, f"acc{n}") for n in range(len(places))]
        step = self._bytes if self.dot else self._numbers
        zero = T.Broadcast(tirx.const(0, dtype), lanes)
        body = [BufferStore(acc, zero, [Ramp(0, 1, lanes)]) for acc in sums]
        for part, array in zip(self.fields, words, strict=True):
            if part.first:
                three = T.Broadcast(tirx.const(3**part.count, dtype), lanes)
                body += [BufferStore(acc, _load(acc, lanes) * three, [Ramp(0, 1, lanes)]) for acc in sums]
            count = -(-self.terms // part.terms)
            body.append(
                loop(
                    count,
                    lambda w, part=part, array=array: sequence(  # type: ignore[misc]
                        [
                            step(acc, lanes, part, array, [*at, index(group), w], row, start)
                            for acc, (row, group, start) in zip(sums, places, strict=True)
                        ]
                    ),
                    name="word",
                )
            )
        for acc, (row, group, start) in zip(sums, places, strict=True):
            body += store(row, group * LANES + start, lanes, self._finished(acc, lanes, row))
        return scope("products", sequence(body), sums)

    def _finished(self, acc: Var, lanes: int, row: int) -> Expr:
        total = _load(acc, lanes)
        if not self.dot:
            return total
        away = tirx.const(self.largest, "float32") * self.total[row]
        return (T.Cast(f"float32x{lanes}", total) - T.Broadcast(away, lanes)) * T.Broadcast(self.scale[row], lanes)

    def _bytes(self, acc: Var, lanes: int, part: Digits, array: Var, at: list[Expr], row: int, start: int) -> Stmt:
        """One word of each lane: its fields are bytes once they are shifted down."""
        assert self.dot is not None
        words = array.vload([*at, start], f"uint32x{lanes}")
        total = _load(acc, lanes)
        mask = 0x01010101 * (2**part.bits - 1)
        for j in range(part.terms // 4):
            bytes_ = T.reinterpret(field(words, part.bits * j, mask, lanes), dtype=f"uint8x{4 * lanes}")
            first = row * self.padded + at[-1] * part.terms + 4 * j
            total = self.dot.add(total, bytes_, four_bytes(self.bytes, first, lanes))
        return BufferStore(acc, total, [Ramp(0, 1, lanes)])

    def _numbers(self, acc: Var, lanes: int, part: Digits, array: Var, at: list[Expr], row: int, start: int) -> Stmt:
        words = array.vload([*at, start], f"uint32x{lanes}")
        total = _load(acc, lanes)
        for term in range(part.terms):
            shift = 8 * (term % 4) + part.bits * (term // 4)
            number = T.reinterpret(field(words, shift, 2**part.bits - 1, lanes), dtype=f"int32x{lanes}")
            number = number - T.Broadcast(T.int32(part.offset), lanes)
            x = self.floats[row * self.padded + at[-1] * part.terms + term]
            total = total + T.Cast(f"float32x{lanes}", number) * T.Broadcast(x, lanes)
        return BufferStore(acc, total, [Ramp(0, 1, lanes)])


def _load(acc: Var, lanes: int) -> Expr:
    return acc.vload([0], f"{acc.dtype}x{lanes}")


class FewPacked(Few):
    """A tile of rows over the packed blocks of a sequence, then over its last tokens."""

    def __init__(self, on: Operands, cache: Cache, batch: Expr, kv: Expr, first: Expr) -> None:
        super().__init__(on, batch, kv, first, join=False)
        self.cache = cache
        shape, packed = self.shape, cache.packed
        self.asked = _Multiplied("q", self.rows, shape.size, self.lanes, packed, packed.key_planes)
        self.weights = _Multiplied("p", self.rows, BLOCK, self.lanes, packed, packed.value_planes)

    def write(self) -> Stmt:
        """All keys for these rows."""
        body = sequence(self.asked.clear(), self.weights.clear(), super().write())
        return scope("packed", body, [*self.asked.buffers, *self.weights.buffers])

    def _over_keys(self, block: Callable[[Expr, Expr], Stmt]) -> Stmt:
        full = self.cache.full[self.batch].astype("int64")
        recent = self.cache.recent[self.batch].astype("int64")
        count = tirx.floordiv(recent + (KEYS - 1), index(KEYS))
        tail = loop(count, lambda n: block(n * KEYS, tirx.min(index(KEYS), recent - n * KEYS)), name="block")
        return sequence(loop(full, self._packed_block, name="packed"), tail)

    def _masked(self, row: int, key: Expr, score: Expr) -> Expr:
        """The last tokens are those that ask: none sees one behind it."""
        _, query = self._at(row)
        recent = self.cache.recent[self.batch].astype("int64")
        seen = key <= recent - self.on.queries + query
        return Select(seen, score, tirx.const(float("-inf"), "float32"))

    def _packed_block(self, n: Expr) -> Stmt:
        at = [self.batch, self.kv, n]
        cache, registers = self.cache, self.on.simd.registers

        def ask(row: Expr) -> Stmt:
            return self.asked.load(row, lambda d: self.q[row, d] * cache.key_scale[(*at, d)])

        def weigh(row: Expr) -> Stmt:
            return self.weights.load(row, lambda j: self.scores[row, j] * cache.value_scale[(*at, j)])

        def score(row: int, start: int, lanes: int, value: Expr) -> list[Stmt]:
            return [BufferStore(self.scores, value, [row, Ramp(start, 1, lanes)])]

        def add(row: int, start: int, lanes: int, value: Expr) -> list[Stmt]:
            fade, room = self.state["fade"][row], self.shape.value_size - start
            if room >= lanes:
                old = self.o.vload([row, start], f"float32x{lanes}")
                return [BufferStore(self.o, old * T.Broadcast(fade, lanes) + value, [row, Ramp(start, 1, lanes)])]
            spare = buffer("spare", lanes)
            keep = [
                BufferStore(self.o, self.o[row, start + i] * fade + spare[i], [row, start + i]) for i in range(room)
            ]
            whole = sequence(BufferStore(spare, value, [Ramp(0, 1, lanes)]), keep) if keep else None
            return [scope("ragged", whole, [spare])] if whole else []

        value_groups = -(-self.shape.value_size // LANES)
        return sequence(
            loop(self.rows, ask, name="row"),
            self.asked.multiply(cache.keys, at, BLOCK // LANES, registers, score),
            loop(self.rows, lambda row: self._softmax(row, index(BLOCK)), name="row"),
            loop(self.rows, weigh, name="row"),
            self.weights.multiply(cache.values, at, value_groups, registers, add),
        )


def attention_step(shape: Attention, packed: Packed, lengths: tuple[int | None, ...], simd: Simd) -> PrimFunc:
    """The scheduled function ``(q, key words ..., key_scale, value words ..., value_scale, k, v, full, recent, out)``.

    Parameters
    ----------
    shape : Attention
        ``key`` and ``value`` are where the elements of the last tokens lie. There is no mask: a query sees all blocks,
        and the last tokens up to its own.
    packed : Packed
    lengths : tuple of (int or None)
        Batch, queries, most blocks and most last tokens; None where it is known at run time.
    simd : Simd

    Returns
    -------
    PrimFunc
        Words (batch, kv heads, blocks, groups, words, 16) uint32, one array for each of `digits`; ``key_scale`` (batch,
        kv heads, blocks, size), ``value_scale`` (..., `BLOCK`) float32; ``full`` and ``recent`` (batch,) int32, how
        many blocks and last tokens a sequence has, the queries' own among them.
    """
    names = ("batch", "queries", "blocks", "latest")
    batch, queries, blocks, latest = (
        Var(name, "int64") if given is None else index(given) for name, given in zip(names, lengths, strict=True)
    )
    on = Operands(shape, simd, batch, queries, index(0), latest)
    cache = Cache(shape, packed, batch, blocks)
    rows = tile_rows(on)
    extents = [batch, index(shape.kv_heads), tiles(queries * shape.group, rows)]
    work = (blocks * BLOCK + latest) * (rows * (shape.size + shape.value_size) // 4)
    body = space(extents, work, lambda at: FewPacked(on, cache, at[0], at[1], at[2] * rows).write())
    params = [on.q, *cache.keys, cache.key_scale, *cache.values, cache.value_scale, on.k, on.v]
    function = PrimFunc([*params, cache.full, cache.recent, on.out], scope("root", body))
    function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
    return expand_vector_math(function)
