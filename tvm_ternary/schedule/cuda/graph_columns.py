"""Folds across the innermost axis, convolutions and poolings: a lane is a result, and some warps share its terms.

Neighbouring lanes read neighbouring elements. Where there are few results, the terms of each are shared out over the
warps of its block; where there are many, a thread does all terms of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.tirx import BufferLoad, BufferStore, PrimFunc, Stmt, Var

from tvm_ternary.schedule.cpu.epilogue import Writer, read_writer
from tvm_ternary.schedule.cpu.fold import Fold, read_fold
from tvm_ternary.schedule.cpu.nest import (
    decompose,
    fit_lanes,
    index,
    loop,
    product,
    scope,
    sequence,
    static,
    substitute,
)
from tvm_ternary.schedule.cpu.program import Program, Stage, innermost, loads, uses

from .graph_nest import WARP, all_reduce, blocks_of, bound, first_of, guarded, local, strided
from .graph_points import grid, stage_kernel

# Warps that share the terms of 32 results.
SHARES = 16

# With so many results every multiprocessor has threads enough.
MANY_RESULTS = 1 << 16


def schedule_columns(program: Program) -> PrimFunc | None:
    """Schedule a fold whose data lie along the last axis of its result.

    Parameters
    ----------
    program : Program
        Maps that stay buffers of their own (a padding), one fold, at most one map behind it.

    Returns
    -------
    PrimFunc or None
        None if it is anything else.
    """
    found = _find(program)
    if found is None or not found.stage.spatial:
        return None
    column = found.stage.spatial[-1]
    places = [innermost(load) for load in loads(found.fold.value)]
    return _write(program, found) if any(i is not None and uses(i, column.var) for i in places) else None


def schedule_fold(program: Program) -> PrimFunc | None:
    """Schedule any single fold, wherever its data lie.

    Parameters
    ----------
    program : Program

    Returns
    -------
    PrimFunc or None
        None if there is another fold, or more than one map behind it.
    """
    found = _find(program)
    return None if found is None else _write(program, found)


@dataclass(frozen=True)
class _Columns:
    """A fold, the maps before it, and how its results are stored."""

    before: tuple[Stage, ...]
    stage: Stage
    fold: Fold
    write: Writer

    def shares(self) -> int:
        """How many threads share the terms of one result."""
        results = static(product([axis.extent for axis in self.stage.spatial]))
        if results is not None and results >= MANY_RESULTS:
            return 1
        return fit_lanes(product([axis.extent for axis in self.stage.reduced]), SHARES)

    def kernel(self) -> Stmt:
        """Lanes along the results, warps along the terms."""
        extents = [axis.extent for axis in self.stage.spatial]
        shares = self.shares()
        if shares == 1:
            return grid(extents, self._alone)
        total = product(extents)

        def thread(at: Expr, own: Expr) -> Stmt:
            inside = [] if (static(total) or 1) % WARP == 0 else [at < total]
            return self._shared(decompose(at, extents), inside, shares, own)

        def lanes(number: Expr) -> Stmt:
            return bound(
                "threadIdx.y",
                shares,
                lambda y: bound("threadIdx.x", WARP, lambda x: thread(number * WARP + x, y)),
            )

        return bound("blockIdx.x", blocks_of(extents, WARP), lanes)

    def _add(self, own: Var, result: Sequence[Expr], terms: Sequence[Expr]) -> Stmt:
        at = dict(
            zip((axis.var for axis in (*self.stage.spatial, *self.stage.reduced)), (*result, *terms), strict=True)
        )
        return BufferStore(own, self.fold.combine(own[0], substitute(self.fold.value, at)), [index(0)])

    def _alone(self, result: list[Expr]) -> Stmt:
        own = local([1], self.fold.target.dtype, "own")

        def nest(terms: list[Expr]) -> Stmt:
            if len(terms) == len(self.stage.reduced):
                return self._add(own, result, terms)
            return loop(self.stage.reduced[len(terms)].extent, lambda k: nest([*terms, k]), name="k")

        start = BufferStore(own, self.fold.identity, [index(0)])
        return scope("fold", sequence(start, nest([]), self.write(result, own[0])), [own])

    def _shared(self, result: list[Expr], inside: list[Expr], shares: int, share: Expr) -> Stmt:
        own, total = (local([1], self.fold.target.dtype, name) for name in ("own", "total"))
        extents = [axis.extent for axis in self.stage.reduced]
        start = BufferStore(own, self.fold.identity, [index(0)])
        terms = strided(product(extents), shares, share, lambda _, at: self._add(own, result, decompose(at, extents)))
        combine = all_reduce(self.fold.combine, self.fold.identity, own[0], BufferLoad(total, [index(0)]), [share])
        finish = guarded([*inside, first_of([share])], self.write(result, total[0]))
        return scope("fold", sequence(start, guarded(inside, terms), combine, finish), [own, total])


def _find(program: Program) -> _Columns | None:
    before = program.leading_maps()
    rest = program.stages[len(before) :]
    fold = read_fold(rest[0]) if rest else None
    write = None if fold is None else read_writer(rest[0], rest[1:])
    return None if fold is None or write is None else _Columns(before, rest[0], fold, write)


def _write(program: Program, found: _Columns) -> PrimFunc:
    body = sequence([stage_kernel(stage) for stage in found.before], found.kernel())
    return program.with_nest(body, program.written_by(found.before))
