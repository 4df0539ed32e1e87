"""Scores of queries that become trits over a packed block of keys.

Trits may be bytes, for byte dot products. Where a tier counts the bits of a lane in one instruction and keys have one
plane, they are two bits, and so are keys: for 16 queries and 32 elements of a key that is six operations, two of them
counts, instead of eight byte dot products. A prompt over keys of one plane takes 2 to 9% less time by that.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, Ramp, Select, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention.block_scores import LARGEST_FLOAT, BlockScores, ByteScores
from tvm_ternary.schedule.cpu.attention.many import Many
from tvm_ternary.schedule.cpu.attention.operands import ZERO, buffer
from tvm_ternary.schedule.cpu.attention.packed import Cache
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence
from tvm_ternary.schedule.intrinsics import ByteDot

_BITS = 32
_EVEN_BITS = 0x55555555


class Trits:
    """How queries become trits: as `activations.ternary_rows` has it, with a query and block in place of a row.

    What is at most half of the mean magnitude is zero; the mean magnitude of the others is what a trit stands for.
    """

    def __init__(self, of: BlockScores) -> None:
        self.of = of
        self.limit, self.kept, self.count = (buffer(name, of.width) for name in ("limit", "kept", "count"))
        self.buffers = [self.limit, self.kept, self.count]

    def find_limit(self, block: Expr) -> Stmt:
        """Look at all elements, before any is kept."""
        fill, limit, size = self.of.many._fill, self.limit, self.of.shape.size

        def add(d: Expr) -> Stmt:
            return fill(lambda c: BufferStore(limit, limit[c] + tirx.abs(self.of.scaled(block, d, c)), [c]))

        def clear(one: Var) -> Stmt:
            return fill(lambda c: BufferStore(one, ZERO, [c]))

        half = tirx.const(0.5 / size, "float32")
        return sequence(
            [clear(one) for one in self.buffers],
            loop(size, add, name="d"),
            fill(lambda c: BufferStore(limit, limit[c] * half, [c])),
        )

    def keep(self, x: Expr, c: Expr) -> Stmt:
        """Add the magnitude of an element that is not zero."""
        some = tirx.abs(x) > self.limit[c]
        return BufferStore(self.kept, self.kept[c] + Select(some, tirx.abs(x), ZERO), [c])

    def add_count(self, more: Expr, c: Expr) -> Stmt:
        """Count so many elements that are not zero."""
        return BufferStore(self.count, self.count[c] + more.astype("float32"), [c])

    def find_step(self) -> Stmt:
        """After all are counted."""

        def step(c: Expr) -> Stmt:
            mean = self.kept[c] / tirx.max(self.count[c], tirx.const(1.0, "float32"))
            # Beside a limit that is not finite nothing was kept, and zeros would hide it.
            finite = self.limit[c] <= tirx.const(LARGEST_FLOAT, "float32")
            return BufferStore(self.of.step, Select(finite, mean, tirx.const(float("nan"), "float32")), [c])

        return self.of.many._fill(step)


class TritScores(ByteScores):
    """Queries become trits, a byte each."""

    def __init__(self, many: Many, cache: Cache, dot: ByteDot) -> None:
        super().__init__(many, cache, dot)
        self.trits = Trits(self)

    @property
    def buffers(self) -> Sequence[Var]:
        """What it needs for a tile."""
        return [*super().buffers, *self.trits.buffers]

    def _round(self, block: Expr) -> Stmt:
        one, none = tirx.const(1, "int32"), tirx.const(0, "int32")

        def keep(d: Expr) -> Stmt:
            def write(c: Expr) -> Stmt:
                x = self.scaled(block, d, c)
                count = Select(tirx.abs(x) > self.trits.limit[c], one, none)
                return sequence(self.trits.keep(x, c), self.trits.add_count(count, c))

            return self.many._fill(write)

        every = loop(self.shape.size, keep, name="d")
        return sequence(self.trits.find_limit(block), every, self.trits.find_step(), self._merge(block))

    def _number(self, block: Expr, d: Expr, c: Expr) -> Expr:
        x, limit = self.scaled(block, d, c), self.trits.limit[c]
        above, below, neither = (tirx.const(value, "int32") for value in (1, -1, 0))
        return Select(x > limit, above, Select(-x > limit, below, neither))


class BitScores(BlockScores):
    """Queries become trits, two bits each, and so are keys of one plane.

    Of 32 elements a word says which are not zero, and another one which are above it. Bit ``8 i + 2 j`` of these is of
    term ``4 j + i`` of an even word of packed keys, the bit behind it of the same term of the odd word that follows.
    """

    key_rows = 4

    def __init__(self, many: Many, cache: Cache) -> None:
        super().__init__(many, cache)
        self.words, self.trits = -(-self.shape.size // _BITS), Trits(self)

        def words(name: str, *extents: int) -> Var:
            return tirx.decl_buffer([index(extent) for extent in extents], "uint32", name)

        self.asked = words("asked", self.words, 2, self.width)
        self.codes = words("codes", BLOCK // LANES, self.words, 2, LANES)

    @property
    def buffers(self) -> Sequence[Var]:
        """What it needs for a tile."""
        return [self.asked, self.codes, self.step, *self.trits.buffers]

    def _round(self, block: Expr) -> Stmt:
        whole, rest = divmod(self.shape.size, _BITS)
        return sequence(
            self.trits.find_limit(block),
            loop(whole, lambda word: self._ask(block, word, _BITS), name="word") if whole else [],
            self._ask(block, index(whole), rest) if rest else [],
            self.trits.find_step(),
        )

    def _ask(self, block: Expr, word: Expr, count: int) -> Stmt:
        """The bits of so many elements of all queries."""

        none, asked, trits = T.uint32(0), self.asked, self.trits

        def one(term: int, c: Expr) -> Stmt:
            odd, within = divmod(term, _BITS // 2)
            bit = T.uint32(1 << (8 * (within % 4) + 2 * (within // 4) + odd))
            x = self.scaled(block, word * _BITS + term, c)
            some, above = (Select(size > trits.limit[c], bit, none) for size in (tirx.abs(x), x))
            # Element by element, so that few are in registers at a time.
            return sequence(
                BufferStore(asked, tirx.bitwise_or(asked[word, 0, c], some), [word, 0, c]),
                BufferStore(asked, tirx.bitwise_or(asked[word, 1, c], above), [word, 1, c]),
                trits.keep(x, c),
            )

        def write(c: Expr) -> Stmt:
            return sequence(
                [BufferStore(asked, none, [word, n, c]) for n in range(2)],
                [one(term, c) for term in range(count)],
                trits.add_count(T.popcount(asked[word, 0, c]), c),
            )

        return self.many._fill(write)

    def _unpack(self, block: Expr) -> Stmt:
        # A field is 0, 1 or 2 for a trit below, at or above zero; what is padded is multiplied by a zero.
        array = self.cache.keys[0]
        even, odd = (T.Broadcast(T.uint32(bits), LANES) for bits in (_EVEN_BITS, _EVEN_BITS << 1))
        one = T.Broadcast(T.uint32(1), LANES)

        def put(group: Expr, word: Expr, n: int, bits: Expr) -> Stmt:
            return BufferStore(self.codes, bits, [group, word, n, Ramp(0, 1, LANES)])

        def words(group: Expr, word: Expr, *, single: bool) -> Stmt:
            first, second = (
                array.vload([*self._at(block), group, 2 * word + n, 0], f"uint32x{LANES}") for n in range(2)
            )
            zero = T.bitwise_and(first, even)
            above = T.bitwise_and(T.shift_right(first, one), even)
            if not single:
                zero = T.bitwise_or(zero, T.bitwise_and(T.shift_left(second, one), odd))
                above = T.bitwise_or(above, T.bitwise_and(second, odd))
            return sequence(put(group, word, 0, T.bitwise_not(zero)), put(group, word, 1, above))

        whole, rest = divmod(int(array.shape[-2]), 2)

        def rows(group: Expr) -> Stmt:
            return sequence(
                loop(whole, lambda word: words(group, word, single=False), name="word") if whole else [],
                words(group, index(whole), single=True) if rest else [],
            )

        return loop(BLOCK // LANES, rows, name="group")

    def _products(self, first: Expr, key: Expr) -> Stmt:
        lanes, places = self.many.lanes, range(0, self.width, self.many.lanes)
        sums = [
            [tirx.decl_buffer([index(self.width)], "int32", f"{name}{row}") for name in ("both", "apart")]
            for row in range(self.key_rows)
        ]
        group, within = tirx.floordiv(key, index(LANES)), tirx.floormod(key, index(LANES))

        def step(word: Expr) -> Stmt:
            def add(acc: Var, at: int, bits: Expr) -> Stmt:
                count = T.reinterpret(T.popcount(bits), dtype=f"int32x{lanes}")
                return BufferStore(acc, acc.vload([at], f"int32x{lanes}") + count, [Ramp(at, 1, lanes)])

            def one(row: int, at: int) -> list[Stmt]:
                asked = [self.asked.vload([word, n, at], f"uint32x{lanes}") for n in range(2)]
                keys = [T.Broadcast(self.codes[group, word, n, within + row], lanes) for n in range(2)]
                both = T.bitwise_and(asked[0], keys[0])
                apart = T.bitwise_and(both, T.bitwise_xor(asked[1], keys[1]))
                return [add(acc, at, bits) for acc, bits in zip(sums[row], (both, apart), strict=True)]

            return sequence([part for row in range(self.key_rows) for at in places for part in one(row, at)])

        def score(row: int, c: Expr) -> Expr:
            both, apart = sums[row]
            return (both[c] - apart[c] * tirx.const(2, "int32")).astype("float32") * self.step[c]

        def clear(acc: Var) -> Stmt:
            return self.many._fill(lambda c: BufferStore(acc, tirx.const(0, "int32"), [c]))

        flat = [acc for pair in sums for acc in pair]
        ends = self.many._keep(first, [key + row for row in range(self.key_rows)], index(BLOCK), score)
        return scope(
            "products", sequence([clear(acc) for acc in flat], loop(self.words, step, name="word"), ends), flat
        )
