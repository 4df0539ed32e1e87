"""What a mask of queries and keys does to a block of keys, for each tile of queries: hide all of it, none, or some.

That is found before all tiles, since heads share most masks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import BufferStore, IfThenElse, Select, Stmt, Var

from tvm_ternary.schedule.cpu.attention.operands import (
    HIDDEN,
    KEYS,
    NOTHING,
    ZERO,
    Operands,
    across,
    buffer,
    tiles,
)
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space, strips, vector
from tvm_ternary.schedule.cpu.vector_math import INFINITY_BITS

_ALL = tirx.const(-1, "int64")
_NONE = tirx.const(0, "int64")
_STEP = 16


@dataclass(frozen=True)
class Tile:
    """One batch and head, and the queries ``first .. first + width`` of it, the last of them repeated at the end."""

    batch: Expr
    head: Expr
    first: Expr
    vectors: int


class Extremes(ABC):
    """What is found of a mask for tiles of ``width`` queries."""

    def __init__(self, on: Operands, width: int) -> None:
        self.on, self.width, self.by_query = on, width, "m" in on.shape.mask
        extents = {"b": on.batch, "h": index(on.shape.heads), "m": tiles(on.queries, width)}
        self.extents = [extents[axis] if axis in on.shape.mask else index(1) for axis in "bhm"]

    @property
    @abstractmethod
    def buffers(self) -> Sequence[Var]:
        """Where it is."""

    @abstractmethod
    def find(self) -> Stmt:
        """Read all of the mask."""

    @abstractmethod
    def plain(self, tile: Tile, first: Expr) -> Expr:
        """Whether it adds nothing to the scores of a tile in the block that begins with key ``first``."""

    @abstractmethod
    def hides(self, tile: Tile, first: Expr) -> Expr:
        """Whether it hides that block from all queries that have seen something else."""

    def _place(self, tile: Tile) -> list[Expr]:
        at = {"b": tile.batch, "h": tile.head, "m": tirx.floordiv(tile.first, index(self.width))}
        return [at[axis] if axis in self.on.shape.mask else index(0) for axis in "bhm"]

    def _rows(self, tile: Expr) -> Expr:
        """Queries of the n-th tile that the mask tells apart."""
        return tirx.min(index(self.width), self.on.queries - tile * self.width) if self.by_query else index(1)


def _infinity_for_nan(x: Expr) -> Expr:
    """Comparisons lose a NaN; with infinity in its place a block is neither plain nor hidden, and is computed with."""
    bits = tirx.bitwise_and(tirx.reinterpret("int32", x), tirx.const(0x7FFFFFFF, "int32"))
    return Select(bits > tirx.const(INFINITY_BITS, "int32"), tirx.const(float("inf"), "float32"), x)


class Added(Extremes):
    """The least and the most that is added in a block."""

    @property
    def by_key(self) -> bool:
        return "s" in self.on.shape.mask

    @cached_property
    def found(self) -> Var:
        blocks = tiles(self.on.keys, KEYS) if self.by_key else index(1)
        return tirx.decl_buffer([*self.extents, blocks, index(2)], "float32", "extremes")

    @property
    def buffers(self) -> Sequence[Var]:
        return [self.found]

    def find(self) -> Stmt:
        return space(self.found.shape[:-1], (self.width if self.by_query else 1) * KEYS // 4, self._look)

    def plain(self, tile: Tile, first: Expr) -> Expr:
        return tirx.all(*(tirx.EQ(extreme, ZERO) for extreme in self._of(tile, first)))

    def hides(self, tile: Tile, first: Expr) -> Expr:
        _, most = self._of(tile, first)
        return most <= tirx.const(HIDDEN, "float32")

    def _of(self, tile: Tile, first: Expr) -> tuple[Expr, Expr]:
        block = tirx.floordiv(first, index(KEYS)) if self.by_key else index(0)
        at = [*self._place(tile), block]
        return self.found[(*at, 0)], self.found[(*at, 1)]

    def _look(self, at: list[Expr]) -> Stmt:
        on, lanes = self.on, self.on.lanes
        batch, head, tile, block = at
        least, most = buffer("least", lanes), buffer("most", lanes)
        first = block * KEYS
        count = tirx.min(index(KEYS), on.keys - first) if self.by_key else index(1)

        def row(n: Expr) -> Stmt:
            def strip(base: Expr, width: int, _stale: Expr | None) -> Stmt:
                def one(lane: Expr) -> Stmt:
                    item = _infinity_for_nan(on.mask_at(batch, head, tile * self.width + n, first + base + lane))
                    return sequence(
                        BufferStore(least, tirx.min(least[lane], item), [lane]),
                        BufferStore(most, tirx.max(most[lane], item), [lane]),
                    )

                return vector(width, one)

            return sequence(strips(count, lanes, strip))

        infinity = tirx.const(float("inf"), "float32")
        start = [
            vector(lanes, lambda lane: BufferStore(least, infinity, [lane])),
            vector(lanes, lambda lane: BufferStore(most, NOTHING, [lane])),
        ]
        folds = [across(least, lanes, tirx.min), across(most, lanes, tirx.max)]
        keep = [BufferStore(self.found, one[0], [*at, index(n)]) for n, one in enumerate((least, most))]
        rows = loop(self._rows(tile), row, name="query")
        return scope("look", sequence(start, rows, *folds, keep), [least, most])


class Bits(Extremes):
    """Of words of bits: those that are set for some queries of a tile, for all, and whether each query sees a key."""

    @cached_property
    def buffers(self) -> Sequence[Var]:
        words = [*self.extents, self.on.words]
        return [
            tirx.decl_buffer(words, "int64", "some"),
            tirx.decl_buffer(words, "int64", "every"),
            tirx.decl_buffer(self.extents, "int64", "sees"),
        ]

    def find(self) -> Stmt:
        return space(self.extents, self.on.words * (self.width if self.by_query else 1), self._look)

    def plain(self, tile: Tile, first: Expr) -> Expr:
        return tirx.EQ(self.buffers[1][(*self._place(tile), tirx.floordiv(first, index(KEYS)))], _ALL)

    def hides(self, tile: Tile, first: Expr) -> Expr:
        return tirx.EQ(self.buffers[0][(*self._place(tile), tirx.floordiv(first, index(KEYS)))], _NONE)

    def reach(self, tile: Tile, first: Expr) -> Expr:
        """How many keys of that block, in steps of `_STEP`, some query sees or has one behind them that it sees."""
        word = self.buffers[0][(*self._place(tile), tirx.floordiv(first, index(KEYS)))]
        steps = [tirx.NE(tirx.shift_right(word, index(bit)), _NONE) for bit in range(_STEP, KEYS, _STEP)]
        return index(_STEP) + sum((step.astype("int64") * _STEP for step in steps), index(0))

    def sees(self, tile: Tile) -> Expr:
        """Whether every query of a tile sees a key."""
        return tirx.NE(self.buffers[2][tuple(self._place(tile))], _NONE)

    def _look(self, at: list[Expr]) -> Stmt:
        on, lanes = self.on, self.on.simd.lanes("int64")
        some, every, sees = self.buffers
        seen = tirx.decl_buffer([index(lanes)], "int64", "seen")

        def fill(width: int, base: Expr) -> Stmt:
            return vector(
                width,
                lambda lane: sequence(
                    BufferStore(some, _NONE, [*at, base + lane]), BufferStore(every, _ALL, [*at, base + lane])
                ),
            )

        def row(n: Expr) -> Stmt:
            def strip(base: Expr, width: int, _stale: Expr | None) -> Stmt:
                def one(lane: Expr) -> Stmt:
                    place = [*at, base + lane]
                    word = on.mask_at(at[0], at[1], at[2] * self.width + n, base + lane)
                    return sequence(
                        BufferStore(some, tirx.bitwise_or(some[tuple(place)], word), place),
                        BufferStore(every, tirx.bitwise_and(every[tuple(place)], word), place),
                        BufferStore(seen, tirx.bitwise_or(seen[lane], word), [lane]),
                    )

                return vector(width, one)

            return sequence(
                vector(lanes, lambda lane: BufferStore(seen, _NONE, [lane])),
                strips(on.words, lanes, strip),
                across(seen, lanes, tirx.bitwise_or),
                BufferStore(sees, Select(tirx.EQ(seen[0], _NONE), _NONE, sees[tuple(at)]), at),
            )

        body = sequence(
            strips(on.words, lanes, lambda base, width, _: fill(width, base)),
            BufferStore(sees, _ALL, at),
            loop(self._rows(at[2]), row, name="query"),
            self._pad([*at, on.words - 1]),
        )
        return scope("look", body, [seen])

    def _pad(self, last: list[Expr]) -> Stmt:
        """What is behind the last key hides nothing."""
        every, rest = self.buffers[1], tirx.floormod(self.on.keys, index(KEYS))
        word = tirx.bitwise_or(every[tuple(last)], tirx.shift_left(_ALL, rest))
        return IfThenElse(rest > 0, BufferStore(every, word, last), None)


def extremes_of(on: Operands, width: int) -> Extremes | None:
    """What to find of a mask for tiles of so many queries; nothing where it is alike for all of them and all keys."""
    if on.shape.hidden is not None:
        return Bits(on, width)
    return Added(on, width) if set("ms") & set(on.shape.mask) else None
