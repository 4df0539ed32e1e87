"""The last tokens in a step over a ternary cache, in float: eight at a time, a score a thread."""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.plan import TILE, TOKENS, placed
from tvm_ternary.schedule.cuda.attention.warp import NOTHING, OVER_T, Warp, add, const, fold, local
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any


class LastTokens(Warp):
    """What a warp does with the last tokens that it has."""

    def over_last_tokens(self) -> None:
        recent, stride = self.b["recent"][self.batch], self.stride
        # Dealt out to the warps behind the one that has the last block.
        first = self.first + self.count * stride - self.b["full"][self.batch]
        chunks = (recent + (TOKENS - 1)) // TOKENS
        with T.serial(0, T.max(chunks - first + (stride - 1), 0) // stride) as i:
            self._chunk((first + i * stride) * TOKENS, recent)

    def _chunk(self, start: Expr, recent: Expr) -> None:
        """Eight tokens: a score for each thread, of token g and row t; then values, elements as blocks have them."""
        step = self.step
        scores = local(step.tiles)
        self._score_chunk(start, recent, scores)
        with unrolled(step.tiles) as tile:
            self.softmax(tile, scores, 1)
        with unrolled(step.tiles) as tile, unrolled(step.passes * 4) as n:
            place = tile * (step.passes * 4) + n
            T.buffer_store(self.o, self.o[place] * self.fade[tile], [place])
        four, weight = local(4), local(step.tiles)
        with unrolled(TOKENS) as j:
            with unrolled(step.tiles) as tile:
                T.buffer_store(weight, own.from_lane_float(scores[tile], 4 * j + self.t), [tile])
            with T.If(start + j < recent), T.Then(), unrolled(step.passes) as r:
                element = 4 * (8 * r + self.g)
                with T.If(element < self.shape.value_size), T.Then():
                    source = placed(self.shape.value, self.batch, self.kv, start + j, element)
                    T.evaluate(device.load_floats(at(four, 0), at(self.b["v"], *source)))
                    with unrolled(step.tiles) as tile:
                        for i in range(4):
                            place = (tile * step.passes + r) * 4 + i
                            T.buffer_store(self.o, self.o[place] + weight[tile] * four[i], [place])

    def _score_chunk(self, start: Expr, recent: Expr, scores: Expr) -> None:
        step = self.step
        dots, k, q = local(step.rows), local(4), local(4)
        token = start + self.g
        with unrolled(step.rows) as row:
            T.buffer_store(dots, const(0.0), [row])
        with unrolled(ceil_div(self.shape.size, 16)) as pp:
            d = (4 * pp + self.t) * 4
            with T.If(T.And(token < recent, d < self.shape.size)), T.Then():
                source = placed(self.shape.key, self.batch, self.kv, token, d)
                T.evaluate(device.load_floats(at(k, 0), at(self.b["k"], *source)))
                with unrolled(step.rows) as row:
                    place = self.query_at(row, self.place_of(4 * pp + self.t))
                    T.evaluate(device.load_shared_floats(at(q, 0), self.shared.data, place))
                    for i in range(4):
                        T.buffer_store(dots, dots[row] + q[i] * k[i], [row])
        with unrolled(step.rows) as row:
            fold(dots, row, OVER_T, add)
        with unrolled(step.tiles) as tile:
            for t in range(TILE):
                with T.If(self.t == t), T.Then():
                    T.buffer_store(scores, dots[tile * TILE + t], [tile])
            # The last tokens are those that ask: none sees one behind it.
            query = (self.first_row + tile * TILE + self.t) % step.queries
            seen = T.And(token < recent, token <= recent - step.queries + query)
            score = scores[tile] * const(self.shape.scale * math.log2(math.e))
            T.buffer_store(scores, T.Select(seen, score, const(NOTHING)), [tile])
