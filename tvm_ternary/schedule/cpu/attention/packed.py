"""A step of decoding with ternary keys and values: the last tokens in float, then whole blocks as they lie packed.

The last tokens come first, for after them scores are known beside which hidden ones, of whatever large mask, are
nothing: of the packed blocks, those before the first and behind the last that a query of the tile sees cost reading
their mask.

A block's scales are multiplied into the queries, and the tokens' scales into the weights, so that what is left is
products with whole numbers of a few bits (`multiplied`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, IfThenElse, PrimFunc, Ramp, Select, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, packed_words
from tvm_ternary.schedule.cpu.attention.few import Few, tile_rows
from tvm_ternary.schedule.cpu.attention.multiplied import Multiplied
from tvm_ternary.schedule.cpu.attention.operands import (
    HIDDEN,
    KEYS,
    NOTHING,
    Operands,
    Run,
    across,
    buffer,
    tiles,
)
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space, static, vector
from tvm_ternary.schedule.cpu.simd import Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math
from tvm_ternary.schedule.intrinsics import ByteDot, PairDot

assert KEYS == BLOCK, "scores of a block have the place of a block of keys"

SPAN = 4
"""Blocks whose scores are turned into weights together: what is done once for them is folding across lanes."""


@dataclass(frozen=True)
class Packed:
    """How keys and values lie, and what they are multiplied with.

    Parameters
    ----------
    key_planes, value_planes : int
        No planes of values: those of blocks stay float.
    dot : ByteDot or None
        Of the tier, to multiply bytes; None for floats.
    pairs : PairDot or None
        Of the tier, to multiply values of a prompt, which have no planes, as 16-bit numbers; None for floats.
    trits : bool
        Whether queries are rounded to trits, not to bytes; with a dot product of bytes.
    counts : bool
        Whether the tier counts the bits of a lane in one instruction.
    """

    key_planes: int
    value_planes: int
    dot: ByteDot | None
    pairs: PairDot | None = None
    trits: bool = False
    counts: bool = False


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
    def float_values(self) -> Var:
        """In place of words and scales, where values have no planes."""
        return self._buffer("values", "float32", BLOCK, self.shape.value_size)

    @property
    def value_params(self) -> list[Var]:
        return [*self.values, self.value_scale] if self.packed.value_planes else [self.float_values]

    @cached_property
    def full(self) -> Var:
        return tirx.decl_buffer([self.batch], "int32", "full")

    @cached_property
    def recent(self) -> Var:
        return tirx.decl_buffer([self.batch], "int32", "recent")

    @property
    def packed_params(self) -> list[Var]:
        """What is packed, in the order of arguments."""
        return [*self.keys, self.key_scale, *self.value_params]

    def value_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        """An element of a value of a block, where these are float."""
        block, token = tirx.floordiv(key, index(BLOCK)), tirx.floormod(key, index(BLOCK))
        return self.float_values[batch, kv, block, token, d]

    def counts(self, batch: Expr) -> tuple[Expr, Expr]:
        """Blocks and last tokens of a sequence."""
        return self.full[batch].astype("int64"), self.recent[batch].astype("int64")

    def tail(self, k: Var, v: Var, layouts: tuple[str, str], batch: Expr) -> Run:
        """The last tokens of a sequence, which lie in these."""
        full, recent = self.counts(batch)
        return Run(k, v, *layouts, full * BLOCK, recent)

    def _words(self, name: str, rows: int, terms: int, planes: int) -> list[Var]:
        return [
            self._buffer(f"{name}_words{n}", "uint32", *packed_words(rows, terms, part))
            for n, part in enumerate(digits(planes))
        ]

    def _buffer(self, name: str, dtype: str, *inner: int) -> Var:
        extents = [self.batch, index(self.shape.kv_heads), self.blocks, *map(index, inner)]
        return tirx.decl_buffer(extents, dtype, name)


class FewPacked(Few):
    """A tile of rows over some tokens in float, then over the packed blocks of a sequence.

    Parameters
    ----------
    on : Operands
    cache : Cache
    batch, kv, first : Expr
    runs : sequence of Run
        The tokens in float.
    causal : bool
        Whether the queries are the last tokens of all, none of which sees one behind it. Else all see what the mask
        lets them see.
    """

    def __init__(
        self, on: Operands, cache: Cache, batch: Expr, kv: Expr, first: Expr, runs: Sequence[Run], *, causal: bool
    ) -> None:
        super().__init__(on, batch, kv, first, join=False)
        self.cache, self.runs, self.causal = cache, runs, causal
        self.full, self.recent = cache.counts(batch)
        shape, packed = self.shape, cache.packed
        self.asked = Multiplied(
            "q", self.rows, shape.size, 1, self.lanes, packed.dot, packed.key_planes, trits=packed.trits
        )
        self.weights = (
            Multiplied("p", self.rows, BLOCK, SPAN, self.lanes, packed.dot, packed.value_planes)
            if packed.value_planes
            else None
        )
        self.scores = buffer("scores", self.rows, SPAN * BLOCK)

    def write(self) -> Stmt:
        """All keys for these rows."""
        multiplied = [self.asked, *([self.weights] if self.weights else [])]
        body = sequence([one.clear() for one in multiplied], super().write())
        return scope("packed", body, [buffer for one in multiplied for buffer in one.buffers])

    def _over_keys(self) -> Stmt:
        floats = [
            run.blocks(lambda first, count, run=run: self._block(run, first, count))  # type: ignore[misc]
            for run in self.runs
        ]
        if "s" not in self.shape.mask:
            return sequence(floats, self._spans(index(0), self.full))
        seen = tirx.decl_buffer([index(2)], "int64", "seen")
        return scope("seen", sequence(floats, self._find(seen), self._spans(seen[0], seen[1])), [seen])

    def _spans(self, start: Expr, stop: Expr) -> Stmt:
        """The blocks from ``start`` to ``stop``."""

        def span(n: Expr) -> Stmt:
            return self._span(start + n * SPAN, tirx.min(index(SPAN), stop - start - n * SPAN))

        return loop(tirx.floordiv(stop - start + (SPAN - 1), index(SPAN)), span, name="span")

    def _find(self, seen: Var) -> Stmt:
        """The first block that a row sees, and the one behind the last."""
        if self.shape.hidden is not None:
            return self._find_bits(seen)
        lanes, peak = self.lanes, self.state["peak"]
        low, found = buffer("low", 1), tirx.decl_buffer([index(lanes)], "int32", "found")
        limit = Select(low[0] > tirx.const(HIDDEN, "float32"), tirx.const(HIDDEN, "float32"), NOTHING)

        def look(block: Expr, row: Expr, start: Expr) -> Stmt:
            head, query = self._at(row)

            def one(lane: Expr) -> Stmt:
                item = self.on.mask_at(self.batch, head, query, block * BLOCK + start * lanes + lane)
                # Written so that a NaN is seen.
                seen = Select(item <= limit, tirx.const(0), tirx.const(1))
                return BufferStore(found, tirx.max(found[lane], seen), [lane])

            return vector(lanes, one)

        def block(n: Expr) -> Stmt:
            keep = sequence(
                BufferStore(seen, tirx.min(seen[0], n), [0]),
                BufferStore(seen, n + 1, [1]),
            )
            return sequence(
                vector(lanes, lambda lane: BufferStore(found, tirx.const(0), [lane])),
                loop(
                    1 if self._rows_are_alike else self.rows,
                    lambda row: loop(BLOCK // lanes, lambda start: look(n, row, start), name="part"),
                    name="row",
                ),
                across(found, lanes, tirx.max),
                IfThenElse(found[0] > 0, keep, None),
            )

        body = sequence(
            BufferStore(low, peak[0], [0]),
            loop(self.rows, lambda row: BufferStore(low, tirx.min(low[0], peak[row]), [0]), name="row"),
            BufferStore(seen, self.full, [0]),
            BufferStore(seen, self.full, [1]),
            loop(self.full, block, name="block"),
        )
        return scope("find", body, [low, found])

    @property
    def _rows_are_alike(self) -> bool:
        """Whether the mask is the same for all of them."""
        return "h" not in self.shape.mask and ("m" not in self.shape.mask or static(self.on.queries) == 1)

    def _find_bits(self, seen: Var) -> Stmt:
        nothing = tirx.const(0, "int64")

        def is_hidden(block: Expr, valid: Expr) -> Expr:
            rows = range(1 if self._rows_are_alike else self.rows)
            words = reduce(tirx.bitwise_or, [self._word(row, block) for row in rows])
            # Not read where it is none.
            return tirx.EQ(tirx.if_then_else(valid, words, tirx.const(-1, "int64")), nothing)

        first, last = seen[0], seen[1]
        narrow = [
            tirx.While(is_hidden(first, first < self.full), BufferStore(seen, first + 1, [0])),
            tirx.While(is_hidden(last - 1, last > first), BufferStore(seen, last - 1, [1])),
        ]
        return sequence(
            BufferStore(seen, nothing, [0]),
            BufferStore(seen, self.full, [1]),
            IfThenElse(self._hidden_is_nothing(), sequence(narrow), None),
        )

    def _masked(self, row: int, key: Expr, score: Expr) -> Expr:
        if not self.causal:
            return super()._masked(row, key, score)
        _, query = self._at(row)
        seen = key <= self.full * BLOCK + self.recent - self.on.queries + query
        return Select(seen, score, NOTHING)

    def _span(self, first: Expr, count: Expr) -> Stmt:
        """Some blocks: scores one by one, then weights and values of all."""
        tokens = count * BLOCK
        return sequence(
            loop(count, lambda n: self._scores_of(first + n, n * BLOCK), name="block"),
            loop(self.rows, lambda row: self._softmax(row, tokens), name="row"),
            self._packed_values(self.weights, first, count)
            if self.weights
            else self._values(self.cache, first * BLOCK, tokens),
        )

    def _packed_values(self, weights: Multiplied, first: Expr, count: Expr) -> Stmt:
        def weigh(row: Expr) -> Stmt:
            # The scales of the blocks lie one behind the other, so the token's number may go beyond its block.
            scale = self.cache.value_scale
            return weights.load(
                row, count * BLOCK, lambda j: self.scores[row, j] * scale[self.batch, self.kv, first, j]
            )

        return sequence(
            loop(self.rows, weigh, name="row"),
            weights.multiply(
                self.cache.values,
                lambda n: [self.batch, self.kv, first + n],
                count,
                -(-self.shape.value_size // LANES),
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
            if self.shape.mask and self.shape.hidden is None:
                value = value + self._mask_vector(row, block * BLOCK + start, lanes)
            return [BufferStore(self.scores, value, [row, Ramp(place + start, 1, lanes)])]

        def hide(row: Expr) -> Stmt:
            return self._hide(self._word(row, block), row, index(BLOCK), place)

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
            loop(self.rows, hide, name="row") if self.shape.hidden is not None else [],
        )

    def _mask_vector(self, row: int, key: Expr, lanes: int) -> Expr:
        """What is added to the scores of so many keys."""
        at = self.on.mask_place(self.batch, *self._at(row), key)
        if "s" not in self.shape.mask:
            return T.Broadcast(self.on.mask[tuple(at)], lanes)
        return self.on.mask.vload(at, f"float32x{lanes}")

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

    def tile(at: list[Expr]) -> Stmt:
        tail = cache.tail(on.k, on.v, (shape.key, shape.value), at[0])
        return FewPacked(on, cache, at[0], at[1], at[2] * rows, [tail], causal=True).write()

    body = space(extents, work, tile)
    params = [on.q, *cache.packed_params, on.k, on.v, cache.full, cache.recent, on.out]
    function = PrimFunc(params, scope("root", body))
    function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
    return expand_vector_math(function)
