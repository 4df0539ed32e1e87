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
from tvm_ternary.schedule.intrinsics.common import field, four_bytes, prefetch

assert KEYS == BLOCK, "scores of a block have the place of a block of keys"

SPAN = 4
"""Blocks whose scores are turned into weights together: what is done once for them is folding across lanes."""

_MOST = 127.0
_MAGNITUDE = 0x7FFFFFFF
# Added to a number of at most 2^22 it leaves the nearest whole number in the low bits.
_ROUND, _ROUND_BITS = 12582912.0, 0x4B400000
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
    """Rows of floats, and the numbers of blocks multiplied by them.

    Parameters
    ----------
    name : str
    rows : int
    terms : int
        Of a block.
    blocks : int
        The most whose products are summed.
    lanes : int
        Of a vector of float32.
    packed : Packed
    planes : int
    """

    def __init__(self, name: str, rows: int, terms: int, blocks: int, lanes: int, packed: Packed, planes: int) -> None:
        self.rows, self.terms, self.lanes, self.dot, self.fields = rows, terms, lanes, packed.dot, digits(planes)
        self.padded = -(-terms * blocks // _TERMS) * _TERMS
        self.largest = (3**planes - 1) // 2
        self.floats = buffer(f"{name}_floats", rows * self.padded)
        self.bytes = tirx.decl_buffer([index(rows * self.padded)], "int8", f"{name}_bytes")
        self.scale, self.total = buffer(f"{name}_scale", rows), buffer(f"{name}_total", rows)
        self.buffers = [self.floats, *([self.bytes, self.scale, self.total] if packed.dot else [])]

    def clear(self) -> Stmt:
        """What is padded is zero, and stays it."""
        zero = tirx.const(0, "int8")
        bytes_ = [loop(self.rows * self.padded, lambda i: BufferStore(self.bytes, zero, [i]))] if self.dot else []
        return sequence(loop(self.rows * self.padded, lambda i: BufferStore(self.floats, ZERO, [i])), *bytes_)

    def load(self, row: Expr, count: Expr, read: Callable[[Expr], Expr]) -> Stmt:
        """Take so many elements of a row, and round them."""
        start = row * self.padded
        if not self.dot:
            return elements(count, self.lanes, lambda j: BufferStore(self.floats, read(j), [start + j]))
        most, total = (tirx.decl_buffer([index(self.lanes)], "int32", name) for name in ("most", "sum"))
        inverse = buffer("inverse", 1)

        def lane(j: Expr) -> Expr:
            return tirx.floormod(j, index(self.lanes))

        def take(j: Expr) -> Stmt:
            # Magnitudes as whole numbers: what is no number is the largest.
            magnitude = tirx.bitwise_and(tirx.reinterpret("int32", self.floats[start + j]), tirx.const(_MAGNITUDE))
            return sequence(
                BufferStore(self.floats, read(j), [start + j]),
                BufferStore(most, tirx.max(most[lane(j)], magnitude), [lane(j)]),
            )

        def rounded(j: Expr) -> Stmt:
            moved = self.floats[start + j] * inverse[0] + tirx.const(_ROUND, "float32")
            number = tirx.reinterpret("int32", moved)
            return sequence(
                BufferStore(self.bytes, number.astype("int8"), [start + j]),
                BufferStore(total, total[lane(j)] + (number - tirx.const(_ROUND_BITS)), [lane(j)]),
            )

        def clear(one: Var) -> Stmt:
            return vector(self.lanes, lambda i: BufferStore(one, tirx.const(0), [i]))

        largest = tirx.reinterpret("float32", most[0])
        body = sequence(
            clear(most),
            elements(count, self.lanes, take),
            across(most, self.lanes, tirx.max),
            BufferStore(inverse, Select(largest > ZERO, tirx.const(_MOST, "float32") / largest, ZERO), [0]),
            BufferStore(self.scale, largest * tirx.const(1 / _MOST, "float32"), [row]),
            clear(total),
            elements(count, self.lanes, rounded),
            across(total, self.lanes, lambda a, b: a + b),
            BufferStore(self.total, total[0].astype("float32"), [row]),
        )
        return scope("rounded", body, [most, total, inverse])

    def multiply(
        self,
        words: Sequence[Var],
        at: Callable[[Expr], list[Expr]],
        blocks: Expr,
        groups: int,
        registers: int,
        store: Callable[..., list[Stmt]],
    ) -> Stmt:
        """The product of all rows with all groups of sixteen rows of some blocks, summed over these.

        Parameters
        ----------
        words : sequence of Var
            One for each of `digits`.
        at : callable
            Gives the place of the n-th block.
        blocks : Expr
            How many.
        groups : int
        registers : int
            Of the vector unit.
        store : callable (row, start, lanes, value) -> statements
            Takes ``lanes`` float sums of a row of floats, from row ``start`` of the block on.
        """
        lanes = self.dot.lanes if self.dot else self.lanes
        # Sums beside each other hide the latency of adding to one; more than half of the registers would spill.
        at_once = max(1, registers // 2 * lanes // (LANES * self.rows))
        dtype = "int32" if self.dot else "float32"

        def together(part: range) -> Stmt:
            places = [(row, group, n) for row in range(self.rows) for group in part for n in range(0, LANES, lanes)]
            sums = [(tirx.decl_buffer([index(lanes)], dtype, f"acc{n}"), *place) for n, place in enumerate(places)]
            zero = T.Broadcast(tirx.const(0, dtype), lanes)
            body = [BufferStore(acc, zero, [Ramp(0, 1, lanes)]) for acc, *_ in sums]
            for fields, array in zip(self.fields, words, strict=True):
                if fields.first:
                    more = T.Broadcast(tirx.const(3**fields.count, dtype), lanes)
                    body += [BufferStore(acc, _load(acc, lanes) * more, [Ramp(0, 1, lanes)]) for acc, *_ in sums]
                body.append(self._add(sums, lanes, fields, array, at, blocks))
            for acc, row, group, n in sums:
                body += store(row, group * LANES + n, lanes, self._finished(acc, lanes, row))
            return scope("products", sequence(body), [acc for acc, *_ in sums])

        return sequence([together(range(n, min(n + at_once, groups))) for n in range(0, groups, at_once)])

    def _add(
        self,
        sums: list[tuple[Var, int, int, int]],
        lanes: int,
        fields: Digits,
        array: Var,
        at: Callable[[Expr], list[Expr]],
        blocks: Expr,
    ) -> Stmt:
        """Add the products with one of the arrays of words."""
        step = self._bytes if self.dot else self._numbers

        def word(block: Expr, w: Expr) -> Stmt:
            first = block * self.terms + w * fields.terms
            ahead = [[*at(block + 1), index(group), w, 0] for group in dict.fromkeys(group for _, _, group, _ in sums)]
            return sequence(
                # A block is a page or less, and what a CPU reads ahead by itself ends with a page.
                [prefetch(T.address_of(array[tuple(place)])) for place in ahead],
                [
                    step(
                        acc,
                        lanes,
                        fields,
                        array.vload([*at(block), index(group), w, n], f"uint32x{lanes}"),
                        row * self.padded + first,
                    )
                    for acc, row, group, n in sums
                ],
            )

        count = -(-self.terms // fields.terms)
        return loop(blocks, lambda block: loop(count, lambda w: word(block, w), name="word"), name="block")

    def _finished(self, acc: Var, lanes: int, row: int) -> Expr:
        total = _load(acc, lanes)
        if not self.dot:
            return total
        away = tirx.const(self.largest, "float32") * self.total[row]
        return (T.Cast(f"float32x{lanes}", total) - T.Broadcast(away, lanes)) * T.Broadcast(self.scale[row], lanes)

    def _bytes(self, acc: Var, lanes: int, fields: Digits, words: Expr, first: Expr) -> Stmt:
        """One word of each lane: its fields are bytes once they are shifted down."""
        assert self.dot is not None
        total = _load(acc, lanes)
        mask = 0x01010101 * (2**fields.bits - 1)
        for j in range(fields.terms // 4):
            bytes_ = T.reinterpret(field(words, fields.bits * j, mask, lanes), dtype=f"uint8x{4 * lanes}")
            total = self.dot.add(total, bytes_, four_bytes(self.bytes, first + 4 * j, lanes))
        return BufferStore(acc, total, [Ramp(0, 1, lanes)])

    def _numbers(self, acc: Var, lanes: int, fields: Digits, words: Expr, first: Expr) -> Stmt:
        total = _load(acc, lanes)
        for term in range(fields.terms):
            shift = 8 * (term % 4) + fields.bits * (term // 4)
            number = T.reinterpret(field(words, shift, 2**fields.bits - 1, lanes), dtype=f"int32x{lanes}")
            number = number - T.Broadcast(T.int32(fields.offset), lanes)
            x = self.floats[first + term]
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
        self.asked = _Multiplied("q", self.rows, shape.size, 1, self.lanes, packed, packed.key_planes)
        self.weights = _Multiplied("p", self.rows, BLOCK, SPAN, self.lanes, packed, packed.value_planes)
        self.scores = buffer("scores", self.rows, SPAN * BLOCK)

    def write(self) -> Stmt:
        """All keys for these rows."""
        body = sequence(self.asked.clear(), self.weights.clear(), super().write())
        return scope("packed", body, [*self.asked.buffers, *self.weights.buffers])

    def _over_keys(self, block: Callable[[Expr, Expr], Stmt]) -> Stmt:
        full = self.cache.full[self.batch].astype("int64")
        recent = self.cache.recent[self.batch].astype("int64")
        count = tirx.floordiv(recent + (KEYS - 1), index(KEYS))
        tail = loop(count, lambda n: block(n * KEYS, tirx.min(index(KEYS), recent - n * KEYS)), name="block")
        spans = tirx.floordiv(full + (SPAN - 1), index(SPAN))

        def span(n: Expr) -> Stmt:
            return self._span(n * SPAN, tirx.min(index(SPAN), full - n * SPAN))

        return sequence(loop(spans, span, name="span"), tail)

    def _masked(self, row: int, key: Expr, score: Expr) -> Expr:
        """The last tokens are those that ask: none sees one behind it."""
        _, query = self._at(row)
        recent = self.cache.recent[self.batch].astype("int64")
        seen = key <= recent - self.on.queries + query
        return Select(seen, score, tirx.const(float("-inf"), "float32"))

    def _span(self, first: Expr, count: Expr) -> Stmt:
        """Some blocks: scores one by one, then weights and values of all."""
        tokens = count * BLOCK
        value_groups = -(-self.shape.value_size // LANES)

        def weigh(row: Expr) -> Stmt:
            # The scales of the blocks lie one behind the other, so the token's number may go beyond its block.
            scale = self.cache.value_scale
            return self.weights.load(row, tokens, lambda j: self.scores[row, j] * scale[self.batch, self.kv, first, j])

        return sequence(
            loop(count, lambda n: self._scores_of(first + n, n * BLOCK), name="block"),
            loop(self.rows, lambda row: self._softmax(row, tokens), name="row"),
            loop(self.rows, weigh, name="row"),
            self.weights.multiply(
                self.cache.values,
                lambda n: [self.batch, self.kv, first + n],
                count,
                value_groups,
                self.on.simd.registers,
                self._add_values,
            ),
        )

    def _scores_of(self, block: Expr, place: Expr) -> Stmt:
        at = [self.batch, self.kv, block]

        def ask(row: Expr) -> Stmt:
            scale = self.cache.key_scale
            return self.asked.load(row, index(self.shape.size), lambda d: self.q[row, d] * scale[(*at, d)])

        def store(row: int, start: int, lanes: int, value: Expr) -> list[Stmt]:
            return [BufferStore(self.scores, value, [row, Ramp(place + start, 1, lanes)])]

        return sequence(
            loop(self.rows, ask, name="row"),
            self.asked.multiply(
                self.cache.keys,
                lambda n: [self.batch, self.kv, block + n],
                index(1),
                BLOCK // LANES,
                self.on.simd.registers,
                store,
            ),
        )

    def _add_values(self, row: int, start: int, lanes: int, value: Expr) -> list[Stmt]:
        fade, room = self.state["fade"][row], self.shape.value_size - start
        if room >= lanes:
            old = self.o.vload([row, start], f"float32x{lanes}")
            return [BufferStore(self.o, old * T.Broadcast(fade, lanes) + value, [row, Ramp(start, 1, lanes)])]
        if room <= 0:
            return []
        spare = buffer("spare", lanes)
        keep = [BufferStore(self.o, self.o[row, start + i] * fade + spare[i], [row, start + i]) for i in range(room)]
        return [scope("ragged", sequence(BufferStore(spare, value, [Ramp(0, 1, lanes)]), keep), [spare])]


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
