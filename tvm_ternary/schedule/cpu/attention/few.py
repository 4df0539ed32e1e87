"""Few queries, as in a step of decoding: a lane is an element of a head."""

from __future__ import annotations

from functools import reduce

from tvm import tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import BufferStore, IfThenElse, Select, Stmt, Var

from tvm_ternary.schedule.cpu.attention.join import join_block
from tvm_ternary.schedule.cpu.attention.operands import (
    HIDDEN,
    KEYS,
    NOTHING,
    ZERO,
    Operands,
    Source,
    Values,
    across,
    buffer,
    elements,
    hide,
    inverse,
    is_nothing,
    tiles,
    vectors,
    zeros,
)
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, static, vector

FEW = 4
"""Up to so many queries, lanes are elements of a head; and so many of the rows that read the same keys are a tile."""


def tile_rows(on: Operands) -> int:
    """Rows of a tile: no more than there are, where that is known."""
    return min(FEW, static(Analyzer().simplify(on.queries * on.shape.group)) or FEW)


class Few:
    """A tile of the queries of all heads that share keys."""

    def __init__(self, on: Operands, batch: Expr, kv: Expr, first: Expr, *, join: bool) -> None:
        self.on, self.shape, self.batch, self.kv, self.first, self.join = on, on.shape, batch, kv, first, join
        self.lanes = on.lanes
        self.rows = tile_rows(on)
        self.q = buffer("q", self.rows, self.shape.size)
        self.scores = buffer("scores", self.rows, KEYS)
        self.o = buffer("o", self.rows, self.shape.value_size)
        self.state = {name: buffer(name, self.rows) for name in ("peak", "total", "fade")}
        # Which head and query a row is costs divisions, that are not to be made for each word of its mask.
        names = ("row_head", "row_query") if self.shape.hidden is not None else ()
        self.rows_of = {name: tirx.decl_buffer([index(self.rows)], "int64", name) for name in names}

    def _at(self, row: int | Expr) -> tuple[Expr, Expr]:
        """Head and query of a row; behind the last one it is repeated."""
        queries, group = self.on.queries, self.shape.group
        flat = tirx.min(self.first + row, queries * group - 1)
        if group == 1:
            return self.kv, flat
        return self.kv * group + tirx.floordiv(flat, queries), tirx.floormod(flat, queries)

    def write(self) -> Stmt:
        """All keys for these rows."""
        scale = tirx.const(self.shape.scale, "float32")

        def load(row: Expr) -> Stmt:
            head, query = self._at(row)
            fetch = loop(
                self.shape.size,
                lambda d: BufferStore(self.q, self.on.query_at(self.batch, head, query, d) * scale, [row, d]),
                name="d",
            )
            zeros = loop(self.shape.value_size, lambda d: BufferStore(self.o, ZERO, [row, d]), name="d")
            start = [
                BufferStore(self.state["peak"], NOTHING, [row]),
                BufferStore(self.state["total"], ZERO, [row]),
                *(BufferStore(to, x, [row]) for to, x in zip(self.rows_of.values(), (head, query), strict=False)),
            ]
            return sequence(fetch, zeros, start)

        def store(row: Expr) -> Stmt:
            head, query = self._at(row)
            factor = inverse(self.state["total"][row])
            return loop(
                self.shape.value_size,
                lambda d: self.on.store(self.batch, head, query, d, self.o[row, d] * factor),
                name="d",
            )

        rows = tirx.min(index(self.rows), self.on.queries * self.shape.group - self.first)
        body = sequence(loop(self.rows, load, name="row"), self._over_keys(), loop(rows, store, name="row"))
        return scope("rows", body, [self.q, self.scores, self.o, *self.state.values(), *self.rows_of.values()])

    def _over_keys(self) -> Stmt:
        def block(first: Expr, count: Expr) -> Stmt:
            joined = [join_block(self.on, self.batch, self.kv, first, count)] if self.join else []
            return sequence(joined, self._block(self.on, first, count))

        return self.on.blocks(block)

    def _block(self, source: Source, first: Expr, count: Expr) -> Stmt:
        def work(hide: Stmt | None) -> Stmt:
            return sequence(
                self._score(source, first, count),
                [] if hide is None else hide,
                loop(self.rows, lambda row: self._softmax(row, count), name="row"),
                self._values(source, first, count),
            )

        if self.shape.hidden is None:
            return work(None)
        words = tirx.decl_buffer([index(self.rows)], "int64", "words")
        within = tirx.floormod(first, index(KEYS))

        def load(row: Expr) -> Stmt:
            return BufferStore(
                words, tirx.shift_right(self._word(row, tirx.floordiv(first, index(KEYS))), within), [row]
            )

        seen = reduce(tirx.bitwise_or, [words[row] for row in range(self.rows)])
        skip = tirx.all(tirx.EQ(seen, tirx.const(0, "int64")), self._hidden_is_nothing())
        shown = IfThenElse(
            tirx.Not(skip), work(loop(self.rows, lambda row: self._hide(words[row], row, count), name="row")), None
        )
        return scope("hidden", sequence(loop(self.rows, load, name="row"), shown), [words])

    def _word(self, row: int | Expr, block: Expr) -> Expr:
        """A mask's word of a block of keys for a row."""
        head, query = (places[row] for places in self.rows_of.values())
        return self.on.mask_at(self.batch, head, query, block)

    def _hide(self, word: Expr, row: Expr, count: Expr, place: Expr | int = 0) -> Stmt:
        """Hide what a word says of so many keys, whose scores begin at ``place``."""
        assert self.shape.hidden is not None
        hidden = self.shape.hidden

        def part(n: Expr) -> Stmt:
            bits = tirx.shift_right(word, n * self.lanes).astype("uint32")

            def one(lane: Expr) -> Stmt:
                at = [row, place + n * self.lanes + lane]
                return BufferStore(self.scores, hide(self.scores[tuple(at)], bits, lane, hidden), at)

            return vector(self.lanes, one)

        parts = loop(tiles(count, self.lanes), part, name="part")
        return IfThenElse(tirx.NE(word, tirx.const(-1, "int64")), parts, None)

    def _hidden_is_nothing(self) -> Expr:
        """Whether what bits hide is nothing beside what each row has seen."""
        assert self.shape.hidden is not None
        low = reduce(tirx.min, [self.state["peak"][row] for row in range(self.rows)])
        return is_nothing(self.shape.hidden, low > tirx.const(HIDDEN, "float32"))

    def _masked(self, row: int, key: Expr, score: Expr) -> Expr:
        """A score with what is added to it; what bits hide follows (`_hide`)."""
        if not self.shape.mask or self.shape.hidden is not None:
            return score
        head, query = self._at(row)
        return score + self.on.mask_at(self.batch, head, query, key)

    def _score(self, source: Source, first: Expr, count: Expr) -> Stmt:
        size, lanes = self.shape.size, self.lanes
        whole = size // lanes

        def key(j: Expr) -> Stmt:
            sums = [buffer(f"sum{row}", lanes) for row in range(self.rows)]

            def k(d: Expr) -> Expr:
                return source.key_at(self.batch, self.kv, first + j, d)

            def step(n: Expr) -> Stmt:
                def one(row: int, acc: Var) -> Stmt:
                    def at(lane: Expr) -> Stmt:
                        d = n * lanes + lane
                        return BufferStore(acc, acc[lane] + self.q[row, d] * k(d), [lane])

                    return vector(lanes, at)

                return sequence([one(row, acc) for row, acc in enumerate(sums)])

            def rest(d: Expr) -> Stmt:
                return sequence([BufferStore(acc, acc[0] + self.q[row, d] * k(d), [0]) for row, acc in enumerate(sums)])

            def finish(row: int, acc: Var) -> Stmt:
                return BufferStore(self.scores, self._masked(row, first + j, acc[0]), [row, j])

            parts = [loop(whole, step, name="part")] if whole else []
            folds = [across(acc, lanes, lambda a, b: a + b) for acc in sums]
            tail = [loop(size - whole * lanes, lambda d: rest(whole * lanes + d), name="d")] if size % lanes else []
            ends = [finish(row, acc) for row, acc in enumerate(sums)]
            return scope("key", sequence(zeros(sums, lanes), *parts, *folds, *tail, ends), sums)

        return loop(count, key, name="key")

    def _softmax(self, row: Expr, count: Expr) -> Stmt:
        lanes = self.lanes
        fold = buffer("fold", lanes)
        peak, total, fade = (self.state[name] for name in ("peak", "total", "fade"))
        new = buffer("new", 1)

        def lane_of(j: Expr) -> Expr:
            return tirx.floormod(j, index(lanes))

        def largest(j: Expr) -> Stmt:
            return BufferStore(fold, tirx.max(fold[lane_of(j)], self.scores[row, j]), [lane_of(j)])

        def weigh(j: Expr) -> Stmt:
            return sequence(
                BufferStore(self.scores, tirx.exp(self.scores[row, j] - new[0]), [row, j]),
                BufferStore(fold, fold[lane_of(j)] + self.scores[row, j], [lane_of(j)]),
            )

        top = tirx.max(fold[0], peak[row])
        middle = [
            BufferStore(new, top, [0]),
            BufferStore(fold, new[0], [0]),
            BufferStore(new, Select(tirx.EQ(new[0], NOTHING), ZERO, new[0]), [0]),
            BufferStore(fade, tirx.exp(peak[row] - new[0]), [row]),
            BufferStore(peak, fold[0], [row]),
        ]
        body = sequence(
            vector(lanes, lambda lane: BufferStore(fold, NOTHING, [lane])),
            elements(count, lanes, largest),
            across(fold, lanes, tirx.max),
            middle,
            vector(lanes, lambda lane: BufferStore(fold, ZERO, [lane])),
            elements(count, lanes, weigh),
            across(fold, lanes, lambda a, b: a + b),
            BufferStore(total, total[row] * fade[row] + fold[0], [row]),
        )
        return scope("softmax", body, [fold, new])

    def _values(self, source: Values, first: Expr, count: Expr) -> Stmt:
        size, lanes = self.shape.value_size, self.lanes
        fade = self.state["fade"]
        step_vectors = 4 if self.on.simd.registers >= 32 else 2
        parts: list[Stmt] = []
        done = 0
        while done < size:
            # Whole vectors first; what is left of a ragged head goes one by one.
            width = min(step_vectors, (size - done) // lanes) * lanes or size - done
            parts.append(self._part(source, first, count, done, width, lanes if width >= lanes else 1, fade))
            done += width
        return sequence(parts)

    def _part(self, source: Values, first: Expr, count: Expr, start: int, width: int, lanes: int, fade: Var) -> Stmt:
        """Elements ``start .. start + width`` of the rows' sums."""
        sums = [buffer(f"sum{row}", width) for row in range(self.rows)]
        # LLVM does not see that this is zero. Else it holds the sums of all parts in registers from block to block, of
        # which there are not enough, and spills those of this part for every key. Twice, for an index may have 32 bits.
        zero = tirx.shift_right(tirx.shift_right(first, index(31)), index(31))

        def key(j: Expr) -> Stmt:
            def one(row: int, acc: Var) -> Stmt:
                def at(c: Expr) -> Stmt:
                    v = source.value_at(self.batch, self.kv, first + j, start + c)
                    return BufferStore(acc, acc[c] + self.scores[row, j] * v, [c])

                return vectors(width, lanes, at)

            return sequence([one(row, acc) for row, acc in enumerate(sums)])

        def load(row: int, acc: Var) -> Stmt:
            return vectors(width, lanes, lambda c: BufferStore(acc, self.o[row, zero + start + c] * fade[row], [c]))

        def store(row: int, acc: Var) -> Stmt:
            return vectors(width, lanes, lambda c: BufferStore(self.o, acc[c], [row, zero + start + c]))

        loads = [load(row, acc) for row, acc in enumerate(sums)]
        stores = [store(row, acc) for row, acc in enumerate(sums)]
        return scope("part", sequence(loads, loop(count, key, name="key"), stores), sums)
