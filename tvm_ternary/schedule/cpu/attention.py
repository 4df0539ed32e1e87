"""Attention on a CPU: scores, softmax and the sum of values in one pass over the keys; no score leaves the cache.

Where there are many queries a vector lane is a query, so that softmax needs no sums across lanes, and keys and values
are read one element at a time, broadcast, from wherever they lie: nothing of them is transposed or copied. Where there
are few, as in a step of decoding, a lane is an element of a head, and four queries share what is read of the keys.

Keys come in blocks. With the largest score m of all keys so far, the sum l of exp(s - m) and the sum o of
exp(s - m) v, a block whose largest score is m' turns them into exp(m - m'') l + ..., m'' the larger one; in the end
o / l is the result. A block of keys that the mask hides from all queries of a tile costs reading its mask.

References
----------
Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3.
Dao et al., "FlashAttention", NeurIPS 2022, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import BufferStore, IfThenElse, PrimFunc, Select, Stmt, Var

from tvm_ternary.kernels.attention import Attention

from .nest import index, loop, scope, sequence, space, static, strips, vector
from .simd import Simd
from .vector_math import expand_vector_math

KEYS = 64
"""Keys of a block: their scores for a tile of queries, beside the tile itself, fit the first-level cache."""

FEW = 4
"""Up to so many queries, lanes are elements of a head."""

HIDDEN = -1e30
"""Masks from here down hide a key, and scores are above it: any sum of the two is below all other scores."""

ZERO = tirx.const(0.0, "float32")
NOTHING = tirx.const(float("-inf"), "float32")


def attention(shape: Attention, lengths: tuple[int | None, int | None, int | None], simd: Simd) -> PrimFunc:
    """The scheduled function ``(q, k, v[, mask], out)``.

    Parameters
    ----------
    shape : Attention
    lengths : tuple of (int or None)
        Batch, queries and keys; None where it is known at run time.
    simd : Simd

    Returns
    -------
    PrimFunc
        All float32. NaN and infinities of q, k and v go where the definition sends them.
    """
    batch, queries, keys = (
        Var(name, "int64") if given is None else index(given)
        for name, given in zip(("batch", "queries", "keys"), lengths, strict=True)
    )
    return _Kernel(shape, simd, batch, queries, keys).function()


@dataclass(frozen=True)
class _Tile:
    """One batch and head, and the queries ``first .. first + width`` of it, the last of them repeated at the end."""

    batch: Expr
    head: Expr
    first: Expr
    vectors: int


@dataclass(frozen=True)
class _Kernel:
    shape: Attention
    simd: Simd
    batch: Expr
    queries: Expr
    keys: Expr

    # Operands

    @cached_property
    def q(self) -> Var:
        return self._operand("q", self.shape.query, self.shape.heads, self.queries, self.shape.size)

    @cached_property
    def k(self) -> Var:
        return self._operand("k", self.shape.key, self.shape.kv_heads, self.keys, self.shape.size)

    @cached_property
    def v(self) -> Var:
        return self._operand("v", self.shape.value, self.shape.kv_heads, self.keys, self.shape.value_size)

    @cached_property
    def out(self) -> Var:
        return self._operand("out", self.shape.out, self.shape.heads, self.queries, self.shape.value_size)

    @cached_property
    def mask(self) -> Var:
        extents = {"b": self.batch, "h": index(self.shape.heads), "m": self.queries, "s": self.keys}
        dims = [extents[axis] if axis in self.shape.mask else index(1) for axis in "bhms"]
        return tirx.decl_buffer(dims, "float32", "mask")

    def _operand(self, name: str, layout: str, heads: int, length: Expr, size: int) -> Var:
        extents = {"b": self.batch, "h": index(heads), "l": length, "d": index(size)}
        return tirx.decl_buffer([extents[axis] for axis in layout], "float32", name)

    def _q(self, tile_batch: Expr, head: Expr, query: Expr, d: Expr) -> Expr:
        return self.q[tuple(_place(self.shape.query, tile_batch, head, query, d))]

    def _k(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.k[tuple(_place(self.shape.key, batch, kv, key, d))]

    def _v(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.v[tuple(_place(self.shape.value, batch, kv, key, d))]

    def _mask(self, batch: Expr, head: Expr, query: Expr, key: Expr) -> Expr:
        at = {"b": batch, "h": head, "m": query, "s": key}
        return self.mask[tuple(at[axis] if axis in self.shape.mask else index(0) for axis in "bhms")]

    def _write(self, batch: Expr, head: Expr, query: Expr, d: Expr, value: Expr) -> Stmt:
        return BufferStore(self.out, value, _place(self.shape.out, batch, head, query, d))

    # The function

    def function(self) -> PrimFunc:
        """All of it."""
        params = [self.q, self.k, self.v, *([self.mask] if self.shape.mask else []), self.out]
        function = PrimFunc(params, scope("root", self._by_queries()))
        function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
        return expand_vector_math(function)

    def _by_queries(self) -> Stmt:
        """Few queries, one vector of them, or more."""
        choices: list[tuple[int | None, Callable[[], Stmt]]] = [
            (FEW, self._few),
            (self.lanes, lambda: self._many(1)),
            (None, lambda: self._many(2)),
        ]
        known = static(self.queries)
        if known is not None:
            return next(write for most, write in choices if most is None or known <= most)()
        result = choices[-1][1]()
        for most, write in reversed(choices[:-1]):
            assert most is not None
            result = IfThenElse(self.queries <= most, write(), result)
        return result

    @property
    def lanes(self) -> int:
        """Float32 elements of a vector."""
        return self.simd.lanes("float32")

    @property
    def rows(self) -> int:
        """Rows of a register tile, two vectors wide: they and what they are made of fit the registers."""
        return 8 if self.simd.registers >= 32 else 4

    def _blocks(self, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        """For each block of keys, ``body(first, count)``."""
        known = static(self.keys)
        if known is not None and known <= KEYS:
            return body(index(0), index(known))
        count = tirx.floordiv(self.keys + (KEYS - 1), index(KEYS))
        return loop(count, lambda n: body(n * KEYS, tirx.min(index(KEYS), self.keys - n * KEYS)), name="block")

    # Many queries: a lane is a query

    def _many(self, vectors: int) -> Stmt:
        width = vectors * self.lanes
        tiles = _tiles(self.queries, width)
        work = self.keys * (width * (self.shape.size + self.shape.value_size) // 4)
        return space(
            [self.batch, index(self.shape.heads), tiles],
            work,
            lambda at: _Many(self, _Tile(at[0], at[1], at[2] * width, vectors)).write(),
        )

    # Few queries: a lane is an element of a head

    def _few(self) -> Stmt:
        tiles = _tiles(self.queries * self.shape.group, FEW)
        work = self.keys * (FEW * (self.shape.size + self.shape.value_size) // 4)
        return space(
            [self.batch, index(self.shape.kv_heads), tiles],
            work,
            lambda at: _Few(self, at[0], at[1], at[2] * FEW).write(),
        )


def _place(layout: str, batch: Expr, head: Expr, position: Expr, d: Expr) -> list[Expr]:
    at = {"b": batch, "h": head, "l": position, "d": d}
    return [at[axis] for axis in layout]


def _tiles(extent: Expr, size: int) -> Expr:
    known = static(Analyzer().simplify(extent))
    return tirx.floordiv(extent + (size - 1), index(size)) if known is None else index(-(-known // size))


def _inverse(total: Expr) -> Expr:
    """1 / total; 0 of nothing."""
    return Select(tirx.EQ(total, ZERO), ZERO, tirx.const(1.0, "float32") / total)


class _Many:
    """A tile of queries, transposed: element by query, so that what is read along the lanes is contiguous."""

    def __init__(self, kernel: _Kernel, tile: _Tile) -> None:
        self.kernel, self.tile, self.shape = kernel, tile, kernel.shape
        self.lanes, self.rows = kernel.lanes, kernel.rows
        self.width = tile.vectors * kernel.lanes
        self.kv = tirx.floordiv(tile.head, index(self.shape.group)) if self.shape.group > 1 else tile.head
        shapes = {"q": self.shape.size, "scores": KEYS, "o": self.shape.value_size}
        self.buffers = {name: _buffer(name, n, self.width) for name, n in shapes.items()}
        self.state = {name: _buffer(name, self.width) for name in ("peak", "total", "block_peak", "fade")}
        self.by_query = "m" in self.shape.mask
        if self.by_query:
            self.buffers["hidden"] = _buffer("hidden", KEYS, self.width)

    def write(self) -> Stmt:
        """All keys for this tile."""
        state, o = self.state, self.buffers["o"]
        start = [
            self._fill(lambda c: BufferStore(state["peak"], NOTHING, [c])),
            self._fill(lambda c: BufferStore(state["total"], ZERO, [c])),
            loop(self.shape.value_size, lambda d: self._fill(lambda c: BufferStore(o, ZERO, [d, c])), name="d"),
            self._load_queries(),
        ]
        body = sequence(*start, self.kernel._blocks(self._block), self._store())
        return scope("tile", body, [*self.buffers.values(), *state.values()])

    def _fill(self, write: Callable[[Expr], Stmt]) -> Stmt:
        """One statement for each vector of the tile; ``write`` gets the column."""
        return _vectors(self.width, self.lanes, write)

    def _query(self, column: Expr) -> Expr:
        return tirx.min(self.tile.first + column, self.kernel.queries - 1)

    def _load_queries(self) -> Stmt:
        scale = tirx.const(self.shape.scale, "float32")

        def one(column: Expr) -> Stmt:
            query = self._query(column)
            return loop(
                self.shape.size,
                lambda d: BufferStore(
                    self.buffers["q"],
                    self.kernel._q(self.tile.batch, self.tile.head, query, d) * scale,
                    [d, column],
                ),
                name="d",
            )

        return loop(self.width, one, name="column")

    def _block(self, first: Expr, count: Expr) -> Stmt:
        work = sequence(self._scores(first, count), self._softmax(count), self._values(first, count))
        if not self.by_query:
            return work
        flags = _buffer("flags", 3)
        return scope(
            "masked", sequence(self._look(first, count, flags), self._unless_hidden(flags, first, count, work)), [flags]
        )

    def _look(self, first: Expr, count: Expr, flags: Var) -> Stmt:
        """The largest and the smallest of the block's mask, and the smallest peak so far."""
        most, least, low = (_buffer(name, self.lanes) for name in ("most", "least", "low"))
        peak = self.state["peak"]

        def row(column: Expr) -> Stmt:
            def value(key: Expr) -> Expr:
                return self.kernel._mask(self.tile.batch, self.tile.head, self._query(column), first + key)

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
            _across(most, self.lanes, tirx.max),
            _across(least, self.lanes, tirx.min),
            _across(low, self.lanes, tirx.min),
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
                    self.kernel._mask(self.tile.batch, self.tile.head, self._query(column), first + j),
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
        tiles = _tiles(count, self.rows)

        def tile(number: Expr) -> Stmt:
            sums = [_buffer(f"sum{row}", self.width) for row in range(self.rows)]
            keys = [number * self.rows + row for row in range(self.rows)]

            def step(d: Expr) -> Stmt:
                def one(acc: Var, key: Expr) -> Stmt:
                    k = self.kernel._k(self.tile.batch, self.kv, tirx.min(first + key, self.kernel.keys - 1), d)
                    return self._fill(lambda c: BufferStore(acc, acc[c] + k * q[d, c], [c]))

                return sequence([one(acc, key) for acc, key in zip(sums, keys, strict=True)])

            def finish(acc: Var, key: Expr) -> Stmt:
                def write(c: Expr) -> Stmt:
                    value = acc[c]
                    if self.by_query:
                        value = value + self.buffers["hidden"][key, c]
                    elif self.shape.mask:
                        seen = tirx.min(first + key, self.kernel.keys - 1)
                        value = value + self.kernel._mask(self.tile.batch, self.tile.head, index(0), seen)
                    value = Select(key < count, value, NOTHING)
                    return sequence(
                        BufferStore(scores, value, [key, c]), BufferStore(peak, tirx.max(peak[c], value), [c])
                    )

                return self._fill(write)

            ends = [finish(acc, key) for acc, key in zip(sums, keys, strict=True)]
            return scope(
                "scores", sequence(_zeros(sums, self.lanes), loop(self.shape.size, step, name="d"), ends), sums
            )

        start = self._fill(lambda c: BufferStore(peak, self.state["peak"][c], [c]))
        return sequence(start, loop(tiles, tile, name="tile"))

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
            sums = [_buffer(f"sum{row}", self.width) for row in range(rows)]

            def step(key: Expr) -> Stmt:
                def one(acc: Var, row: int) -> Stmt:
                    v = self.kernel._v(self.tile.batch, self.kv, first + key, start + row)
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
        inverse = self._fill(lambda c: BufferStore(total, _inverse(total[c]), [c]))

        def one(column: Expr) -> Stmt:
            query = self.tile.first + column
            return loop(
                self.shape.value_size,
                lambda d: self.kernel._write(self.tile.batch, self.tile.head, query, d, o[d, column] * total[column]),
                name="d",
            )

        count = tirx.min(index(self.width), self.kernel.queries - self.tile.first)
        return sequence(inverse, loop(count, one, name="column"))


class _Few:
    """Up to `FEW` of the queries of all heads that share keys."""

    def __init__(self, kernel: _Kernel, batch: Expr, kv: Expr, first: Expr) -> None:
        self.kernel, self.shape, self.batch, self.kv, self.first = kernel, kernel.shape, batch, kv, first
        self.lanes = kernel.lanes
        self.q = _buffer("q", FEW, self.shape.size)
        self.scores = _buffer("scores", FEW, KEYS)
        self.o = _buffer("o", FEW, self.shape.value_size)
        self.state = {name: _buffer(name, FEW) for name in ("peak", "total", "fade")}

    def _at(self, row: int | Expr) -> tuple[Expr, Expr]:
        """Head and query of a row; behind the last one it is repeated."""
        queries, group = self.kernel.queries, self.shape.group
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
                lambda d: BufferStore(self.q, self.kernel._q(self.batch, head, query, d) * scale, [row, d]),
                name="d",
            )
            zeros = loop(self.shape.value_size, lambda d: BufferStore(self.o, ZERO, [row, d]), name="d")
            start = [
                BufferStore(self.state["peak"], NOTHING, [row]),
                BufferStore(self.state["total"], ZERO, [row]),
            ]
            return sequence(fetch, zeros, start)

        def block(first: Expr, count: Expr) -> Stmt:
            return sequence(
                self._score(first, count),
                loop(FEW, lambda row: self._softmax(row, count), name="row"),
                self._values(first, count),
            )

        def store(row: Expr) -> Stmt:
            head, query = self._at(row)
            inverse = _inverse(self.state["total"][row])
            return loop(
                self.shape.value_size,
                lambda d: self.kernel._write(self.batch, head, query, d, self.o[row, d] * inverse),
                name="d",
            )

        rows = tirx.min(index(FEW), self.kernel.queries * self.shape.group - self.first)
        body = sequence(loop(FEW, load, name="row"), self.kernel._blocks(block), loop(rows, store, name="row"))
        return scope("rows", body, [self.q, self.scores, self.o, *self.state.values()])

    def _score(self, first: Expr, count: Expr) -> Stmt:
        size, lanes = self.shape.size, self.lanes
        whole = size // lanes

        def key(j: Expr) -> Stmt:
            sums = [_buffer(f"sum{row}", lanes) for row in range(FEW)]

            def k(d: Expr) -> Expr:
                return self.kernel._k(self.batch, self.kv, first + j, d)

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
                value = acc[0]
                if self.shape.mask:
                    head, query = self._at(row)
                    value = value + self.kernel._mask(self.batch, head, query, first + j)
                return BufferStore(self.scores, value, [row, j])

            parts = [loop(whole, step, name="part")] if whole else []
            folds = [_across(acc, lanes, lambda a, b: a + b) for acc in sums]
            tail = [loop(size - whole * lanes, lambda d: rest(whole * lanes + d), name="d")] if size % lanes else []
            ends = [finish(row, acc) for row, acc in enumerate(sums)]
            return scope("key", sequence(_zeros(sums, lanes), *parts, *folds, *tail, ends), sums)

        return loop(count, key, name="key")

    def _softmax(self, row: Expr, count: Expr) -> Stmt:
        lanes = self.lanes
        fold = _buffer("fold", lanes)
        peak, total, fade = (self.state[name] for name in ("peak", "total", "fade"))
        new = _buffer("new", 1)

        def over(write: Callable[[Expr], Stmt], one: Callable[[Expr], Stmt]) -> Stmt:
            """Whole vectors, then the rest in lane 0."""
            known = static(count)
            whole = tirx.floordiv(count, index(lanes)) if known is None else index(known // lanes)
            rest = tirx.floormod(count, index(lanes)) if known is None else index(known % lanes)
            parts = [loop(whole, lambda n: vector(lanes, lambda lane: write(n * lanes + lane)), name="part")]
            if static(rest) != 0:
                parts.append(loop(rest, lambda n: one(whole * lanes + n), name="rest"))
            return sequence(parts)

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
            over(largest, largest),
            _across(fold, lanes, tirx.max),
            middle,
            vector(lanes, lambda lane: BufferStore(fold, ZERO, [lane])),
            over(weigh, weigh),
            _across(fold, lanes, lambda a, b: a + b),
            BufferStore(total, total[row] * fade[row] + fold[0], [row]),
        )
        return scope("softmax", body, [fold, new])

    def _values(self, first: Expr, count: Expr) -> Stmt:
        size, lanes = self.shape.value_size, self.lanes
        fade = self.state["fade"]
        step_vectors = 4 if self.kernel.simd.registers >= 32 else 2
        parts: list[Stmt] = []
        done = 0
        while done < size:
            # Whole vectors first; what is left of a ragged head goes one by one.
            width = min(step_vectors, (size - done) // lanes) * lanes or size - done
            parts.append(self._part(first, count, done, width, lanes if width >= lanes else 1, fade))
            done += width
        return sequence(parts)

    def _part(self, first: Expr, count: Expr, start: int, width: int, lanes: int, fade: Var) -> Stmt:
        """Elements ``start .. start + width`` of the rows' sums."""
        sums = [_buffer(f"sum{row}", width) for row in range(FEW)]

        def key(j: Expr) -> Stmt:
            def one(row: int, acc: Var) -> Stmt:
                def at(c: Expr) -> Stmt:
                    v = self.kernel._v(self.batch, self.kv, first + j, start + c)
                    return BufferStore(acc, acc[c] + self.scores[row, j] * v, [c])

                return _vectors(width, lanes, at)

            return sequence([one(row, acc) for row, acc in enumerate(sums)])

        def load(row: int, acc: Var) -> Stmt:
            return _vectors(width, lanes, lambda c: BufferStore(acc, self.o[row, start + c] * fade[row], [c]))

        def store(row: int, acc: Var) -> Stmt:
            return _vectors(width, lanes, lambda c: BufferStore(self.o, acc[c], [row, start + c]))

        loads = [load(row, acc) for row, acc in enumerate(sums)]
        stores = [store(row, acc) for row, acc in enumerate(sums)]
        return scope("part", sequence(loads, loop(count, key, name="key"), stores), sums)


def _buffer(name: str, *extents: int) -> Var:
    return tirx.decl_buffer([index(extent) for extent in extents], "float32", name)


def _vectors(width: int, lanes: int, write: Callable[[Expr], Stmt]) -> Stmt:
    """One statement for each vector of so many elements; ``write`` gets the element."""

    def part(at: int) -> Stmt:
        return vector(lanes, lambda lane: write(lane + at))

    return sequence([part(at) for at in range(0, width, lanes)])


def _zeros(sums: list[Var], lanes: int) -> list[Stmt]:
    def zero(acc: Var) -> Stmt:
        return _vectors(int(acc.shape[0]), lanes, lambda c: BufferStore(acc, ZERO, [c]))

    return [zero(acc) for acc in sums]


def _across(buffer: Var, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Stmt:
    """Fold lanes pairwise into lane 0."""

    def halve(half: int) -> Stmt:
        return vector(half, lambda lane: BufferStore(buffer, combine(buffer[lane], buffer[lane + half]), [lane]))

    return sequence([halve(lanes >> step) for step in range(1, lanes.bit_length())])
