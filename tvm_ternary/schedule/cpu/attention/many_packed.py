"""Prefill with ternary keys: many queries over packed blocks of keys, then the last keys in float. Values are float.

A lane is a query. For each block its keys' scales are multiplied into the queries of the tile, which become bytes by
one scale a query and block, four neighbouring elements of a head in a lane. The block's numbers are unpacked once a
tile, a byte each, and four of a key are multiplied with all queries by one byte dot product for each vector of them.
Keys that fill no block are no part of it: they are given in float, as a cache keeps its last tokens, and their scores
are those of `Many`.

Vector operations for a block of 64 keys, a tile of 32 queries and heads of 128, sixteen lanes:

=====================  ======  =======================================================================
byte dot products       4,096  64 keys x 32 words of four elements x 2; floats: 16,384 multiply-adds
rounding the queries    1,900  256 x (3 multiplications and additions, 2 for the maximum, 2.5 to merge)
unpacking                 400  128 x (shift, and, store)
softmax                 2,600  128 x (17 for exp and its sum, 3 for a score and the maximum)
values                 16,384  64 keys x 128 x 2 multiply-adds
=====================  ======  =======================================================================

With two multiply-adds or dot products a cycle and four operations in all, that is 8,192 cycles for values, 2,048 for
dot products and at least 1,200 for the rest: 0.68 of the 17,000 that floats take at least, and with keys that cost
nothing it would be 0.52.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, Ramp, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.ternary_keys import BLOCK, digits
from tvm_ternary.schedule.cpu.attention.many import Extremes, Many, Tile
from tvm_ternary.schedule.cpu.attention.operands import KEYS, Operands, buffer, place, tiles
from tvm_ternary.schedule.cpu.attention.packed import Cache
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, static
from tvm_ternary.schedule.intrinsics import ByteDot
from tvm_ternary.schedule.intrinsics.common import field

_MOST = 127.0
_LARGEST_FLOAT = 3.4028234663852886e38
# Added to a number of at most 2^22 it leaves the nearest integer in the low bits.
_ROUND = 12582912.0


@dataclass(frozen=True)
class PackedOperands(Operands):
    """Keys apart: ``packed`` blocks of them, and behind those ``latest`` in float."""

    packed: Expr
    latest: Expr

    @cached_property
    def k(self) -> Var:
        return self._operand("k", self.shape.key, self.shape.kv_heads, self.latest, self.shape.size)

    def key_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.k[tuple(place(self.shape.key, batch, kv, key - self.packed * BLOCK, d))]


class ManyPacked(Many):
    """A tile of queries over packed blocks, then over the last keys."""

    def __init__(self, on: PackedOperands, cache: Cache, dot: ByteDot, tile: Tile, extremes: Extremes | None) -> None:
        super().__init__(on, tile, extremes)
        self.packed_on, self.cache, self.dot = on, cache, dot
        self.fields = digits(cache.packed.key_planes)
        self.offset = sum(part.weight * part.offset for part in self.fields)
        self.words = -(-self.shape.size // 4)
        self.key_rows = min(self.rows, LANES)

        def whole(name: str, *extents: int) -> Var:
            return tirx.decl_buffer([index(extent) for extent in extents], "int32", name)

        self.asked = whole("asked", self.words, self.width)
        self.codes = tirx.decl_buffer([index(BLOCK // LANES), index(self.words), index(LANES)], "uint32", "codes")
        self.away, self.most = whole("away", self.width), whole("most", self.width)
        self.step, self.inverse = buffer("step", self.width), buffer("inverse", self.width)

    def write(self) -> Stmt:
        """All keys for this tile."""
        own = [self.asked, self.codes, self.away, self.most, self.step, self.inverse]
        return scope("packed", super().write(), own)

    def _over_keys(self) -> Stmt:
        blocks, latest = self.packed_on.packed, self.packed_on.latest

        def packed(n: Expr) -> Stmt:
            return self._packed_block(n)

        def last(n: Expr) -> Stmt:
            return self._float_block(self.on, blocks * BLOCK + n * KEYS, tirx.min(index(KEYS), latest - n * KEYS))

        return sequence(
            loop(blocks, packed, name="packed"),
            [] if static(latest) == 0 else loop(tiles(latest, KEYS), last, name="block"),
        )

    def _packed_block(self, block: Expr) -> Stmt:
        scores = sequence(self._start_peak(), self._packed_scores(block))
        return self._block(self.on, block * BLOCK, index(BLOCK), scores)

    def _packed_scores(self, block: Expr) -> Stmt:
        number = BLOCK // self.key_rows
        return sequence(
            self._round(block),
            self._unpack(block),
            loop(number, lambda n: self._products(block * BLOCK, n * self.key_rows), name="tile"),
        )

    def _round(self, block: Expr) -> Stmt:
        """The queries times the block's scales as bytes, what a byte stands for, and what their offsets add up to."""
        q, most, size = self.buffers["q"], self.most, self.shape.size

        def scaled(d: Expr, c: Expr) -> Expr:
            return q[d, c] * self.cache.key_scale[self.tile.batch, self.kv, block, d]

        def magnitude(d: Expr, c: Expr) -> Stmt:
            # As whole numbers, floats without a sign are in order, and what is not finite is above all others.
            bits = tirx.bitwise_and(tirx.reinterpret("int32", scaled(d, c)), tirx.const(0x7FFFFFFF, "int32"))
            return BufferStore(most, tirx.max(most[c], bits), [c])

        def scales(c: Expr) -> Stmt:
            largest = tirx.reinterpret("float32", most[c])
            bounded = tirx.min(tirx.const(_MOST, "float32") / largest, tirx.const(_LARGEST_FLOAT, "float32"))
            return sequence(
                BufferStore(self.step, largest * tirx.const(1 / _MOST, "float32"), [c]),
                BufferStore(self.inverse, bounded, [c]),
            )

        def merge(word: Expr, count: int) -> Stmt:
            def write(c: Expr) -> Stmt:
                merged: Expr | None = None
                for i in range(count):
                    x = scaled(word * 4 + i, c) * self.inverse[c] + tirx.const(_ROUND, "float32")
                    byte = tirx.bitwise_and(tirx.reinterpret("int32", x), tirx.const(0xFF, "int32"))
                    byte = tirx.shift_left(byte, tirx.const(8 * i, "int32")) if i else byte
                    merged = byte if merged is None else tirx.bitwise_or(merged, byte)
                return BufferStore(self.asked, merged, [word, c])

            return sequence(self._fill(write), self._add_offsets(word))

        zero = tirx.const(0, "int32")
        whole, rest = divmod(size, 4)
        return sequence(
            self._fill(lambda c: BufferStore(most, zero, [c])),
            loop(size, lambda d: self._fill(lambda c: magnitude(d, c)), name="d"),
            self._fill(scales),
            self._fill(lambda c: BufferStore(self.away, zero, [c])),
            loop(whole, lambda word: merge(word, 4), name="word") if whole else [],
            merge(index(whole), rest) if rest else [],
        )

    def _add_offsets(self, word: Expr) -> Stmt:
        """Numbers are multiplied with an offset that makes none negative; here it is by itself."""
        lanes = self.dot.lanes
        offsets = T.Broadcast(tirx.const(self.offset, "uint8"), 4 * lanes)

        def part(at: int) -> Stmt:
            total = self.away.vload([at], f"int32x{lanes}")
            return BufferStore(self.away, self.dot.add(total, offsets, self._bytes(word, at)), [Ramp(at, 1, lanes)])

        return sequence([part(at) for at in range(0, self.width, lanes)])

    def _bytes(self, word: Expr, at: int) -> Expr:
        lanes = self.dot.lanes
        return T.reinterpret(self.asked.vload([word, at], f"int32x{lanes}"), dtype=f"int8x{4 * lanes}")

    def _unpack(self, block: Expr) -> Stmt:
        """A byte for each number of the block, offset included; four elements of a key are a word."""
        four = max(part.terms for part in self.fields) // 4

        def one(group: Expr, base: Expr, within: int) -> Stmt:
            total: Expr | None = None
            for part, array in zip(self.fields, self.cache.keys, strict=True):
                fields = part.terms // 4
                at = [self.tile.batch, self.kv, block, group, base * (four // fields) + within // fields, 0]
                mask = 0x01010101 * (2**part.bits - 1)
                value = field(array.vload(at, f"uint32x{LANES}"), part.bits * (within % fields), mask, LANES)
                if part.weight > 1:
                    value = value * T.Broadcast(T.uint32(part.weight), LANES)
                total = value if total is None else total + value
            return BufferStore(self.codes, total, [group, base * four + within, Ramp(0, 1, LANES)])

        def words(group: Expr, base: Expr, count: int) -> Stmt:
            return sequence([one(group, base, within) for within in range(count)])

        whole, rest = divmod(self.words, four)

        def rows(group: Expr) -> Stmt:
            return sequence(
                loop(whole, lambda base: words(group, base, four), name="word") if whole else [],
                words(group, index(whole), rest) if rest else [],
            )

        return loop(BLOCK // LANES, rows, name="group")

    def _products(self, first: Expr, key: Expr) -> Stmt:
        """The scores of a register tile of keys, from ``key`` of the block on."""
        lanes = self.dot.lanes
        sums = [tirx.decl_buffer([index(self.width)], "int32", f"sum{row}") for row in range(self.key_rows)]
        group, within = tirx.floordiv(key, index(LANES)), tirx.floormod(key, index(LANES))

        def step(word: Expr) -> Stmt:
            def one(acc: Var, row: int, at: int) -> Stmt:
                codes = T.Broadcast(self.codes[group, word, within + row], lanes)
                bytes_ = T.reinterpret(codes, dtype=f"uint8x{4 * lanes}")
                total = acc.vload([at], f"int32x{lanes}")
                return BufferStore(acc, self.dot.add(total, bytes_, self._bytes(word, at)), [Ramp(at, 1, lanes)])

            places = range(0, self.width, lanes)
            return sequence([one(acc, row, at) for row, acc in enumerate(sums) for at in places])

        def start(acc: Var) -> Stmt:
            return self._fill(lambda c: BufferStore(acc, tirx.const(0, "int32") - self.away[c], [c]))

        def score(row: int, c: Expr) -> Expr:
            return sums[row][c].astype("float32") * self.step[c]

        starts = [start(acc) for acc in sums]
        ends = self._keep(first, [key + row for row in range(self.key_rows)], index(BLOCK), score)
        return scope("products", sequence(starts, loop(self.words, step, name="word"), ends), sums)
