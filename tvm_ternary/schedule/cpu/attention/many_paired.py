"""As `many_packed`, and the product with values is one of integers, too: dot products of pairs of 16-bit numbers.

Of a block, a query's weights are exp(score - the block's largest score of the query), as whole numbers up to
`LARGEST_WEIGHT`. The values come rounded (`kernels.paired_values`). Their product is exact; once a block it becomes
float, times exp(the block's largest score - the largest of all), and what the weights add up to is the sum of the whole
numbers, so that results are weighted means. A block that a mask adds something to is none of these: its values are read
in float, up to the last key that the tile sees, so that what is hidden has no part in the scale of what is seen.

With W and V the largest weight and value, M the largest magnitude of an element in a block, and P the block's share of
all weights, a block adds to the error of a result at most

    P M / (2 V) + 64 g / (2 W) (mean of |v - result| over the block's keys),

where g is the block's largest weight over the sum of all. That sum is at least the sum of g over the blocks, so that
all blocks together err by at most max M / 4,094 + max |v - result| / 512, however long the text is and however flat
its weights are. The polynomial of the weights adds a tenth to the second part.

Vector operations for a block of 64 keys, a tile of 32 queries and heads of 128, sixteen lanes, beside those of
`many_packed`:

=====================  ======  ====================================================================
weights and their sum   2,200  128 x (14.5 for two in a word and their sum, 3 for score and maximum)
values                  8,192  32 pairs of keys x 128 x 2 dot products of pairs
their scales            1,000  256 x (conversion, 2 multiplications, multiply-add)
=====================  ======  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, IfThenElse, Let, Ramp, Select, Stmt, Var

from tvm_ternary.kernels.paired_values import LARGEST_WEIGHT
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention.many import Extremes, Tile
from tvm_ternary.schedule.cpu.attention.many_packed import ManyPacked, PackedOperands
from tvm_ternary.schedule.cpu.attention.operands import NOTHING, ZERO, across, buffer
from tvm_ternary.schedule.cpu.attention.packed import Cache
from tvm_ternary.schedule.cpu.attention.values import PairedValues, paired
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, vector
from tvm_ternary.schedule.cpu.vector_math import LOG2E, ROUND, exp_to_one
from tvm_ternary.schedule.intrinsics import ByteDot, PairDot

_PAIRS = BLOCK // 2
_LEAST = -20.0
"""Weights of scores that are so far below the largest are nothing: `LARGEST_WEIGHT` times e to this is below 1/2."""
_POWER = (0.00958285, 0.05590643, 0.24024099, 0.69312419, 1.0)
"""Of 2 to the f, f within 1/2: relative error 3e-6, a twentieth of a step of the weights; exact for 0."""


class ManyPaired(ManyPacked):
    """A tile of queries over packed blocks whose values are rounded, then over the last keys."""

    def __init__(
        self,
        on: PackedOperands,
        cache: Cache,
        dot: ByteDot,
        tile: Tile,
        extremes: Extremes | None,
        values: PairedValues,
        pairs: PairDot,
    ) -> None:
        super().__init__(on, cache, dot, tile, extremes)
        self.values, self.pairs = values, pairs
        self.weights = tirx.decl_buffer([index(_PAIRS), index(self.width)], "int32", "weights")
        self.added = tirx.decl_buffer([index(self.lanes)], "int32", "added")
        self.counted, self.gain = buffer("counted", self.width), buffer("gain", self.width)

    def write(self) -> Stmt:
        """All keys for this tile."""
        return scope("paired", super().write(), [self.weights, self.added, self.counted, self.gain])

    def _packed_block(self, block: Expr) -> Stmt:
        first, peak, own = block * BLOCK, self.state["peak"], self.state["block_peak"]
        # The largest score of the block itself.
        start = self._fill(lambda c: BufferStore(own, NOTHING, [c]))
        weigh = sequence(self._round_weights(), self._add_paired(block))
        if self.shape.mask:
            join = self._fill(lambda c: BufferStore(own, tirx.max(peak[c], own[c]), [c]))
            exact = sequence(join, self._weigh(self.on, first, index(BLOCK)))
            look, nothing = self._adds_nothing(first)
            weigh = sequence(look, IfThenElse(nothing, weigh, exact))
        return self._block(self.on, first, index(BLOCK), sequence(start, self.block_scores.write(block)), weigh)

    def _adds_nothing(self, first: Expr) -> tuple[Stmt | list[Stmt], Expr]:
        """Whether the mask adds nothing in a block, and what has to be done to know it."""
        if self.extremes is not None:
            return [], self._plain(first)
        added, lanes, zero = self.added, self.lanes, tirx.const(0, "int32")

        def look(lane: Expr, start: Expr) -> Stmt:
            value = self.on.mask_at(self.tile.batch, self.tile.head, index(0), first + start + lane)
            # Without its sign, for there are two zeros.
            bits = tirx.shift_left(tirx.reinterpret("int32", value), tirx.const(1, "int32"))
            return BufferStore(added, tirx.bitwise_or(added[lane], bits), [lane])

        statements = sequence(
            vector(lanes, lambda lane: BufferStore(added, zero, [lane])),
            loop(BLOCK // lanes, lambda n: vector(lanes, lambda lane: look(lane, n * lanes)), name="part"),
            across(added, lanes, tirx.bitwise_or),
        )
        return statements, tirx.EQ(added[0], zero)

    def _round_weights(self) -> Stmt:
        """The weights of a block, two keys in a word, and what they add up to."""
        scores, state, counted, gain = self.buffers["scores"], self.state, self.counted, self.gain
        peak, total, own, fade = (state[name] for name in ("peak", "total", "block_peak", "fade"))
        new, moved = buffer("new", self.width), [buffer(f"moved{half}", self.lanes) for half in range(2)]
        unit = tirx.const(1 / LARGEST_WEIGHT, "float32")

        def base(x: Expr) -> Expr:
            return Select(tirx.EQ(x, NOTHING), ZERO, x)

        def start(c: Expr) -> Stmt:
            return sequence(
                BufferStore(new, tirx.max(peak[c], own[c]), [c]),
                BufferStore(fade, exp_to_one(peak[c] - base(new[c])), [c]),
                BufferStore(gain, exp_to_one(own[c] - base(new[c])) * unit, [c]),
                BufferStore(peak, new[c], [c]),
                BufferStore(own, base(own[c]), [c]),
                BufferStore(counted, ZERO, [c]),
            )

        def two(n: Expr, c: Expr) -> Stmt:
            lane = tirx.floormod(c, index(self.lanes))
            # In float, the sum tells of scores that are NaN.
            numbers = [one[lane] - tirx.const(ROUND, "float32") for one in moved]
            return sequence(
                [BufferStore(one, _weight(scores[2 * n + half, c] - own[c]), [lane]) for half, one in enumerate(moved)],
                BufferStore(self.weights, paired(*(one[lane] for one in moved)), [n, c]),
                BufferStore(counted, counted[c] + (numbers[0] + numbers[1]), [c]),
            )

        body = sequence(
            self._fill(start),
            loop(_PAIRS, lambda n: self._fill(lambda c: two(n, c)), name="pair"),
            self._fill(lambda c: BufferStore(total, total[c] * fade[c] + counted[c] * gain[c], [c])),
        )
        return scope("weights", body, [new, *moved])

    def _add_paired(self, block: Expr) -> Stmt:
        """Add the weighted values of a block."""
        whole, rest = divmod(self.shape.value_size, self.rows)
        at = [self.tile.batch, self.kv, block]
        parts = [loop(whole, lambda n: self._add_rows(at, n * self.rows, self.rows), name="tile")] if whole else []
        return sequence([*parts, *([self._add_rows(at, index(whole * self.rows), rest)] if rest else [])])

    def _add_rows(self, at: list[Expr], start: Expr, rows: int) -> Stmt:
        """So many elements from ``start`` on: a register tile."""
        lanes, o, fade = self.pairs.lanes, self.buffers["o"], self.state["fade"]
        sums = [tirx.decl_buffer([index(self.width)], "int32", f"sum{row}") for row in range(rows)]
        zero = tirx.const(0, "int32")

        def halves(words: Expr) -> Expr:
            return T.reinterpret(words, dtype=f"int16x{2 * lanes}")

        def step(n: Expr) -> Stmt:
            def one(acc: Var, row: int, c: int) -> Stmt:
                word = T.Broadcast(self.values.words[tuple(self.values.place(at, n, start + row))], lanes)
                total, weights = acc.vload([c], f"int32x{lanes}"), self.weights.vload([n, c], f"int32x{lanes}")
                return BufferStore(acc, self.pairs.add(total, halves(weights), halves(word)), [Ramp(c, 1, lanes)])

            places = range(0, self.width, lanes)
            return sequence([one(acc, row, c) for row, acc in enumerate(sums) for c in places])

        def clear(acc: Var) -> Stmt:
            return self._fill(lambda c: BufferStore(acc, zero, [c]))

        def add(acc: Var, d: Expr, c: Expr) -> Stmt:
            more = acc[c].astype("float32") * self.values.scale[(*at, d)] * self.gain[c]
            return BufferStore(o, o[d, c] * fade[c] + more, [d, c])

        def store(acc: Var, row: int) -> Stmt:
            return self._fill(lambda c: add(acc, start + row, c))

        stores = [store(acc, row) for row, acc in enumerate(sums)]
        body = sequence([clear(acc) for acc in sums], loop(_PAIRS, step, name="pair"), stores)
        return scope("values", body, sums)


def _weight(x: Expr) -> Expr:
    """`LARGEST_WEIGHT` times e to the x, for x of at most 0, plus `ROUND`, which leaves the nearest whole number."""

    def const(value: float) -> Expr:
        return tirx.const(value, "float32")

    def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
        var = Var("t", "float32")
        return Let(var, value, body(var))

    # With the bias of an exponent, a shift makes the nearest integer a power of two.
    biased = const(ROUND + 127)

    def scaled(rounded: Expr, f: Expr) -> Expr:
        power = tirx.reinterpret("float32", tirx.reinterpret("int32", rounded) << tirx.const(23, "int32"))
        total = const(LARGEST_WEIGHT * _POWER[0])
        for coefficient in _POWER[1:]:
            total = total * f + const(LARGEST_WEIGHT * coefficient)
        return total * power + const(ROUND)

    def within(x: Expr) -> Expr:
        return let(
            x * const(LOG2E) + biased,
            lambda rounded: let(x * const(LOG2E) - (rounded - biased), lambda f: scaled(rounded, f)),
        )

    # A NaN is not below, and stays.
    return let(x, lambda x: let(Select(x < const(_LEAST), const(_LEAST), x), within))
