"""What a thread block of attention of many queries does: scores, softmax and sums of values, block by block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.plan import placed
from tvm_ternary.schedule.cuda.attention.prompt_keys import Keys
from tvm_ternary.schedule.cuda.attention.prompt_mask import InOrder, SeenAlone, Turn
from tvm_ternary.schedule.cuda.attention.prompt_plan import KEYS, PAIRS, ROWS, Prompt
from tvm_ternary.schedule.cuda.attention.prompt_tiles import Tile
from tvm_ternary.schedule.cuda.attention.warp import NOTHING, OVER_T, add, const, fold, local
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any
LOG2E = math.log2(math.e)
_LOWEST = float(np.finfo(np.float32).min)


class Rows:
    """What a thread block makes of its queries.

    A thread has of its rows g and g + 8: scores of a block's keys ``32 n + 8 t + 2 j + c`` at ``16 n + 4 j + c``,
    those of row g + 8 two places behind, and results of elements ``8 n + 2 t + c`` at ``4 n + c``.
    """

    def __init__(self, prompt: Prompt, source: Keys, block: tuple[Expr, Expr, Expr], thread: Expr) -> None:
        self.prompt, self.shape, self.b = prompt, prompt.shape, source.b
        x, self.head, self.batch = block
        self.kv = self.head // self.shape.group
        self.g, self.t = thread % 32 // 4, thread % 4
        self.first = x * prompt.rows
        self.row = self.first + thread // 32 * ROWS + self.g
        self.total, packed = source.total(self.batch), source.packed_of(self.batch)
        self.shared = T.alloc_buffer((prompt.shared_bytes,), "uint8", scope="shared.dyn")
        self.q = local(8 * prompt.steps, "uint32")
        self.o, self.m, self.l = local(4 * prompt.columns), local(2), local(2)
        self.scores, self.fade = local(KEYS // 2), local(2)
        where = self.batch, self.kv, thread
        self.keys, self.values = (
            Tile(prompt, matrix, self.b, self.shared, where, packed) for matrix in (prompt.key, prompt.value)
        )
        self.order: InOrder | SeenAlone = InOrder(self._blocks())
        if self.shape.hidden is not None:
            place = self.batch, self.head, self.first, thread
            self.order = SeenAlone(prompt, self.b["mask"], self.shared, place, self.order.blocks, self._limit)

    def write(self) -> None:
        """All keys that are seen."""
        prompt, order = self.prompt, self.order
        if any(prompt.planes):
            for tile in (self.keys, self.values):
                tile.stage(order.first[0], order.blocks, 0)
            T.evaluate(device.commit_copies())
            T.evaluate(device.wait_copies(0)())
            T.evaluate(T.tvm_storage_sync("shared"))
        for tile in (self.keys, self.values):
            self._prepare(tile, (*order.first, 0))
        self._fetch_queries()
        with unrolled(4 * prompt.columns) as i:
            T.buffer_store(self.o, const(0.0), [i])
        for half in range(2):
            T.buffer_store(self.m, const(NOTHING), [half])
            T.buffer_store(self.l, const(0.0), [half])
        with order.each() as turn:
            self._block(turn)
        T.evaluate(device.wait_copies(0)())
        self._store()

    def _blocks(self) -> Expr:
        """That any of the queries sees."""
        last = self.total
        if self.prompt.causal:
            last = T.min(self.first + self.prompt.rows, self.prompt.queries) + (last - self.prompt.queries)
            last = T.max(last, 0)
        return (last + (KEYS - 1)) // KEYS

    def _limit(self, row: Expr) -> Expr:
        """Keys up to the last one that a query sees, if no mask hides it."""
        if not self.prompt.causal:
            return self.total
        return T.min(row + (1 - self.prompt.queries) + self.total, self.total)

    def _prepare(self, tile: Tile, coming: tuple[Expr, Expr, Expr]) -> None:
        """Make a block before the end ready for a turn, or begin to; and the one behind it, if it is packed."""
        block, after, turn = coming
        tile.fill(block, self.order.blocks, turn)
        tile.stage(after, self.order.blocks, turn + 1)
        T.evaluate(device.commit_copies())

    def _fetch_queries(self) -> None:
        """Of thread (g, t) eight neighbouring elements of both rows for each step; zeros behind the ends."""
        prompt, pack = self.prompt, self.prompt.kind.pack
        four = local(4)
        with unrolled(prompt.steps) as s, unrolled(2) as half, unrolled(2) as quad:
            row, d = self.row + 8 * half, 32 * s + 8 * self.t + 4 * quad
            for i in range(4):
                T.buffer_store(four, const(0.0), [i])
            with T.If(T.And(row < prompt.queries, d < self.shape.size)), T.Then():
                source = placed(self.shape.query, self.batch, self.head, row, d)
                T.evaluate(device.load_floats(at(four, 0), at(self.b["q"], *source)))
            for i in range(2):
                # As `PAIRS` says.
                word = pack(four[i], four[i + 2])
                T.buffer_store(self.q, word, [(s * 2 + quad) * 4 + 2 * i + half])

    def _block(self, turn: Turn) -> None:
        block, next_block, after, number = turn
        coming = next_block, after, number + 1
        self._arrived()
        self._multiply_keys()
        T.evaluate(T.tvm_storage_sync("shared"))
        self._prepare(self.keys, coming)
        self._mask(block)
        self._softmax()
        self._arrived()
        self._multiply_values()
        T.evaluate(T.tvm_storage_sync("shared"))
        self._prepare(self.values, coming)

    @staticmethod
    def _arrived() -> None:
        """Wait for the older one of two groups of copies, of all threads."""
        T.evaluate(device.wait_copies(1)())
        T.evaluate(T.tvm_storage_sync("shared"))

    def _multiply_keys(self) -> None:
        matrix, multiply = self.prompt.key, self.prompt.kind.multiply
        words = local(4, "uint32")
        with unrolled(KEYS // 2) as i:
            T.buffer_store(self.scores, const(0.0), [i])
        with unrolled(self.prompt.steps) as s, unrolled(KEYS // 32) as n, unrolled(4) as j:
            key = 32 * n + self.g // 2 * 8 + 2 * j + self.g % 2
            place = matrix.start + key * matrix.row + (s * 4 + self.t) * 16
            T.evaluate(device.load_shared(at(words, 0), self.shared.data, place))
            for half in range(2):
                left = [self.q[(s * 2 + half) * 4 + i] for i in range(4)]
                T.evaluate(multiply(at(self.scores, 4 * (4 * n + j)), *left, words[2 * half], words[2 * half + 1]))

    def _mask(self, block: Expr) -> None:
        """Scores in powers of two, or with a mask of floats of e; minus infinity where there is no key."""
        floats = bool(self.shape.mask) and self.shape.hidden is None
        visible, scale = local(2, "int32"), const(self.shape.scale * (1.0 if floats else LOG2E))
        for half in range(2):
            T.buffer_store(visible, self._limit(self.row + 8 * half) - block * KEYS, [half])
        bits = self._bits(block) if isinstance(self.order, SeenAlone) else None
        with T.If(self._all_seen(visible, bits)):
            with T.Then(), unrolled(KEYS // 2) as i:
                T.buffer_store(self.scores, self.scores[i] * scale, [i])
            with T.Else(), unrolled(KEYS // 32) as n:
                added = self._added(block * KEYS + 32 * n + 8 * self.t) if floats else None
                with unrolled(4) as j, unrolled(4) as c:
                    key, half = 32 * n + 8 * self.t + 2 * j + c % 2, c // 2
                    place = 4 * (4 * n + j) + c
                    score = self.scores[place] * scale
                    if added is not None:
                        # Before anything else is done, so that what an importer's mask swallows its sum would.
                        score = score + added[8 * half + 2 * j + c % 2]
                    if bits is not None:
                        one = T.shift_left(T.uint32(1), T.Cast("uint32", 2 * j + c % 2))
                        is_seen = T.bitwise_and(bits[2 * half + n], one) != T.uint32(0)
                        score = T.Select(is_seen, score, score + const(self._hidden()))
                    T.buffer_store(self.scores, T.Select(key < visible[half], score, const(NOTHING)), [place])

    def _all_seen(self, visible: Expr, bits: Expr | None) -> Expr:
        """Whether nothing hides a key of this thread's: so it is in most blocks."""
        if self.shape.mask and bits is None:
            return tirx.const(False, "bool")
        seen = T.And(visible[0] >= KEYS, visible[1] >= KEYS)
        if bits is not None:
            common = T.bitwise_and(T.bitwise_and(bits[0], bits[1]), T.bitwise_and(bits[2], bits[3]))
            seen = T.And(seen, T.bitwise_and(common, T.uint32(0xFF)) == T.uint32(0xFF))
        return seen

    def _hidden(self) -> float:
        """What bits that are 0 add, in powers of two; what is finite stays so."""
        hidden = self.shape.hidden
        assert hidden is not None
        return hidden if math.isinf(hidden) else max(hidden * LOG2E, _LOWEST)

    def _bits(self, block: Expr) -> Expr:
        """Of both rows, and both halves of the block, the mask of keys from this thread's first one on."""
        assert isinstance(self.order, SeenAlone)
        found, shift = local(4, "uint32"), T.Cast("uint32", 8 * self.t)
        for half in range(2):
            word = T.Cast("uint64", self.order.word(self.row + 8 * half, block))
            for n in range(2):
                part = T.Cast("uint32", T.shift_right(word, T.uint64(32 * n)))
                T.buffer_store(found, T.shift_right(part, shift), [2 * half + n])
        return found

    def _added(self, key: Expr) -> Expr:
        """A mask of floats for both rows and eight keys from one on; anything of those that are none."""
        found, prompt = local(16), self.prompt
        whole = "s" in self.shape.mask and prompt.most % 4 == 0
        for half in range(2):
            row = T.min(self.row + 8 * half, prompt.queries - 1)
            for i in range(0, 8, 4 if whole else 1):
                where = {
                    "b": self.batch,
                    "h": self.head,
                    "m": row,
                    "s": T.min(key + i, prompt.most - (4 if whole else 1)),
                }
                place = [where[axis] if axis in self.shape.mask else 0 for axis in "bhms"]
                if whole:
                    T.evaluate(device.load_floats(at(found, 8 * half + i), at(self.b["mask"], *place)))
                else:
                    T.buffer_store(found, self.b["mask"][tuple(place)], [8 * half + i])
        return found

    def _softmax(self) -> None:
        best, safe = local(2), local(2)
        for half in range(2):
            T.buffer_store(best, const(NOTHING), [half])
        with unrolled(KEYS // 8) as n, unrolled(4) as c:
            T.buffer_store(best, T.max(best[c // 2], self.scores[4 * n + c]), [c // 2])
        for half in range(2):
            fold(best, half, OVER_T, T.max)
            T.buffer_store(best, T.max(best[half], self.m[half]), [half])
            # Where there is nothing yet all differences are to be minus infinity.
            T.buffer_store(safe, T.Select(best[half] > const(NOTHING), best[half], const(0.0)), [half])
            T.buffer_store(self.fade, self._power(self.m[half] - safe[half]), [half])
            T.buffer_store(self.m, best[half], [half])
            T.buffer_store(self.l, self.l[half] * self.fade[half], [half])
        with unrolled(KEYS // 8) as n, unrolled(4) as c:
            place = 4 * n + c
            T.buffer_store(self.scores, self._power(self.scores[place] - safe[c // 2]), [place])
            T.buffer_store(self.l, self.l[c // 2] + self.scores[place], [c // 2])
        with unrolled(self.prompt.columns) as n, unrolled(4) as c:
            T.buffer_store(self.o, self.o[4 * n + c] * self.fade[c // 2], [4 * n + c])

    def _power(self, score: Expr) -> Expr:
        floats = self.shape.mask and self.shape.hidden is None
        return own.exp2(score * const(LOG2E) if floats else score)

    def _multiply_values(self) -> None:
        matrix, kind = self.prompt.value, self.prompt.kind
        left, words = local(8, "uint32"), local(4, "uint32")
        with unrolled(KEYS // 32) as n:
            for i, pair in enumerate(PAIRS):
                for half in range(2):
                    two = [self.scores[4 * (4 * n + token // 2) + 2 * half + token % 2] for token in pair]
                    T.buffer_store(left, kind.pack(*two), [2 * i + half])
            with unrolled(self.prompt.columns) as column:
                place = matrix.start + (8 * column + self.g) * matrix.row + (4 * n + self.t) * 16
                T.evaluate(device.load_shared(at(words, 0), self.shared.data, place))
                for step in range(2):
                    four = [left[4 * step + i] for i in range(4)]
                    T.evaluate(kind.multiply(at(self.o, 4 * column), *four, words[2 * step], words[2 * step + 1]))

    def _store(self) -> None:
        prompt, inverse = self.prompt, local(2)
        for half in range(2):
            fold(self.l, half, OVER_T, add)
            # Of no keys nothing; what is not a number stays so.
            value = T.Select(self.l[half] == const(0.0), const(0.0), const(1.0) / self.l[half])
            T.buffer_store(inverse, value, [half])
        with unrolled(2) as half:
            row = self.row + 8 * half
            with T.If(row < prompt.queries), T.Then(), unrolled(prompt.columns) as n:
                d = 8 * n + 2 * self.t
                with T.If(d < self.shape.value_size), T.Then():
                    two = [self.o[4 * n + 2 * half + c] * inverse[half] for c in range(2)]
                    to = placed(self.shape.out, self.batch, self.head, row, d)
                    T.evaluate(own.store_two(at(self.b["out"], *to), *two))
