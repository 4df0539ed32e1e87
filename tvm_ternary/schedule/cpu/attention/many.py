"""Many queries: a lane is a query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import BufferStore, IfThenElse, Select, Stmt, Var

from tvm_ternary.schedule.cpu.attention.operands import (
    KEYS,
    NOTHING,
    ZERO,
    Operands,
    across,
    buffer,
    inverse,
    tiles,
    vectors,
    zeros,
)
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, strips, vector

HIDDEN = -1e30
"""Masks from here down hide a key, and scores are above it: any sum of the two is below all other scores."""


@dataclass(frozen=True)
class Tile:
    """One batch and head, and the queries ``first .. first + width`` of it, the last of them repeated at the end."""

    batch: Expr
    head: Expr
    first: Expr
    vectors: int


class Many:
    """A tile of queries, transposed: element by query, so that what is read along the lanes is contiguous."""

    def __init__(self, on: Operands, tile: Tile) -> None:
        self.on, self.tile, self.shape = on, tile, on.shape
        self.lanes, self.rows = on.lanes, on.rows
        self.width = tile.vectors * on.lanes
        self.kv = tirx.floordiv(tile.head, index(self.shape.group)) if self.shape.group > 1 else tile.head
        shapes = {"q": self.shape.size, "scores": KEYS, "o": self.shape.value_size}
        self.buffers = {name: buffer(name, n, self.width) for name, n in shapes.items()}
        self.state = {name: buffer(name, self.width) for name in ("peak", "total", "block_peak", "fade")}
        self.by_query = "m" in self.shape.mask
        if self.by_query:
            self.buffers["hidden"] = buffer("hidden", KEYS, self.width)

    def write(self) -> Stmt:
        """All keys for this tile."""
        state, o = self.state, self.buffers["o"]
        start = [
            self._fill(lambda c: BufferStore(state["peak"], NOTHING, [c])),
            self._fill(lambda c: BufferStore(state["total"], ZERO, [c])),
            loop(self.shape.value_size, lambda d: self._fill(lambda c: BufferStore(o, ZERO, [d, c])), name="d"),
            self._load_queries(),
        ]
        body = sequence(*start, self.on.blocks(self._block), self._store())
        return scope("tile", body, [*self.buffers.values(), *state.values()])

    def _fill(self, write: Callable[[Expr], Stmt]) -> Stmt:
        """One statement for each vector of the tile; ``write`` gets the column."""
        return vectors(self.width, self.lanes, write)

    def _query(self, column: Expr) -> Expr:
        return tirx.min(self.tile.first + column, self.on.queries - 1)

    def _load_queries(self) -> Stmt:
        scale = tirx.const(self.shape.scale, "float32")

        def one(column: Expr) -> Stmt:
            query = self._query(column)
            return loop(
                self.shape.size,
                lambda d: BufferStore(
                    self.buffers["q"],
                    self.on.query_at(self.tile.batch, self.tile.head, query, d) * scale,
                    [d, column],
                ),
                name="d",
            )

        return loop(self.width, one, name="column")

    def _block(self, first: Expr, count: Expr) -> Stmt:
        work = sequence(self._scores(first, count), self._softmax(count), self._values(first, count))
        if not self.by_query:
            return work
        flags = buffer("flags", 3)
        return scope(
            "masked", sequence(self._look(first, count, flags), self._unless_hidden(flags, first, count, work)), [flags]
        )

    def _look(self, first: Expr, count: Expr, flags: Var) -> Stmt:
        """The largest and the smallest of the block's mask, and the smallest peak so far."""
        most, least, low = (buffer(name, self.lanes) for name in ("most", "least", "low"))
        peak = self.state["peak"]

        def row(column: Expr) -> Stmt:
            def value(key: Expr) -> Expr:
                return self.on.mask_at(self.tile.batch, self.tile.head, self._query(column), first + key)

            def strip(base: Expr, width: int, _stale: Expr | None) -> Stmt:
                def at(lane: Expr) -> Stmt:
                    item = value(base + lane)
                    return sequence(
                        BufferStore(most, tirx.max(most[lane], item), [lane]),
                        BufferStore(least, tirx.min(least[lane], item), [lane]),
                    )

                return vector(width, at)

            return sequence(strips(count, self.lanes, strip))

        start = [
            vector(self.lanes, lambda lane: BufferStore(most, NOTHING, [lane])),
            vector(self.lanes, lambda lane: BufferStore(least, tirx.const(float("inf"), "float32"), [lane])),
            vector(self.lanes, lambda lane: BufferStore(low, peak[lane], [lane])),
        ]

        def lower(at: int) -> Stmt:
            return vector(self.lanes, lambda lane: BufferStore(low, tirx.min(low[lane], peak[lane + at]), [lane]))

        lows = [lower(at) for at in range(self.lanes, self.width, self.lanes)]
        folds = [
            across(most, self.lanes, tirx.max),
            across(least, self.lanes, tirx.min),
            across(low, self.lanes, tirx.min),
        ]
        keep = [BufferStore(flags, one[0], [n]) for n, one in enumerate((most, least, low))]
        return scope(
            "look",
            sequence(start, lows, loop(self.width, row, name="column"), *folds, keep),
            [most, least, low],
        )

    def _unless_hidden(self, flags: Var, first: Expr, count: Expr, work: Stmt) -> Stmt:
        hidden = self.buffers["hidden"]
        zeros = loop(count, lambda j: self._fill(lambda c: BufferStore(hidden, ZERO, [j, c])), name="key")

        def turn(column: Expr) -> Stmt:
            return loop(
                count,
                lambda j: BufferStore(
                    hidden,
                    self.on.mask_at(self.tile.batch, self.tile.head, self._query(column), first + j),
                    [j, column],
                ),
                name="key",
            )

        plain = tirx.all(tirx.EQ(flags[0], ZERO), tirx.EQ(flags[1], ZERO))
        load = IfThenElse(plain, zeros, loop(self.width, turn, name="column"))
        limit = tirx.const(HIDDEN, "float32")
        # A NaN in the mask fails both comparisons of the first kind, and has to be computed with.
        skip = tirx.all(flags[0] <= limit, flags[1] <= limit, flags[2] > limit)
        return IfThenElse(tirx.Not(skip), sequence(load, work), None)

    def _scores(self, first: Expr, count: Expr) -> Stmt:
        scores, q, peak = self.buffers["scores"], self.buffers["q"], self.state["block_peak"]
        number_of_tiles = tiles(count, self.rows)

        def tile(number: Expr) -> Stmt:
            sums = [buffer(f"sum{row}", self.width) for row in range(self.rows)]
            keys = [number * self.rows + row for row in range(self.rows)]

            def step(d: Expr) -> Stmt:
                def one(acc: Var, key: Expr) -> Stmt:
                    k = self.on.key_at(self.tile.batch, self.kv, tirx.min(first + key, self.on.keys - 1), d)
                    return self._fill(lambda c: BufferStore(acc, acc[c] + k * q[d, c], [c]))

                return sequence([one(acc, key) for acc, key in zip(sums, keys, strict=True)])

            def finish(acc: Var, key: Expr) -> Stmt:
                def write(c: Expr) -> Stmt:
                    value = acc[c]
                    if self.by_query:
                        value = value + self.buffers["hidden"][key, c]
                    elif self.shape.mask:
                        seen = tirx.min(first + key, self.on.keys - 1)
                        value = value + self.on.mask_at(self.tile.batch, self.tile.head, index(0), seen)
                    value = Select(key < count, value, NOTHING)
                    return sequence(
                        BufferStore(scores, value, [key, c]), BufferStore(peak, tirx.max(peak[c], value), [c])
                    )

                return self._fill(write)

            ends = [finish(acc, key) for acc, key in zip(sums, keys, strict=True)]
            return scope("scores", sequence(zeros(sums, self.lanes), loop(self.shape.size, step, name="d"), ends), sums)

        start = self._fill(lambda c: BufferStore(peak, self.state["peak"][c], [c]))
        return sequence(start, loop(number_of_tiles, tile, name="tile"))

    def _softmax(self, count: Expr) -> Stmt:
        scores, state = self.buffers["scores"], self.state
        peak, total, new, fade = (state[name] for name in ("peak", "total", "block_peak", "fade"))

        def base(c: Expr) -> Expr:
            # Of a query that has seen no key, exp(-inf - 0) is zero, and exp(-inf + inf) would be NaN.
            return Select(tirx.EQ(new[c], NOTHING), ZERO, new[c])

        def start(c: Expr) -> Stmt:
            return sequence(
                BufferStore(fade, tirx.exp(peak[c] - base(c)), [c]),
                BufferStore(peak, new[c], [c]),
                BufferStore(total, total[c] * fade[c], [c]),
                BufferStore(new, base(c), [c]),
            )

        def one(key: Expr) -> Stmt:
            def write(c: Expr) -> Stmt:
                return sequence(
                    BufferStore(scores, tirx.exp(scores[key, c] - new[c]), [key, c]),
                    BufferStore(total, total[c] + scores[key, c], [c]),
                )

            return self._fill(write)

        return sequence(self._fill(start), loop(count, one, name="key"))

    def _values(self, first: Expr, count: Expr) -> Stmt:
        scores, o, fade = self.buffers["scores"], self.buffers["o"], self.state["fade"]

        def tile(start: Expr, rows: int) -> Stmt:
            sums = [buffer(f"sum{row}", self.width) for row in range(rows)]

            def step(key: Expr) -> Stmt:
                def one(acc: Var, row: int) -> Stmt:
                    v = self.on.value_at(self.tile.batch, self.kv, first + key, start + row)
                    return self._fill(lambda c: BufferStore(acc, acc[c] + v * scores[key, c], [c]))

                return sequence([one(acc, row) for row, acc in enumerate(sums)])

            def load(acc: Var, row: int) -> Stmt:
                return self._fill(lambda c: BufferStore(acc, o[start + row, c] * fade[c], [c]))

            def store(acc: Var, row: int) -> Stmt:
                return self._fill(lambda c: BufferStore(o, acc[c], [start + row, c]))

            loads = [load(acc, row) for row, acc in enumerate(sums)]
            stores = [store(acc, row) for row, acc in enumerate(sums)]
            return scope("values", sequence(loads, loop(count, step, name="key"), stores), sums)

        whole, rest = divmod(self.shape.value_size, self.rows)
        parts = [loop(whole, lambda n: tile(n * self.rows, self.rows), name="tile")] if whole else []
        return sequence([*parts, *([tile(index(whole * self.rows), rest)] if rest else [])])

    def _store(self) -> Stmt:
        o, total = self.buffers["o"], self.state["total"]
        invert = self._fill(lambda c: BufferStore(total, inverse(total[c]), [c]))

        def one(column: Expr) -> Stmt:
            query = self.tile.first + column
            return loop(
                self.shape.value_size,
                lambda d: self.on.store(self.tile.batch, self.tile.head, query, d, o[d, column] * total[column]),
                name="d",
            )

        count = tirx.min(index(self.width), self.on.queries - self.tile.first)
        return sequence(invert, loop(count, one, name="column"))
