"""Many queries over a cache of ternary keys and values and over new tokens.

A block of the sequence is brought together in float, from wherever it lies: its packed numbers times their scales, or
tokens of the tail and new ones. A tile of queries then multiplies it hundreds of times; what is done before is about a
tenth of that. Nothing is rounded but what is packed.

The block of the tile's own tokens comes first: where its queries see these, what a large mask hides of other blocks,
before or behind, is known to be nothing beside them, and not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, IfThenElse, Select, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.ternary_keys import BLOCK, Digits, digits
from tvm_ternary.schedule.cpu.attention.many import Extremes, Many, Tile
from tvm_ternary.schedule.cpu.attention.operands import Operands, Run, buffer
from tvm_ternary.schedule.cpu.attention.packed import Cache
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, strips, vector
from tvm_ternary.schedule.intrinsics.common import field


class ManyCached(Many):
    """A tile of queries over the packed blocks of a sequence, its tail, and new tokens behind that."""

    knows_all = False

    reads_keys = False

    def __init__(
        self, on: Operands, cache: Cache, tile: Tile, extremes: Extremes | None, runs: tuple[Run, Run]
    ) -> None:
        super().__init__(on, tile, extremes)
        self.cache, self.runs = cache, runs
        self.full, _ = cache.counts(tile.batch)
        # Keys are turned to lie like this a square of vectors at once; values come sixteen elements side by side.
        self.k = buffer("k", BLOCK, -(-self.shape.size // self.lanes) * self.lanes)
        self.v = buffer("v", BLOCK, -(-self.shape.value_size // LANES) * LANES)

    def write(self) -> Stmt:
        """All keys for this tile."""
        return scope("cached", super().write(), [self.k, self.v])

    def _over_keys(self) -> Stmt:
        _, new = self.runs
        total = new.start + new.count
        blocks = tirx.floordiv(total + (BLOCK - 1), index(BLOCK))
        own = tirx.floordiv(new.start + self.tile.first, index(BLOCK))

        number = tirx.decl_buffer([index(1)], "int64", "number")

        def block(n: Expr) -> Stmt:
            # Kept, for TVM takes very long over a choice in all the places that depend on it.
            choose = BufferStore(number, Select(n < 1, own, Select(n <= own, n - 1, n)), [0])
            return sequence(choose, attend(number[0]))

        def attend(number: Expr) -> Stmt:
            first = number * BLOCK
            count = tirx.min(index(BLOCK), total - first)
            source = Run(self.k, self.v, "ld", "ld", first, count)
            together = IfThenElse(number < self.full, self._unpack(number), self._copy(first, count))
            return self._block(source, first, count, sequence(together, self._scores(source, first, count)))

        return scope("blocks", loop(blocks, block, name="block"), [number])

    def _copy(self, first: Expr, count: Expr) -> Stmt:
        """Bring tokens together that lie in float."""
        tail, new = self.runs
        old = tirx.max(tirx.min(new.start - first, count), index(0))

        def token(source: Run, j: Expr) -> Stmt:
            return sequence(
                self._copy_row(self.k, source.key_at, first, j), self._copy_row(self.v, source.value_at, first, j)
            )

        return sequence(
            loop(old, lambda j: token(tail, j), name="old"),
            loop(count - old, lambda j: token(new, old + j), name="new"),
        )

    def _copy_row(self, to: Var, read: Callable[..., Expr], first: Expr, j: Expr) -> Stmt:
        """The key or value ``first + j``."""
        size = self.shape.size if to is self.k else self.shape.value_size

        def element(d: Expr) -> Stmt:
            return BufferStore(to, read(self.tile.batch, self.kv, first + j, d), [j, d])

        # The overlapped start of the last vector is written twice, the same each time.
        return sequence(
            strips(size, self.lanes, lambda base, width, _: vector(width, lambda lane: element(base + lane)))
        )

    def _unpack(self, block: Expr) -> Stmt:
        """Make floats of a block."""
        packed, at = self.cache.packed, [self.tile.batch, self.kv, block]
        keys, values = packed.key_planes, packed.value_planes
        return sequence(
            self._each_strip(digits(keys), BLOCK, self.shape.size, lambda *strip: self._keys_from(at, *strip)),
            self._each_strip(digits(values), self.shape.value_size, BLOCK, lambda *strip: self._values_from(at, *strip))
            if values
            else loop(BLOCK, lambda j: self._copy_row(self.v, self.cache.value_at, block * BLOCK, j), name="value"),
        )

    def _keys_from(self, at: Sequence[Expr], row: Expr, start: Expr, count: int) -> Stmt:
        """Elements ``start .. start + count`` of as many keys as a vector has lanes."""
        lanes = self.lanes

        def element(i: int) -> Expr:
            if i >= count:
                return T.Broadcast(tirx.const(0.0, "float32"), lanes)
            numbers = self._numbers(self.cache.keys, digits(self.cache.packed.key_planes), at, row, start, i)
            return numbers * T.Broadcast(self.cache.key_scale[(*at, start + i)], lanes)

        def square(base: int) -> Stmt:
            def keep(token: int, elements: Expr) -> Stmt:
                return BufferStore(self.k, elements, [row + token, self._lanes_from(start + base)])

            return self._square(lambda i: element(base + i), keep)

        return sequence([square(base) for base in range(0, count, lanes)])

    def _values_from(self, at: Sequence[Expr], row: Expr, start: Expr, count: int) -> Stmt:
        """As many elements as a vector has lanes, of the values ``start .. start + count``."""

        def token(i: int) -> Stmt:
            numbers = self._numbers(self.cache.values, digits(self.cache.packed.value_planes), at, row, start, i)
            scale = T.Broadcast(self.cache.value_scale[(*at, start + i)], self.lanes)
            return BufferStore(self.v, numbers * scale, [start + i, self._lanes_from(row)])

        return sequence([token(i) for i in range(count)])

    def _each_strip(
        self, fields: Sequence[Digits], rows: int, terms: int, write: Callable[[Expr, Expr, int], Stmt]
    ) -> Stmt:
        """Cover a matrix of rows by terms with a vector of rows and whole words: ``write(row, term, terms)``."""
        width = max(self.lanes, *(part.terms for part in fields))
        whole, rest = divmod(terms, width)

        def strip(n: Expr) -> Stmt:
            row = n * self.lanes
            return sequence(
                [loop(whole, lambda base: write(row, base * width, width), name="word")] if whole else [],
                [write(row, index(whole * width), rest)] if rest else [],
            )

        return loop(-(-rows // LANES) * (LANES // self.lanes), strip, name="rows")

    def _numbers(
        self, words: Sequence[Var], fields: Sequence[Digits], at: Sequence[Expr], row: Expr, start: Expr, i: int
    ) -> Expr:
        """The numbers of a vector of rows at term ``start + i``; a word begins at ``start``."""
        lanes = self.lanes
        group, within = tirx.floordiv(row, index(LANES)), tirx.floormod(row, index(LANES))
        total: Expr | None = None
        for part, array in zip(fields, words, strict=True):
            word, term = tirx.floordiv(start, index(part.terms)) + i // part.terms, i % part.terms
            loaded = array.vload([*at, group, word, within], f"uint32x{lanes}")
            shift = 8 * (term % 4) + part.bits * (term // 4)
            one = T.reinterpret(field(loaded, shift, 2**part.bits - 1, lanes), dtype=f"int32x{lanes}")
            one = (one - T.Broadcast(T.int32(part.offset), lanes)) * T.Broadcast(T.int32(part.weight), lanes)
            total = one if total is None else total + one
        return T.Cast(f"float32x{lanes}", total)
