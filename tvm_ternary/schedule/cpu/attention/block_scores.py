"""Scores of a tile of queries over a packed block of keys: products of whole numbers.

A lane is a query. For each block its keys' scales are multiplied into the queries of the tile, and these are rounded,
by one scale a query and block: here to bytes, in `trit_scores` to trits. Four neighbouring elements of a head are a
lane, multiplied by byte dot products with the block's numbers, which are unpacked once a tile: all of them, while only
those of keys that `Many.reach` counts are multiplied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, Ramp, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.ternary_keys import BLOCK, digits
from tvm_ternary.schedule.cpu.attention.many import Many
from tvm_ternary.schedule.cpu.attention.operands import buffer, tiles
from tvm_ternary.schedule.cpu.attention.packed import Cache
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence
from tvm_ternary.schedule.intrinsics import ByteDot
from tvm_ternary.schedule.intrinsics.common import field

_MOST = 127.0
LARGEST_FLOAT = 3.4028234663852886e38
# Added to a number of at most 2^22 it leaves the nearest integer in the low bits.
_ROUND = 12582912.0


class BlockScores(ABC):
    """The scores of the queries of ``many``."""

    key_rows: int
    """Keys of a register tile."""

    def __init__(self, many: Many, cache: Cache) -> None:
        self.many, self.cache, self.shape, self.width = many, cache, many.shape, many.width
        self.step = buffer("step", self.width)

    @property
    @abstractmethod
    def buffers(self) -> Sequence[Var]:
        """What it needs for a tile."""

    def write(self, block: Expr) -> Stmt:
        """Keep the scores of a block."""
        number = tiles(self.many.reach(index(BLOCK)), self.key_rows)
        return sequence(
            self._round(block),
            self._unpack(block),
            loop(number, lambda n: self._products(block * BLOCK, n * self.key_rows), name="tile"),
        )

    @abstractmethod
    def _round(self, block: Expr) -> Stmt:
        """The queries times the block's scales as whole numbers, and what one stands for."""

    @abstractmethod
    def _unpack(self, block: Expr) -> Stmt:
        """The block's numbers as they are multiplied."""

    @abstractmethod
    def _products(self, first: Expr, key: Expr) -> Stmt:
        """The scores of a register tile of keys, from ``key`` of the block on."""

    def _at(self, block: Expr) -> list[Expr]:
        return [self.many.tile.batch, self.many.kv, block]

    def scaled(self, block: Expr, d: Expr, c: Expr) -> Expr:
        return self.many.buffers["q"][d, c] * self.cache.key_scale[(*self._at(block), d)]


def _whole(name: str, *extents: int) -> Var:
    return tirx.decl_buffer([index(extent) for extent in extents], "int32", name)


class ByteScores(BlockScores):
    """Queries become bytes."""

    def __init__(self, many: Many, cache: Cache, dot: ByteDot) -> None:
        super().__init__(many, cache)
        self.dot, self.fields = dot, digits(cache.packed.key_planes)
        self.offset = sum(part.weight * part.offset for part in self.fields)
        self.words, self.key_rows = -(-self.shape.size // 4), min(many.rows, LANES)
        self.asked = _whole("asked", self.words, self.width)
        self.codes = tirx.decl_buffer([index(BLOCK // LANES), index(self.words), index(LANES)], "uint32", "codes")
        self.away, self.most = _whole("away", self.width), _whole("most", self.width)
        self.inverse = buffer("inverse", self.width)

    @property
    def buffers(self) -> Sequence[Var]:
        """What it needs for a tile."""
        return [self.asked, self.codes, self.away, self.most, self.step, self.inverse]

    def _round(self, block: Expr) -> Stmt:
        most, zero = self.most, tirx.const(0, "int32")

        def magnitude(d: Expr, c: Expr) -> Stmt:
            # As whole numbers, floats without a sign are in order, and what is not finite is above all others.
            bits = tirx.reinterpret("int32", self.scaled(block, d, c))
            return BufferStore(most, tirx.max(most[c], tirx.bitwise_and(bits, tirx.const(0x7FFFFFFF, "int32"))), [c])

        def scales(c: Expr) -> Stmt:
            largest = tirx.reinterpret("float32", most[c])
            bounded = tirx.min(tirx.const(_MOST, "float32") / largest, tirx.const(LARGEST_FLOAT, "float32"))
            return sequence(
                BufferStore(self.step, largest * tirx.const(1 / _MOST, "float32"), [c]),
                BufferStore(self.inverse, bounded, [c]),
            )

        fill = self.many._fill
        return sequence(
            fill(lambda c: BufferStore(most, zero, [c])),
            loop(self.shape.size, lambda d: fill(lambda c: magnitude(d, c)), name="d"),
            fill(scales),
            self._merge(block),
        )

    def _number(self, block: Expr, d: Expr, c: Expr) -> Expr:
        """What an element of a query is rounded to, in the low byte."""
        x = self.scaled(block, d, c) * self.inverse[c] + tirx.const(_ROUND, "float32")
        return tirx.reinterpret("int32", x)

    def _merge(self, block: Expr) -> Stmt:
        """Bytes of queries, four in a word, and what their offsets add up to."""

        def merge(word: Expr, count: int) -> Stmt:
            def write(c: Expr) -> Stmt:
                merged: Expr | None = None
                for i in range(count):
                    byte = tirx.bitwise_and(self._number(block, word * 4 + i, c), tirx.const(0xFF, "int32"))
                    byte = tirx.shift_left(byte, tirx.const(8 * i, "int32")) if i else byte
                    merged = byte if merged is None else tirx.bitwise_or(merged, byte)
                return BufferStore(self.asked, merged, [word, c])

            return sequence(self.many._fill(write), self._add_offsets(word))

        whole, rest = divmod(self.shape.size, 4)
        return sequence(
            self.many._fill(lambda c: BufferStore(self.away, tirx.const(0, "int32"), [c])),
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
        # A byte for each number, offset included; four elements of a key are a word.
        four = max(part.terms for part in self.fields) // 4

        def one(group: Expr, base: Expr, within: int) -> Stmt:
            total: Expr | None = None
            for part, array in zip(self.fields, self.cache.keys, strict=True):
                fields = part.terms // 4
                at = [*self._at(block), group, base * (four // fields) + within // fields, 0]
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
            return self.many._fill(lambda c: BufferStore(acc, tirx.const(0, "int32") - self.away[c], [c]))

        def score(row: int, c: Expr) -> Expr:
            return sums[row][c].astype("float32") * self.step[c]

        starts = [start(acc) for acc in sums]
        ends = self.many._keep(first, [key + row for row in range(self.key_rows)], index(BLOCK), score)
        return scope("products", sequence(starts, loop(self.words, step, name="word"), ends), sums)
