"""Float matrix multiplication: ``out[b, i, j] = epilogue(sum over k of A[b, i, k] * B[b, k, j])``.

A block computes a tile of the result. Slices of both factors go through shared memory, from where each thread reads a
few rows and columns and keeps their products' sums in registers. Slices that reach over an edge are filled with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.sym import detect_linear_equation
from tvm.tirx import BufferStore, For, ForKind, PrimFunc, Stmt, Var

from tvm_ternary.schedule.cpu.inline import read_program
from tvm_ternary.schedule.cpu.matmul import read_matmul
from tvm_ternary.schedule.cpu.nest import decompose, index, product, scope, sequence, static, substitute
from tvm_ternary.schedule.cpu.program import Axis, Program, innermost, loads, uses
from tvm_ternary.schedule.cpu.tiles import Matmul

from .graph_nest import blocks_of, bound, guarded, local, shared, unrolled

ZERO = tirx.const(0.0, "float32")

# A column more than needed, so that lanes that fill a column of a slice do not wait for one bank.
PAD = 1


@dataclass(frozen=True)
class Tile:
    """What a block computes.

    Parameters
    ----------
    rows, columns : int
        Threads along each side of the tile.
    own_rows, own_columns : int
        Results of a thread along each side.
    depth : int
        k's of one slice.
    """

    rows: int
    columns: int
    own_rows: int
    own_columns: int
    depth: int

    @property
    def height(self) -> int:
        """Rows of the tile."""
        return self.rows * self.own_rows

    @property
    def width(self) -> int:
        """Columns of the tile."""
        return self.columns * self.own_columns

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return self.rows * self.columns


# Largest first. A large tile reads less, a small one gives more blocks.
TILES = (Tile(16, 16, 4, 4, 16), Tile(8, 16, 4, 2, 32), Tile(8, 16, 2, 2, 32))

# Where sizes are not known: small enough for one sentence, not too small for many.
TILE_OF_UNKNOWN = TILES[1]

# Blocks that keep a GPU busy: about one for each multiprocessor.
ENOUGH_BLOCKS = 128

# Rows below which there is nothing to share: `graph_columns` and `graph_rows` do such products.
FEWEST_ROWS = 4


def schedule_matmul(program: Program) -> PrimFunc | None:
    """Tile a float32 matrix product.

    Parameters
    ----------
    program : Program

    Returns
    -------
    PrimFunc or None
        None if the function is not a matrix product, or one of a few rows.
    """
    found = read_matmul(program)
    if found is None:
        return None
    rows = static(product([axis.extent for axis in found.rows]))
    if rows is not None and rows < FEWEST_ROWS:
        return None
    return program.with_nest(_Kernel(found, _choose(found)).nest())


def reads_side_by_side(func: PrimFunc) -> bool:
    """Whether a function becomes a tiled product in which neighbouring threads read neighbouring elements of factors.

    Parameters
    ----------
    func : PrimFunc
        Not yet scheduled.
    """
    program = read_program(func)
    found = None if program is None else read_matmul(program)
    if found is None or program is None or schedule_matmul(program) is None:
        return False

    def along(factor: Expr, axes: Sequence[Axis]) -> bool:
        places = [innermost(load) for load in loads(factor)]
        return all(any(place is not None and _steps_by_one(place, axis) for axis in axes) for place in places)

    last_row = found.rows[-1:]
    return along(found.left, [found.inner, *last_row]) and along(found.right, [found.inner, found.column])


def _steps_by_one(place: Expr, axis: Axis) -> bool:
    linear = detect_linear_equation(place, [axis.var])
    return len(linear) == 2 and static(linear[0]) == 1


def _choose(found: Matmul) -> Tile:
    """The largest tile of which there are enough, or the smallest; a middle one where sizes are not known."""

    def blocks(tile: Tile) -> int | None:
        batch = product([axis.extent for axis in found.batch])
        rows = blocks_of([axis.extent for axis in found.rows], tile.height)
        return static(product([batch, rows, blocks_of([found.column.extent], tile.width)]))

    counts = {tile: blocks(tile) for tile in TILES}
    if None in counts.values():
        return TILE_OF_UNKNOWN
    return next((tile for tile, count in counts.items() if (count or 0) >= ENOUGH_BLOCKS), TILES[-1])


@dataclass(frozen=True)
class _Kernel:
    """Writes the kernel of one product."""

    product: Matmul
    tile: Tile

    @property
    def height(self) -> Expr:
        """M."""
        return product([axis.extent for axis in self.product.rows])

    def nest(self) -> Stmt:
        """Blocks along batch and rows, blocks along columns, threads."""
        tile, batch = self.tile, [axis.extent for axis in self.product.batch]
        down = blocks_of([self.height], tile.height)

        def block(x: Expr, y: Expr) -> Stmt:
            number, row = decompose(x, [product(batch), down])
            at = {axis.var: i for axis, i in zip(self.product.batch, decompose(number, batch), strict=True)}
            body = bound(
                "threadIdx.x", tile.threads, lambda thread: self._block(row * tile.height, y * tile.width, thread)
            )
            return substitute(body, at)

        across = blocks_of([self.product.column.extent], tile.width)
        return bound(
            "blockIdx.x", product([*batch, down]), lambda x: bound("blockIdx.y", across, lambda y: block(x, y))
        )

    def _block(self, top: Expr, left: Expr, thread: Expr) -> Stmt:
        tile = self.tile
        a = shared([tile.depth, tile.height + PAD], "float32", "a")
        b = shared([tile.depth, tile.width + PAD], "float32", "b")
        sums = local([tile.own_rows, tile.own_columns], "float32", "sums")
        mine = decompose(thread, [index(tile.rows), index(tile.columns)])

        def each(body: Callable[[Expr, Expr], Stmt]) -> Stmt:
            return unrolled(tile.own_rows, lambda i: unrolled(tile.own_columns, lambda j: body(i, j)))

        def slice_of(number: Expr) -> Stmt:
            first = number * tile.depth
            fill = [self._fill(a, top, first, thread, rows=True), self._fill(b, left, first, thread, rows=False)]
            return sequence(fill, self._multiply(a, b, sums, mine))

        k = Var("k", "int64")
        slices = For(k, index(0), blocks_of([self.product.inner.extent], tile.depth), ForKind.SERIAL, slice_of(k))
        start = each(lambda i, j: BufferStore(sums, ZERO, [i, j]))
        # A thread's columns lie apart, so that its neighbours' lie side by side.
        store = each(
            lambda i, j: self._store(top + mine[0] * tile.own_rows + i, left + j * tile.columns + mine[1], sums[i, j])
        )
        return scope("tile", sequence(start, slices, store), [a, b, sums])

    def _multiply(self, a: Var, b: Var, sums: Var, mine: Sequence[Expr]) -> Stmt:
        """Add the products of one slice."""
        tile = self.tile

        def step(k: Expr) -> Stmt:
            def one(i: Expr, j: Expr) -> Stmt:
                left, right = a[k, mine[0] * tile.own_rows + i], b[k, j * tile.columns + mine[1]]
                return BufferStore(sums, sums[i, j] + left * right, [i, j])

            return unrolled(tile.own_rows, lambda i: unrolled(tile.own_columns, lambda j: one(i, j)))

        return unrolled(tile.depth, step)

    def _fill(self, buffer: Var, first: Expr, first_k: Expr, thread: Expr, *, rows: bool) -> Stmt:
        """All threads copy a slice of one factor; neighbours in memory are copied by neighbours."""
        tile, inner = self.tile, self.product.inner
        long = tile.height if rows else tile.width
        factor = self.product.left if rows else self.product.right
        along_k = any(i is not None and uses(i, inner.var) for i in map(innermost, loads(factor)))

        def copy(number: Expr) -> Stmt:
            flat = number * tile.threads + thread
            sides = [index(long), index(tile.depth)] if along_k else [index(tile.depth), index(long)]
            place = decompose(flat, sides)
            own, k = place if along_k else place[::-1]
            end = self.height if rows else self.product.column.extent
            at = {inner.var: first_k + k} | (self._row(first + own) if rows else {self.product.column.var: first + own})
            inside = tirx.And(first + own < end, first_k + k < inner.extent)
            return BufferStore(buffer, tirx.if_then_else(inside, substitute(factor, at), ZERO), [k, own])

        return unrolled(long * tile.depth // tile.threads, copy)

    def _row(self, number: Expr) -> dict[Var, Expr]:
        extents = [axis.extent for axis in self.product.rows]
        return {axis.var: i for axis, i in zip(self.product.rows, decompose(number, extents), strict=True)}

    def _store(self, row: Expr, column: Expr, total: Expr) -> Stmt:
        position = [*(axis.var for axis in self.product.batch), *self._row(row).values(), column]
        inside = [row < self.height, column < self.product.column.extent]
        return guarded(inside, self.product.write(position, total))
