"""Packed blocks in a step over a ternary cache: scores and sums of values by tensor cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK, digits
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.plan import TILE, head_and_query, placed
from tvm_ternary.schedule.cuda.attention.warp import OVER_G, OVER_T, Warp, add, const, fold, local
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any

SMALLEST = 2.0**-100
"""What is smaller is rounded to 0."""


class Blocks(Warp):
    """What a warp does with the blocks that it has."""

    def begin_copies(self) -> None:
        """Of the queries, and of the first block that this warp has."""
        self.stride = self.step.splits * self.step.warps
        self.first = self.split * self.step.warps + self.warp
        self.count = T.max(self.b["full"][self.batch] - self.first + (self.stride - 1), 0) // self.stride
        self._copy_queries()
        for copy in (self._copy_keys, self._copy_values):
            with T.If(self.count > 0), T.Then():
                copy(self.first)
            T.evaluate(device.commit_copies())
        T.evaluate(device.wait_copies(1)())
        T.evaluate(T.tvm_storage_sync("shared"))

    def over_blocks(self) -> None:
        with T.serial(0, self.count) as i:
            self._block(self.first + i * self.stride, i + 1 < self.count)

    def _block(self, block: Expr, more: Expr) -> None:
        step = self.step
        asked, away, scale = (
            local(step.tiles * step.steps * 4, "int32"),
            local(step.tiles, "int32"),
            local(step.tiles),
        )
        scores = local(step.tiles * 8)
        self._arrived()
        with unrolled(step.tiles) as tile:
            self._ask(tile, asked, away, scale)
        with unrolled(2) as r:
            acc = self._products(0, asked, step.steps, lambda s: self._key_place(r, s, 0))
            with unrolled(step.tiles) as tile, unrolled(4) as n:
                score = T.Cast("float32", self._whole(acc, tile, n) - away[tile]) * scale[tile]
                T.buffer_store(scores, score, [(tile * 2 + r) * 4 + n])
        T.evaluate(own.sync_warp())
        with T.If(more), T.Then():
            self._copy_keys(block + self.stride)
        T.evaluate(device.commit_copies())
        self._arrived()
        weights = local(step.tiles * 4, "int32")
        with unrolled(step.tiles) as tile:
            self.softmax(tile, scores, 8)
            self._weigh(tile, scores, weights, away, scale)
        with unrolled(step.passes) as r:
            acc = self._products(1, weights, 1, lambda _: self._value_place(r, 0))
            with unrolled(step.tiles) as tile, unrolled(4) as n:
                value = T.Cast("float32", self._whole(acc, tile, n) - away[tile]) * scale[tile]
                place = (tile * step.passes + r) * 4 + n
                T.buffer_store(self.o, self.o[place] * self.fade[tile] + value, [place])
        T.evaluate(own.sync_warp())
        with T.If(more), T.Then():
            self._copy_values(block + self.stride)
        T.evaluate(device.commit_copies())

    def _arrived(self) -> None:
        """Wait for the older one of two groups of copies, of the whole warp."""
        T.evaluate(device.wait_copies(1)())
        T.evaluate(own.sync_warp())

    def _key_place(self, r: Expr, s: Expr, piece: Expr) -> Expr:
        return self.mine + ((r * self.step.steps + s) * self.step.pieces(0) + piece) * 512 + self.lane * 16

    def _value_place(self, r: Expr, piece: Expr) -> Expr:
        return self.mine + self.step.values_at + (r * self.step.pieces(1) + piece) * 512 + self.lane * 16

    def _words(self, operand: int, unit: Expr, terms: int) -> list[tuple[str, Expr]]:
        """The arrays and the words that hold sixteen terms; the last ones where there are no more."""
        name, planes = ("key", "value")[operand], self.step.planes[operand]
        found = []
        for n, field in enumerate(digits(planes)):
            count = ceil_div(terms, field.terms)
            words = [unit] if field.count == 1 else [2 * unit, 2 * unit + 1]
            found += [(f"{name}_words{n}", T.min(word, count - 1)) for word in words]
        return found

    def _copy_keys(self, block: Expr) -> None:
        step, where = self.step, [self.batch, self.kv, block]
        with unrolled(2) as r, unrolled(step.steps) as s:
            for piece, (name, word) in enumerate(self._words(0, 4 * s + self.t, self.shape.size)):
                source = at(self.b[name], *where, self.g // 2, word, 4 * (2 * r + self.g % 2))
                T.evaluate(device.copy_rows(16)(self.shared.data, self._key_place(r, s, piece), source, 16))
        pieces = step.padded // 4
        with unrolled(ceil_div(pieces, 32)) as i:
            piece = i * 32 + self.lane
            with T.If(piece < pieces), T.Then():
                there = piece * 4 < self.shape.size
                source = at(self.b["key_scale"], *where, T.min(piece * 4, self.shape.size - 4))
                to = self.mine + step.key_scale_at + self.place_of(piece) * 16
                T.evaluate(device.copy_rows(16)(self.shared.data, to, source, T.Select(there, 16, 0)))

    def _copy_values(self, block: Expr) -> None:
        step, where = self.step, [self.batch, self.kv, block]
        groups = ceil_div(self.shape.value_size, LANES)
        with unrolled(step.passes) as r:
            group = T.min(2 * r + self.g // 4, groups - 1)
            for piece, (name, word) in enumerate(self._words(1, self.t, BLOCK)):
                source = at(self.b[name], *where, group, word, 4 * (self.g % 4))
                T.evaluate(device.copy_rows(16)(self.shared.data, self._value_place(r, piece), source, 16))
        with T.If(self.lane < BLOCK // 4), T.Then():
            to = self.mine + step.value_scale_at + self.lane * 16
            T.evaluate(device.copy_rows(16)(self.shared.data, to, at(self.b["value_scale"], *where, self.lane * 4), 16))

    def _ask(self, tile: Expr, asked: Expr, away: Expr, scale: Expr) -> None:
        """A row's queries times the block's scales, in 16 bits: of thread (g, t) row g / 2, and byte g % 2 of it.

        The sum of the numbers and their scale go to the threads that get the row's scores: those of its t.
        """
        step, x = self.step, local(4)
        peak, total = local(1, "int32"), local(1, "int32")
        T.buffer_store(peak, T.int32(0), [0])
        T.buffer_store(total, T.int32(0), [0])
        with unrolled(step.steps) as s, unrolled(4) as j:
            self._scaled_query(tile, s * 4 + j, x)
            for i in range(4):
                T.buffer_store(peak, T.max(peak[0], own.magnitude_bits(x[i])), [0])
        fold(peak, 0, OVER_T, T.max)
        largest = device.float_of(peak[0])
        # Made once more, for all of a row would be half of a thread's registers.
        with unrolled(step.steps) as s, unrolled(4) as j:
            self._scaled_query(tile, s * 4 + j, x)
            n = (tile * step.steps + s) * 4 + j
            T.buffer_store(asked, own.round_four(at(x, 0), _inverse(largest), self.g % 2), [n])
            T.buffer_store(total, own.sum_bytes(asked[n], total[0]), [0])
        fold(total, 0, OVER_T, add)
        high, low = (own.from_lane_int(total[0], 8 * self.t + 4 * part) for part in range(2))
        offset = (3 ** step.planes[0] - 1) // 2
        T.buffer_store(away, (256 * high + low) * offset, [tile])
        of_row = own.from_lane_float(largest, 8 * self.t)
        T.buffer_store(scale, of_row * const(self.shape.scale * math.log2(math.e) / own.MOST), [tile])

    def _scaled_query(self, tile: Expr, quad: Expr, x: Expr) -> None:
        """Four of a thread's elements of its row, times the block's scales."""
        k, place = local(4), quad * 4 + self.t
        query, scale = self.query_at(tile * TILE + self.g // 2, place), self.mine + self.step.key_scale_at + place * 16
        T.evaluate(device.load_shared_floats(at(x, 0), self.shared.data, query))
        T.evaluate(device.load_shared_floats(at(k, 0), self.shared.data, scale))
        for i in range(4):
            T.buffer_store(x, x[i] * k[i], [i])

    def _products(self, operand: int, right: Expr, steps: int, place: Callable[[Expr], Expr]) -> Expr:
        """32 rows of a block, four for each g, multiplied: for each tile, two products of four sums."""
        step, pieces = self.step, self.step.pieces(operand)
        acc, quads = local(step.tiles * 8, "int32"), local(16, "uint32")
        words = local(4 * pieces, "uint32")
        with unrolled(step.tiles * 8) as i:
            T.buffer_store(acc, T.int32(0), [i])
        with unrolled(steps) as s:
            for piece in range(pieces):
                T.evaluate(device.load_shared(at(words, 4 * piece), self.shared.data, place(s) + 512 * piece))
            decode = {1: device.decode_codes, 2: own.decode_pairs, 3: own.decode_threes}[pieces]
            with unrolled(4) as n:
                T.evaluate(decode(at(quads, 4 * n), *(words[4 * piece + n] for piece in range(pieces))))
            with unrolled(step.tiles) as tile, unrolled(2) as e, unrolled(2) as half:
                left = [quads[4 * (2 * e + row) + 2 * half + k] for k in range(2) for row in range(2)]
                numbers = [T.Cast("uint32", right[(tile * steps + s) * 4 + 2 * half + k]) for k in range(2)]
                T.evaluate(device.mma_bytes(at(acc, (tile * 2 + e) * 4), *left, *numbers))
        return acc

    @staticmethod
    def _whole(acc: Expr, tile: Expr, n: Expr) -> Expr:
        """The product of both bytes, of the n-th row of four."""
        place = (tile * 2 + n // 2) * 4 + n % 2 * 2
        return 256 * acc[place] + acc[place + 1]

    def _copy_queries(self) -> None:
        """Begin to copy the rows' queries to shared memory; zeros behind the ends of rows and of each."""
        step = self.step
        pieces = step.padded // 4
        with unrolled(ceil_div(step.rows * pieces, step.threads)) as i:
            index = i * (step.threads) + self.thread
            with T.If(index < step.rows * pieces), T.Then():
                row, piece = self.first_row + index // pieces, index % pieces
                there = T.And(row < step.all_rows, piece * 4 < self.shape.size)
                head, query = head_and_query(step, self.kv, T.min(row, step.all_rows - 1))
                d = T.min(piece * 4, self.shape.size - 4)
                source = at(self.b["q"], *placed(self.shape.query, self.batch, head, query, d))
                to = self.query_at(index // pieces, self.place_of(piece))
                T.evaluate(device.copy_rows(16)(self.shared.data, to, source, T.Select(there, 16, 0)))

    def _weigh(self, tile: Expr, scores: Expr, weights: Expr, away: Expr, scale: Expr) -> None:
        """Weights times the tokens' scales, in 16 bits, brought to the threads that multiply with them."""
        step = self.step
        peak, total, four = local(1, "int32"), local(2, "int32"), local(4)
        bytes_ = local(4, "int32")
        T.buffer_store(peak, T.int32(0), [0])
        for part in range(2):
            T.buffer_store(total, T.int32(0), [part])
        with unrolled(2) as r:
            quad = self.g // 2 * 4 + 2 * r + self.g % 2
            place = self.mine + step.value_scale_at + quad * 16
            T.evaluate(device.load_shared_floats(at(four, 0), self.shared.data, place))
            for i in range(4):
                n = (tile * 2 + r) * 4 + i
                T.buffer_store(scores, scores[n] * four[i], [n])
                T.buffer_store(peak, T.max(peak[0], own.magnitude_bits(scores[n])), [0])
        fold(peak, 0, OVER_G, T.max)
        largest = device.float_of(peak[0])
        with unrolled(2) as r:
            for part in range(2):
                rounded = own.round_four(at(scores, (tile * 2 + r) * 4), _inverse(largest), part)
                T.buffer_store(bytes_, rounded, [2 * r + part])
                T.buffer_store(total, own.sum_bytes(bytes_[2 * r + part], total[part]), [part])
        both = local(1, "int32")
        T.buffer_store(both, 256 * total[0] + total[1], [0])
        fold(both, 0, OVER_G, add)
        T.buffer_store(away, both[0] * ((3 ** step.planes[1] - 1) // 2), [tile])
        T.buffer_store(scale, largest * const(1 / own.MOST), [tile])
        for j in range(4):
            source = 4 * (2 * self.t + j % 2) + self.g // 2
            high, low = (own.from_lane_int(bytes_[2 * (j // 2) + part], source) for part in range(2))
            T.buffer_store(total, high, [0])
            T.buffer_store(total, low, [1])
            T.buffer_store(weights, T.Select(self.g % 2 == 0, total[0], total[1]), [tile * 4 + j])


def _inverse(largest: Expr) -> Expr:
    """What numbers of at most that size are multiplied by to be rounded."""
    return T.Select(largest >= const(SMALLEST), const(own.MOST) / largest, const(0.0))
