"""Reductions that run across the innermost axis, convolutions and poolings: lanes are neighbouring results.

Each lane has its own running value, so nothing is summed across lanes. Where another axis of the result reads the same
data (the output channels of a convolution), a few of its points are computed together and share the loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.ir import Expr, TensorLoad
from tvm.sym import detect_linear_equation
from tvm.tirx import BufferStore, PrimFunc, Stmt, Var

from .epilogue import Writer, read_writer
from .fold import Fold, accumulator, read_fold, start
from .injective import map_stage
from .nest import fit_lanes, loop, product, scope, sequence, space, static, strips, substitute, vector
from .program import Axis, Program, Stage, cost, innermost, loads, uses
from .simd import Simd

# Points of one tile, each with its accumulators. They hide the latency of an addition, and fill half of 16 registers
# with one vector each, half of 32 with two.
TILE = 8

# Vectors of one strip where there is nothing else to hide that latency.
WIDE = 4

NO_AXIS = -1


def schedule_columns(program: Program, simd: Simd) -> PrimFunc | None:
    """Vectors along the last axis of the result, the reduced axes as loops inside.

    Parameters
    ----------
    program : Program
        Maps that stay buffers of their own (a padding), one fold, at most one map behind it.
    simd : Simd

    Returns
    -------
    PrimFunc or None
        None unless a fold reads its data along the last axis of its result.
    """
    before = program.leading_maps()
    rest = program.stages[len(before) :]
    fold = read_fold(rest[0]) if rest else None
    if fold is None or not rest[0].spatial or not _runs_along(fold.value, rest[0].spatial[-1]):
        return None
    write = read_writer(rest[0], rest[1:])
    if write is None:
        return None
    body = sequence(
        [map_stage(stage, simd, program.temporaries) for stage in before], _Tiles(rest[0], fold, write, simd).nest()
    )
    return program.with_nest(body, program.written_by(before))


def _step(load: TensorLoad, axis: Axis) -> int | None:
    """How far apart in memory a load's elements are for neighbours on an axis; None if that is not a few elements."""
    place = innermost(load)
    linear = [] if place is None else detect_linear_equation(place, [axis.var])
    return static(linear[0]) if len(linear) == 2 else None


def _runs_along(value: Expr, column: Axis) -> bool:
    """Whether every read moves with the column through neighbours in memory, by any fixed step, or not at all."""
    moving = [load for load in loads(value) if any(uses(i, column.var) for i in load.indices)]
    steps = [_step(load, column) for load in moving]
    return bool(steps) and all(step is not None and step > 0 for step in steps)


@dataclass(frozen=True)
class _Tiles:
    """Writes the nest: tiles of one axis, strips of columns, then the reduced axes."""

    stage: Stage
    fold: Fold
    write: Writer
    simd: Simd

    @property
    def column(self) -> Axis:
        return self.stage.spatial[-1]

    def shared_axis(self) -> tuple[int, int]:
        """Position of an axis of the result that some data do not depend on, and how many of its points share them."""
        data = [load for load in loads(self.fold.value) if uses(load, self.column.var)]
        for position in reversed(range(len(self.stage.spatial) - 1)):
            axis = self.stage.spatial[position]
            points = 1 if static(axis.extent) is None else fit_lanes(axis.extent, TILE)
            if points > 1 and any(not uses(load, axis.var) for load in data):
                return position, points
        return NO_AXIS, 1

    def nest(self) -> Stmt:
        """The whole stage."""
        position, points = self.shared_axis()
        outer = [
            product([tirx.ceildiv(axis.extent, points if n == position else 1)])
            for n, axis in enumerate(self.stage.spatial[:-1])
        ]
        lanes = self.simd.lanes(str(self.fold.target.dtype))
        vectors = WIDE if points == 1 else self.simd.registers // (2 * TILE)
        if (static(self.column.extent) or 0) >= vectors * lanes:
            lanes *= vectors

        def tile(indices: list[Expr]) -> Stmt:
            # The last tile overlaps the one before it and computes the same again.
            tops = [
                tirx.min(i * points, axis.extent - points) if n == position else i
                for n, (i, axis) in enumerate(zip(indices, self.stage.spatial, strict=False))
            ]

            def strip(base: Expr, width: int, _stale: Expr | None) -> Stmt:
                return self._strip(
                    [[t + p if n == position else t for n, t in enumerate(tops)] for p in range(points)], base, width
                )

            return sequence(strips(self.column.extent, lanes, strip))

        inner = [axis.extent for axis in (self.column, *self.stage.reduced)]
        return space(outer, product([*inner, points * cost(self.fold.value)]), tile)

    def _strip(self, rows: list[list[Expr]], base: Expr, width: int) -> Stmt:
        """One vector of columns for each of a few rows; a row is the indices of the other axes of the result."""
        sums = [accumulator(self.fold, width, f"sum{number}") for number in range(len(rows))]

        def step(row: list[Expr], acc: Var, reduced: list[Expr], lane: Expr) -> Stmt:
            spatial = zip(self.stage.spatial, [*row, base + lane], strict=True)
            folded = zip(self.stage.reduced, reduced, strict=True)
            item = substitute(self.fold.value, {axis.var: i for axis, i in (*spatial, *folded)})
            return BufferStore(acc, self.fold.combine(acc[lane], item), [lane])

        # A sum of sums: with an accumulator of its own for the last axis a long one loses far fewer bits.
        nested = len(self.stage.reduced) > 1 and len(rows) == 1
        part = accumulator(self.fold, width, "part")

        def nest(reduced: list[Expr]) -> Stmt:
            if len(reduced) == len(self.stage.reduced):
                pairs = zip(rows, [part] if nested else sums, strict=True)
                return sequence([vector(width, partial(step, row, acc, reduced)) for row, acc in pairs])
            inner = loop(self.stage.reduced[len(reduced)].extent, lambda k: nest([*reduced, k]), name="k")
            if not nested or len(reduced) < len(self.stage.reduced) - 1:
                return inner
            return sequence(start(self.fold, part, width), inner, vector(width, partial(add, sums[0], part)))

        def add(acc: Var, more: Var, lane: Expr) -> Stmt:
            return BufferStore(acc, self.fold.combine(acc[lane], more[lane]), [lane])

        def write(row: list[Expr], acc: Var, lane: Expr) -> Stmt:
            return self.write([*row, base + lane], acc[lane])

        finish = [vector(width, partial(write, row, acc)) for row, acc in zip(rows, sums, strict=True)]
        begin = [start(self.fold, acc, width) for acc in sums]
        return scope("columns", sequence(begin, nest([]), finish), [*sums, part] if nested else sums)
