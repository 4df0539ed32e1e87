"""Many queries: a lane is a query.

Of a block that a mask of bits cuts, as order cuts those of a tile's own tokens, nothing is computed of the keys behind
the last one that some query of the tile sees, in steps of 16, if what hides them leaves them no weight.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.sym import Analyzer
from tvm.tirx import Bind, BufferStore, IfThenElse, Ramp, Select, Stmt, Var

from tvm_ternary.schedule.cpu.attention.ahead import Ahead
from tvm_ternary.schedule.cpu.attention.masks import Bits, Extremes, Tile, extremes_of
from tvm_ternary.schedule.cpu.attention.operands import (
    HIDDEN,
    KEYS,
    MANY_REGISTERS,
    NOTHING,
    ZERO,
    Operands,
    Source,
    across,
    buffer,
    hide,
    inverse,
    is_nothing,
    place,
    tiles,
    vectors,
    zeros,
)
from tvm_ternary.schedule.cpu.attention.transpose import transposed
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space, static, vector
from tvm_ternary.schedule.cpu.vector_math import exp_to_one

__all__ = ["Extremes", "Many", "Tile", "Wide", "over_tiles"]

Wide = tuple[Callable[[Expr, Expr], Expr], Callable[[Expr, Expr, Expr], Stmt]]
"""How a square of elements is read and kept, see `Many`."""


def over_tiles(on: Operands, vectors: int, work: Expr, write: Callable[[Tile, Extremes | None], Stmt]) -> Stmt:
    """All tiles of so many vectors of queries; ``work`` is that of one of them."""
    width = vectors * on.lanes
    extremes = extremes_of(on, width)
    extents = [on.batch, index(on.shape.heads), tiles(on.queries, width)]
    body = space(extents, work, lambda at: write(Tile(at[0], at[1], at[2] * width, vectors), extremes))
    return body if extremes is None else scope("masks", sequence(extremes.find(), body), extremes.buffers)


_WIDE, _LARGE = 12, 128


class Many:
    """A tile of queries, transposed: element by query, so that what is read along the lanes is contiguous."""

    knows_all = True
    """Whether a mask is of no more keys than there are: then what it hides is known before scores are."""

    reads_keys = True
    """Whether keys and values are read as they lie."""

    def __init__(self, on: Operands, tile: Tile, extremes: Extremes | None) -> None:
        self.on, self.tile, self.shape, self.extremes = on, tile, on.shape, extremes
        self.lanes, self.rows, self.value_rows = on.lanes, on.rows, _value_rows(on)
        self.width = tile.vectors * on.lanes
        self.kv = tirx.floordiv(tile.head, index(self.shape.group)) if self.shape.group > 1 else tile.head
        self.ahead = Ahead(on, tile, self.kv, self.width, self.rows, self.value_rows, keys=self.reads_keys)
        shapes = {"q": self.shape.size, "scores": KEYS, "o": self.shape.value_size}
        self.buffers = {name: buffer(name, n, self.width) for name, n in shapes.items()}
        self.state = {name: buffer(name, self.width) for name in ("peak", "total", "block_peak", "fade")}
        self.by_query = "m" in self.shape.mask
        # A variable, and no element of a buffer: of an extent that is read from memory TVM loses track.
        self.reached = Var("reached", "int64") if self.by_query and isinstance(extremes, Bits) else None
        if self.by_query and self.shape.hidden is not None:
            self.buffers["hidden"] = tirx.decl_buffer([index(KEYS // 32), index(self.width)], "uint32", "hidden")
        elif self.by_query:
            self.buffers["hidden"] = buffer("hidden", KEYS, self.width)
        elif self.shape.hidden is not None:
            self.buffers["hidden"] = buffer("hidden", KEYS)

    def write(self) -> Stmt:
        """All keys for this tile."""
        state, o = self.state, self.buffers["o"]
        start = [
            self._fill(lambda c: BufferStore(state["peak"], NOTHING, [c])),
            self._fill(lambda c: BufferStore(state["total"], ZERO, [c])),
            loop(self.shape.value_size, lambda d: self._fill(lambda c: BufferStore(o, ZERO, [d, c])), name="d"),
            self._load_queries(),
            *self.ahead.ask_for_tiles(),
        ]
        body = sequence(*start, self._over_keys(), self._store())
        return scope("tile", body, [*self.buffers.values(), *state.values()])

    def _over_keys(self) -> Stmt:
        return self.on.blocks(lambda first, count: self._float_block(self.on, first, count))

    def _float_block(self, source: Source, first: Expr, count: Expr) -> Stmt:
        return self._block(source, first, count, self._scores(source, first, count))

    def _fill(self, write: Callable[[Expr], Stmt]) -> Stmt:
        """One statement for each vector of the tile; ``write`` gets the column."""
        return vectors(self.width, self.lanes, write)

    def _query(self, column: Expr) -> Expr:
        return tirx.min(self.tile.first + column, self.on.queries - 1)

    def _load_queries(self) -> Stmt:
        on, tile, layout = self.on, self.tile, self.shape.query
        scale = tirx.const(self.shape.scale, "float32")

        def one(column: Expr, d: Expr) -> Stmt:
            x = on.query_at(tile.batch, tile.head, self._query(column), d)
            return BufferStore(self.buffers["q"], x * scale, [d, column])

        def row(column: Expr, d: Expr) -> Expr:
            return on.q.vload(place(layout, tile.batch, tile.head, self._query(column), d), self._vector)

        def keep(d: Expr, column: Expr, x: Expr) -> Stmt:
            return BufferStore(self.buffers["q"], x * T.Broadcast(scale, self.lanes), [d, self._lanes_from(column)])

        return self._turned(index(self.shape.size), one, (row, keep) if layout[-1] == "d" else None)

    @property
    def _vector(self) -> str:
        return f"float32x{self.lanes}"

    def _lanes_from(self, column: Expr) -> Ramp:
        return Ramp(column, 1, self.lanes)

    def _turned(self, extent: Expr, one: Callable[[Expr, Expr], Stmt], wide: Wide | None) -> Stmt:
        """Take ``extent`` elements of all queries, a square of them at once where a query's lie side by side.

        Parameters
        ----------
        extent : Expr
        one : callable (column, element) -> Stmt
            Takes one.
        wide : pair of callables, or None where they lie apart
            (column, element) -> a vector of a query's elements, and (element, column, a vector of queries) -> Stmt.
        """
        lanes = self.lanes

        def rest(column: Expr, start: Expr) -> Stmt:
            return loop(extent - start, lambda n: one(column, start + n), name="element")

        if wide is None:
            return loop(self.width, lambda column: rest(column, index(0)), name="column")
        row, keep = wide
        whole = tirx.floordiv(extent, index(lanes))

        def square(column: Expr, element: Expr) -> Stmt:
            return self._square(lambda i: row(column + i, element), lambda i, x: keep(element + i, column, x))

        def group(column: Expr) -> Stmt:
            return loop(whole, lambda n: square(column, n * lanes), name="square")

        squares = loop(self.width // lanes, lambda g: group(g * lanes), name="group")
        if static(Analyzer().simplify(extent - whole * lanes)) == 0:
            return squares
        return sequence(squares, loop(self.width, lambda column: rest(column, whole * lanes), name="column"))

    def _square(self, row: Callable[[int], Expr], keep: Callable[[int, Expr], Stmt]) -> Stmt:
        """Turn as many vectors as they have lanes."""
        square = buffer("square", self.lanes, self.lanes)
        loads = [BufferStore(square, row(i), [i, self._lanes_from(index(0))]) for i in range(self.lanes)]
        columns = transposed([square.vload([i, 0], self._vector) for i in range(self.lanes)])
        return scope("square", sequence(loads, [keep(i, x) for i, x in enumerate(columns)]), [square])

    def _block(self, source: Source, first: Expr, count: Expr, scores: Stmt, weigh: Stmt | None = None) -> Stmt:
        """Weigh and add the values of a block whose ``scores`` are to be computed so, unless it is hidden."""
        work = sequence(scores, self._weigh(source, first, count) if weigh is None else weigh)
        if self.extremes is None:
            return work
        low = buffer("low", self.lanes)
        load = [self._load_mask(first, count)] if "hidden" in self.buffers else []
        if self.by_query:
            load = [IfThenElse(tirx.Not(self._plain(first)), *load, None)]
        nothing = self._hidden_is_nothing(low)
        if self.reached is not None and isinstance(self.extremes, Bits):
            load = [Bind(self.reached, Select(nothing, self.extremes.reach(self.tile, first), index(KEYS))), *load]
        skip = tirx.all(self.extremes.hides(self.tile, first), nothing)
        block = IfThenElse(tirx.Not(skip), sequence(load, work), None)
        return scope("masked", sequence(self._lowest_peak(low), block), [low])

    def reach(self, count: Expr) -> Expr:
        """Of the first ``count`` keys of a block those that have to be looked at: what is behind them is hidden."""
        if self.reached is None:
            return count
        return self.reached if static(count) == KEYS else tirx.min(count, self.reached)

    def _hidden_is_nothing(self, low: Var) -> Expr:
        """Whether what the mask hides is nothing beside what each query sees, of which ``low`` is the least peak."""
        beside = low[0] > tirx.const(HIDDEN, "float32")
        if isinstance(self.extremes, Bits) and self.knows_all:
            beside = self.extremes.sees(self.tile)
        return beside if self.shape.hidden is None else is_nothing(self.shape.hidden, beside)

    def _lowest_peak(self, low: Var) -> Stmt:
        peak, lanes = self.state["peak"], self.lanes

        def lower(at: int) -> Stmt:
            return vector(lanes, lambda lane: BufferStore(low, tirx.min(low[lane], peak[lane + at]), [lane]))

        start = vector(lanes, lambda lane: BufferStore(low, peak[lane], [lane]))
        return sequence(start, [lower(at) for at in range(lanes, self.width, lanes)], across(low, lanes, tirx.min))

    def _plain(self, first: Expr) -> Expr:
        """Whether the mask adds nothing in a block."""
        assert self.extremes is not None
        return self.extremes.plain(self.tile, first)

    def _load_mask(self, first: Expr, count: Expr) -> Stmt:
        """What hides the keys of a block, by key and, where the mask tells them apart, query."""
        if self.shape.hidden is not None:
            return self._load_bits(first, self.shape.hidden)
        on, tile, hidden = self.on, self.tile, self.buffers["hidden"]

        def one(column: Expr, j: Expr) -> Stmt:
            value = on.mask_at(tile.batch, tile.head, self._query(column), first + j)
            return BufferStore(hidden, value, [j, column])

        def row(column: Expr, j: Expr) -> Expr:
            return on.mask.vload(on.mask_place(tile.batch, tile.head, self._query(column), first + j), self._vector)

        def keep(j: Expr, column: Expr, x: Expr) -> Stmt:
            return BufferStore(hidden, x, [j, self._lanes_from(column)])

        return self._turned(count, one, (row, keep) if "s" in self.shape.mask else None)

    def _load_bits(self, first: Expr, hidden: float) -> Stmt:
        """The halves of each query's word; of one word for all of them what it adds."""
        to, block = self.buffers["hidden"], tirx.floordiv(first, index(KEYS))

        def bits(query: Expr, bit: int) -> Expr:
            word = self.on.mask_at(self.tile.batch, self.tile.head, query, block)
            return tirx.shift_right(word, index(bit)).astype("uint32")

        def halves(column: Expr) -> Stmt:
            query = self._query(column)
            return sequence([BufferStore(to, bits(query, 32 * n), [n, column]) for n in range(KEYS // 32)])

        def added(start: int) -> Stmt:
            word = bits(index(0), start)
            return vector(self.lanes, lambda lane: BufferStore(to, hide(ZERO, word, lane, hidden), [lane + start]))

        if self.by_query:
            return loop(self.width, halves, name="column")
        return sequence([added(start) for start in range(0, KEYS, self.lanes)])

    def _scores(self, source: Source, first: Expr, count: Expr) -> Stmt:
        q = self.buffers["q"]
        number_of_tiles = tiles(self.reach(count), self.rows)

        def tile(number: Expr) -> Stmt:
            sums = [buffer(f"sum{row}", self.width) for row in range(self.rows)]
            keys = [number * self.rows + row for row in range(self.rows)]

            def step(d: Expr) -> Stmt:
                def one(acc: Var, key: Expr) -> Stmt:
                    k = source.key_at(self.tile.batch, self.kv, first + tirx.min(key, count - 1), d)
                    return self._fill(lambda c: BufferStore(acc, acc[c] + k * q[d, c], [c]))

                ask = self.ahead.ask_for_value(first, number, d)
                return sequence(ask, [one(acc, key) for acc, key in zip(sums, keys, strict=True)])

            ends = self._keep(first, keys, count, lambda row, c: sums[row][c])
            return scope("scores", sequence(zeros(sums, self.lanes), loop(self.shape.size, step, name="d"), ends), sums)

        return sequence(self._start_peak(), loop(number_of_tiles, tile, name="tile"))

    def _start_peak(self) -> Stmt:
        return self._fill(lambda c: BufferStore(self.state["block_peak"], self.state["peak"][c], [c]))

    def _keep(self, first: Expr, keys: list[Expr], count: Expr, score: Callable[[int, Expr], Expr]) -> Stmt:
        """Store the scores of some keys of the block with what hides them; ``score`` is a key's and a column's."""
        scores, peak = self.buffers["scores"], self.state["block_peak"]

        def one(row: int, key: Expr, c: Expr, plain: bool) -> Stmt:
            value = score(row, c)
            if not plain and self.by_query and self.shape.hidden is not None:
                value = hide(value, bits[c], index(row), self.shape.hidden)
            elif not plain:
                value = self._masked(value, first, key, count, c)
            if static(count) != KEYS:
                value = Select(key < count, value, NOTHING)
            return sequence(BufferStore(scores, value, [key, c]), BufferStore(peak, tirx.max(peak[c], value), [c]))

        def every(plain: bool) -> Stmt:
            return sequence(
                [
                    self._fill(lambda c, row=row, key=key: one(row, key, c, plain))  # type: ignore[misc]
                    for row, key in enumerate(keys)
                ]
            )

        if not self.by_query:
            return every(not self.shape.mask)
        if self.shape.hidden is None:
            return IfThenElse(self._plain(first), every(True), every(False))
        # The keys are neighbours in one half of a word: the bit of each is its number among them.
        bits, words = tirx.decl_buffer([index(self.width)], "uint32", "bits"), self.buffers["hidden"]
        half, bit = tirx.floordiv(keys[0], index(32)), tirx.floormod(keys[0], index(32))
        shift = self._fill(lambda c: BufferStore(bits, tirx.shift_right(words[half, c], bit.astype("uint32")), [c]))
        return IfThenElse(self._plain(first), every(True), scope("bits", sequence(shift, every(False)), [bits]))

    def _masked(self, score: Expr, first: Expr, key: Expr, count: Expr, c: Expr) -> Expr:
        """The score of a key of the block for a query, with what is added to it."""
        hidden = self.buffers.get("hidden")
        if hidden is None:
            seen = first + tirx.min(key, count - 1)
            return score + self.on.mask_at(self.tile.batch, self.tile.head, index(0), seen)
        return score + (hidden[key, c] if self.by_query else hidden[key])

    def _weigh(self, source: Source, first: Expr, count: Expr) -> Stmt:
        return sequence(self._softmax(count), self._values(source, first, count))

    def _softmax(self, count: Expr) -> Stmt:
        scores, state = self.buffers["scores"], self.state
        peak, total, new, fade = (state[name] for name in ("peak", "total", "block_peak", "fade"))

        def base(c: Expr) -> Expr:
            # Of a query that has seen no key, exp(-inf - 0) is zero, and exp(-inf + inf) would be NaN.
            return Select(tirx.EQ(new[c], NOTHING), ZERO, new[c])

        def start(c: Expr) -> Stmt:
            return sequence(
                BufferStore(fade, exp_to_one(peak[c] - base(c)), [c]),
                BufferStore(peak, new[c], [c]),
                BufferStore(total, total[c] * fade[c], [c]),
                BufferStore(new, base(c), [c]),
            )

        def one(key: Expr) -> Stmt:
            def write(c: Expr) -> Stmt:
                return sequence(
                    BufferStore(scores, exp_to_one(scores[key, c] - new[c]), [key, c]),
                    BufferStore(total, total[c] + scores[key, c], [c]),
                )

            return self._fill(write)

        return sequence(self._fill(start), loop(self.reach(count), one, name="key"))

    def _values(self, source: Source, first: Expr, count: Expr) -> Stmt:
        scores, o, fade = self.buffers["scores"], self.buffers["o"], self.state["fade"]

        def tile(start: Expr, rows: int) -> Stmt:
            sums = [buffer(f"sum{row}", self.width) for row in range(rows)]

            def step(key: Expr) -> Stmt:
                def one(acc: Var, row: int) -> Stmt:
                    v = source.value_at(self.tile.batch, self.kv, first + key, start + row)
                    return self._fill(lambda c: BufferStore(acc, acc[c] + v * scores[key, c], [c]))

                ask = self.ahead.ask_for_key(first, start, key)
                return sequence(ask, [one(acc, row) for row, acc in enumerate(sums)])

            def load(acc: Var, row: int) -> Stmt:
                return self._fill(lambda c: BufferStore(acc, o[start + row, c] * fade[c], [c]))

            def store(acc: Var, row: int) -> Stmt:
                return self._fill(lambda c: BufferStore(o, acc[c], [start + row, c]))

            loads = [load(acc, row) for row, acc in enumerate(sums)]
            stores = [store(acc, row) for row, acc in enumerate(sums)]
            return scope("values", sequence(loads, loop(self.reach(count), step, name="key"), stores), sums)

        whole, rest = divmod(self.shape.value_size, self.value_rows)
        parts = [loop(whole, lambda n: tile(n * self.value_rows, self.value_rows), name="tile")] if whole else []
        return sequence([*parts, *([tile(index(whole * self.value_rows), rest)] if rest else [])])

    def _store(self) -> Stmt:
        o, total = self.buffers["o"], self.state["total"]
        invert = self._fill(lambda c: BufferStore(total, inverse(total[c]), [c]))

        lanes, layout = self.lanes, self.shape.out
        whole = self.shape.value_size // lanes * lanes if layout[-1] == "d" else 0
        count = tirx.min(index(self.width), self.on.queries - self.tile.first)

        def one(column: Expr, d: Expr) -> Stmt:
            value = o[d, column] * total[column]
            return self.on.store(self.tile.batch, self.tile.head, self.tile.first + column, d, value)

        def rest(column: Expr) -> Stmt:
            return loop(self.shape.value_size - whole, lambda d: one(column, whole + d), name="d")

        def square(column: Expr, d: Expr) -> Stmt:
            def row(i: int) -> Expr:
                return o.vload([d + i, column], self._vector) * total.vload([column], self._vector)

            def keep(i: int, x: Expr) -> Stmt:
                # Where the last query is repeated, it is stored again.
                at = place(layout, self.tile.batch, self.tile.head, self._query(column + i), d)
                return BufferStore(self.on.out, x, [*at[:-1], self._lanes_from(d)])

            return self._square(row, keep)

        def group(column: Expr) -> Stmt:
            return loop(whole // lanes, lambda n: square(column, n * lanes), name="square")

        squares = loop(tiles(count, lanes), lambda g: group(g * lanes), name="group")
        singles = loop(count, rest, name="column")
        parts = [*([squares] if whole else []), *([singles] if whole < self.shape.value_size else [])]
        return sequence(invert, parts)


def _value_rows(on: Operands) -> int:
    """Elements of a register tile of values.

    Tokens of heads that lie side by side are often a multiple of 4 KiB apart, where few of their lines stay in the
    first-level cache: the more elements at once, the less often each comes from the second. Heads of 128 take 4% less
    time by that, and smaller ones nothing; nor is it worth a short tile for the rest.
    """
    size, rest = on.shape.value_size, on.shape.value_size % _WIDE
    wide = on.simd.registers >= MANY_REGISTERS and size >= _LARGE and (rest == 0 or rest >= on.rows)
    return _WIDE if wide else on.rows
