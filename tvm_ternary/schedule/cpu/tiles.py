"""The loop nest of a float matrix product: panels of columns, tiles of rows whose sums stay in registers, then k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import BufferStore, IfThenElse, Stmt, Var

from .epilogue import Writer
from .nest import decompose, index, loop, product, scope, sequence, space, static, substitute, vector
from .program import Axis, innermost, loads

# Tiles of rows that one task does with its panel. More make the copy of the panel cheaper, fewer give more tasks.
BLOCK_TILES = 16

# A tile multiplies and adds two vectors a cycle, four times what element-wise code does.
WORK_SHARE = 4

ZERO = tirx.const(0.0, "float32")


@dataclass(frozen=True)
class Matmul:
    """A matrix product as found in a PrimFunc.

    Parameters
    ----------
    batch : tuple of Axis
        Axes on which both factors may depend.
    rows : tuple of Axis
        Axes of the first factor alone; together they are M.
    column : Axis
        N, the last axis of the result.
    inner : Axis
        K, the summed axis.
    left, right : Expr
        One element of each factor.
    write : callable (indices, Expr) -> Stmt
        Stores one sum at the given batch, row and column indices, epilogue included.
    """

    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    column: Axis
    inner: Axis
    left: Expr
    right: Expr
    write: Writer


def runs_along(factor: Expr, column: Axis) -> bool:
    """Whether neighbouring columns of a factor are neighbours in memory.

    Parameters
    ----------
    factor : Expr
    column : Axis
    """
    reads = loads(factor)
    return len(reads) == 1 and tvm_ffi.structural_equal(innermost(reads[0]), column.var)


@dataclass(frozen=True)
class _Panel:
    """A strip of columns and a block of rows: what one task does.

    Parameters
    ----------
    batch : tuple of Expr
    base : Expr
        First column.
    block : Expr
        Which block of rows.
    valid : Expr or None
        How many columns are real, None if all are.
    """

    batch: tuple[Expr, ...]
    base: Expr
    block: Expr
    valid: Expr | None


@dataclass(frozen=True)
class Kernel:
    """Writes the nest of a product.

    Parameters
    ----------
    matmul : Matmul
    lanes : int
        Elements of one vector.
    width : int
        Columns of a panel, whole vectors.
    rows : int
        Rows of a tile; the matrix has as many at least.
    short : int
        Rows of the tile that ends a matrix where few are left; 0 for none but whole ones.
    copies : bool
        Whether there are so many rows that a copy of each panel pays.
    """

    matmul: Matmul
    lanes: int
    width: int
    rows: int
    short: int
    copies: bool

    @property
    def height(self) -> Expr:
        """M, all row axes together."""
        return product([axis.extent for axis in self.matmul.rows])

    @property
    def block_rows(self) -> int:
        """Rows that one task does."""
        return BLOCK_TILES * self.rows

    def wide(self) -> Stmt:
        """At least one panel of columns: every panel is full, the last overlaps the one before it."""
        columns = self.matmul.column.extent
        in_place = runs_along(self.matmul.right, self.matmul.column)

        def panel(batch: tuple[Expr, ...], number: Expr, block: Expr) -> Stmt:
            one = _Panel(batch, tirx.min(number * self.width, columns - self.width), block, None)
            return self._direct(one) if in_place and not self.copies else self._packed(one)

        return self._panels(tirx.ceildiv(columns, self.width), panel)

    def narrow(self) -> Stmt:
        """Fewer columns than a panel: the panel is padded with zeros and only its real columns are stored."""

        def panel(batch: tuple[Expr, ...], _number: Expr, block: Expr) -> Stmt:
            return self._packed(_Panel(batch, index(0), block, self.matmul.column.extent))

        return self._panels(index(1), panel)

    def _panels(self, count: Expr, panel: Callable[[tuple[Expr, ...], Expr, Expr], Stmt]) -> Stmt:
        blocks = tirx.ceildiv(self.height, self.block_rows)
        extents = [*(axis.extent for axis in self.matmul.batch), product([count]), product([blocks])]
        known = static(self.height)
        rows = self.height if known is None else min(known, self.block_rows)
        work = product([rows, self.matmul.inner.extent, self.width // WORK_SHARE])
        return space(extents, work, lambda at: panel(tuple(at[:-2]), at[-2], at[-1]))

    def _direct(self, panel: _Panel) -> Stmt:
        """Tiles that read the second factor where it is."""
        return self._tiles(panel, lambda k, column: self._right(panel, k, panel.base + column))

    def _packed(self, panel: _Panel) -> Stmt:
        """Tiles that read a copy of the panel."""
        copy = tirx.decl_buffer((self.matmul.inner.extent, index(self.width)), "float32", "panel")

        def fill(k: Expr) -> Stmt:
            if panel.valid is None:
                return self._vectors(lambda c: BufferStore(copy, self._right(panel, k, panel.base + c), [k, c]))
            zeros = self._vectors(lambda c: BufferStore(copy, ZERO, [k, c]))
            return sequence(zeros, loop(panel.valid, lambda c: BufferStore(copy, self._right(panel, k, c), [k, c])))

        tiles = self._tiles(panel, lambda k, column: copy[k, column])
        return scope("panel", sequence(loop(self.matmul.inner.extent, fill, name="pack"), tiles), [copy])

    def _tiles(self, panel: _Panel, right: Callable[[Expr, Expr], Expr]) -> Stmt:
        """The tiles of one block of rows.

        What is left at the end is done by one more tile, which ends with the matrix and so overlaps the one before it:
        a short one if few rows are left.
        """
        first, rows, short = panel.block * BLOCK_TILES, self.rows, self.short
        count = product([tirx.min(tirx.ceildiv(self.height - short, rows) - first, index(BLOCK_TILES))])

        def tile(number: Expr) -> Stmt:
            return self._tile(panel, tirx.min((first + number) * rows, self.height - rows), rows, right)

        whole = loop(count, tile, name="tile")
        rest = Analyzer().simplify(tirx.floormod(self.height, rows))
        last_block = tirx.EQ(panel.block, tirx.ceildiv(self.height, self.block_rows) - 1)
        few_left = Analyzer().simplify(tirx.all(rest > 0, rest <= short, last_block))
        if short == 0 or static(few_left) == 0:
            return whole
        return sequence(whole, IfThenElse(few_left, self._tile(panel, self.height - short, short, right), None))

    def _tile(self, panel: _Panel, top: Expr, rows: int, right: Callable[[Expr, Expr], Expr]) -> Stmt:
        # A buffer for each row: LLVM keeps small ones in registers.
        sums = [tirx.decl_buffer((index(self.width),), "float32", f"sum{row}") for row in range(rows)]

        def multiply_add(k: Expr, row: int, acc: Var) -> Stmt:
            left = self._left(panel.batch, top + row, k)
            return self._vectors(lambda c: BufferStore(acc, acc[c] + left * right(k, c), [c]))

        def step(k: Expr) -> Stmt:
            return sequence([multiply_add(k, row, acc) for row, acc in enumerate(sums)])

        def zero(acc: Var) -> Stmt:
            return self._vectors(lambda c: BufferStore(acc, ZERO, [c]))

        write = [self._write_row(panel, top + row, acc) for row, acc in enumerate(sums)]
        folded = loop(self.matmul.inner.extent, step, name="k")
        return scope("tile", sequence([zero(acc) for acc in sums], folded, write), sums)

    def _write_row(self, panel: _Panel, row: Expr, sums: Var) -> Stmt:
        split = decompose(row, [axis.extent for axis in self.matmul.rows])

        def write(column: Expr) -> Stmt:
            return self.matmul.write([*panel.batch, *split, panel.base + column], sums[column])

        return self._vectors(write) if panel.valid is None else loop(panel.valid, write, name="column")

    def _vectors(self, write: Callable[[Expr], Stmt]) -> Stmt:
        """One statement for every vector of a panel's width; `write` gets the column."""

        def part(start: int) -> Stmt:
            return vector(self.lanes, lambda lane: write(lane + start))

        return sequence([part(start) for start in range(0, self.width, self.lanes)])

    def _at_batch(self, batch: Sequence[Expr]) -> dict[Var, Expr]:
        return {axis.var: i for axis, i in zip(self.matmul.batch, batch, strict=True)}

    def _right(self, panel: _Panel, k: Expr, column: Expr) -> Expr:
        at = {**self._at_batch(panel.batch), self.matmul.inner.var: k, self.matmul.column.var: column}
        return substitute(self.matmul.right, at)

    def _left(self, batch: Sequence[Expr], row: Expr, k: Expr) -> Expr:
        split = decompose(row, [axis.extent for axis in self.matmul.rows])
        rows = {axis.var: i for axis, i in zip(self.matmul.rows, split, strict=True)}
        return substitute(self.matmul.left, {**self._at_batch(batch), **rows, self.matmul.inner.var: k})
