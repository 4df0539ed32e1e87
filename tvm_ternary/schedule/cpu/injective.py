"""Element-wise work, broadcasts, transposes, reshapes, slices, concatenations and gathers: one pass per output."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import PrimFunc, Stmt, Var

from .nest import decompose, index, product, sequence, space, static, strips, substitute, vector
from .pieces import find_cuts, settle
from .program import Axis, Program, Stage, cost, loads, uses
from .simd import Simd


def schedule_injective(program: Program, simd: Simd) -> PrimFunc | None:
    """Write each stage as parallel rows with vectors along the last axis.

    Parameters
    ----------
    program : Program
    simd : Simd

    Returns
    -------
    PrimFunc or None
        None if a stage reduces, or is more than one store.
    """
    if not all(stage.is_map for stage in program.stages):
        return None
    body = sequence([map_stage(stage, simd, program.temporaries) for stage in program.stages])
    return program.with_nest(body, program.temporaries)


def map_stage(stage: Stage, simd: Simd, temporaries: Sequence[Var]) -> Stmt:
    """The loop nest of one map.

    Parameters
    ----------
    stage : Stage
        With `is_map`.
    simd : Simd
    temporaries : sequence of Var
        Buffers of the function's own. TVM may give two of them the same memory, where a map reads one and writes the
        other element by element; then no element may be done twice.

    Returns
    -------
    Stmt
    """
    lanes = _lanes(stage, simd)
    outer = _outer_axes(stage.axes, lanes)
    row = stage.axes[outer:]
    extents = [axis.extent for axis in row]
    cuts = find_cuts(stage, row[0]) if len(row) == 1 else []
    overlap = not (_is_among(stage.body.buffer, temporaries) and _reads(stage, temporaries))

    def one_row(indices: list[Expr]) -> Stmt:
        leading = {axis.var: i for axis, i in zip(stage.axes, indices, strict=False)}
        ends = [*cuts, product(extents)]
        parts = [
            _part(stage, row, leading, low, high, lanes, overlap=overlap)
            for low, high in zip([index(0), *cuts], ends, strict=True)
        ]
        return sequence(*parts)

    return space([axis.extent for axis in stage.axes[:outer]], product([*extents, cost(stage.body)]), one_row)


def _is_among(buffer: Var, temporaries: Sequence[Var]) -> bool:
    return any(buffer.same_as(other) for other in temporaries)


def _reads(stage: Stage, temporaries: Sequence[Var]) -> bool:
    return any(_is_among(load.source, temporaries) for load in loads(stage.body))


def _part(
    stage: Stage,
    row: tuple[Axis, ...],
    leading: dict[Var, Expr],
    low: Expr,
    high: Expr,
    lanes: int,
    *,
    overlap: bool,
) -> list[Stmt]:
    """The elements of a row from `low` up to `high`."""
    known = settle(stage, row[0], low, high) if len(row) == 1 else stage
    low, length = substitute(low, leading), substitute(Analyzer().simplify(high - low), leading)
    extents = [axis.extent for axis in row]

    def strip(base: Expr, width: int, _stale: Expr | None) -> Stmt:
        def element(lane: Expr) -> Stmt:
            position = decompose(low + base + lane, extents)
            return substitute(known.body, {**leading, **{a.var: i for a, i in zip(row, position, strict=True)}})

        return vector(width, element)

    return strips(length, lanes, strip, overlap=overlap)


def _lanes(stage: Stage, simd: Simd) -> int:
    """Elements that fit in a vector of the widest type among those that move along the last axis."""
    moving = [load.source for load in loads(stage.body) if stage.axes and uses(load, stage.axes[-1].var)]
    return min(simd.lanes(str(buffer.dtype)) for buffer in (stage.body.buffer, *moving))


def _outer_axes(axes: tuple[Axis, ...], lanes: int) -> int:
    """How many leading axes stay loops; the others together make rows long enough for a vector."""
    outer = max(len(axes) - 1, 0)
    while outer > 0 and (static(product([a.extent for a in axes[outer:]])) or lanes) < lanes:
        outer -= 1
    return outer
