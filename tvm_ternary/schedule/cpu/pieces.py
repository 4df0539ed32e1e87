"""Conditions that change along an axis (concatenations, paddings): cut the axis there, and each piece has none left.

A condition that differs from lane to lane would keep a loop from becoming vectors.
"""

from __future__ import annotations

import itertools

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, Op, Range
from tvm.sym import Analyzer, detect_linear_equation
from tvm.tirx import GE, GT, LE, LT, Var

from .nest import index, static
from .program import CHOICE, Axis, Stage, uses

COMPARISONS = (LT, LE, GT, GE)

# Pieces into which an axis may be cut, and so how often its code may be written.
MAX_PIECES = 4

# No dimension is longer than this.
LONGEST = 1 << 40


def _shape_analyzer(stage: Stage) -> Analyzer:
    """An analyzer that knows the axes and that sizes known at run time are not negative."""
    analyzer = Analyzer()
    for axis in stage.axes:
        tvm_ffi.structural_walk(
            axis.extent, (Var, lambda var: analyzer.bind(var, Range(0, LONGEST), allow_override=True))
        )
        analyzer.bind(axis.var, Range(0, axis.extent))
    return analyzer


def _conditions(stage: Stage) -> list[Expr]:
    """Comparisons that choose between values: of a concatenation, a padding."""
    found: list[Expr] = []

    def visit(call: Call) -> None:
        if isinstance(call.op, Op) and call.op.name == CHOICE:
            tvm_ffi.structural_walk(call.args[0], (COMPARISONS, found.append))

    tvm_ffi.structural_walk(stage.body, (Call, visit))
    return found


def _bound(comparison: Expr, axis: Axis) -> tuple[Expr, bool] | None:
    """Where a comparison changes along an axis, and whether it holds below that; None if not at one place."""
    linear = detect_linear_equation(comparison.a - comparison.b, [axis.var])
    slope = static(linear[0]) if len(linear) == 2 else None
    if slope not in (1, -1):
        return None
    # With a - b = slope * (x - at): a < b and a >= b change at x = at, a <= b and a > b one later. Slope -1 mirrors it.
    at = linear[1] * -slope
    later = isinstance(comparison, (LE, GT)) == (slope == 1)
    return (at + 1 if later else at), isinstance(comparison, (LT, LE)) == (slope == 1)


def find_cuts(stage: Stage, axis: Axis) -> list[Expr]:
    """Find where along an axis the conditions of a stage change.

    Parameters
    ----------
    stage : Stage
    axis : Axis
        One of its axes.

    Returns
    -------
    list of Expr
        Ascending and within the axis; empty if there are none, too many, or their order is not known.
    """
    analyzer = _shape_analyzer(stage)
    cuts: list[Expr] = []
    for comparison in _conditions(stage):
        if not uses(comparison, axis.var):
            continue
        bound = _bound(comparison, axis)
        if bound is None:
            return []
        cut = analyzer.simplify(bound[0])
        if not any(analyzer.can_prove_equal(cut, other) for other in cuts):
            cuts.append(cut)
    inside = [cut for cut in cuts if not (analyzer.can_prove(cut <= 0) or analyzer.can_prove(cut >= axis.extent))]
    ordered = sorted(inside, key=lambda cut: sum(analyzer.can_prove(other < cut) for other in inside))
    bounds = [index(0), *ordered, axis.extent]
    rising = all(analyzer.can_prove(a <= b) for a, b in itertools.pairwise(bounds))
    return ordered if rising and len(ordered) < MAX_PIECES else []


def settle(stage: Stage, axis: Axis, low: Expr, high: Expr) -> Stage:
    """Drop the conditions that hold, or fail, everywhere on a piece of an axis.

    Parameters
    ----------
    stage : Stage
    axis : Axis
    low, high : Expr
        The piece: ``low <= axis.var < high``.

    Returns
    -------
    Stage
    """
    analyzer = _shape_analyzer(stage)

    def place(comparison: Expr) -> Expr:
        bound = _bound(comparison, axis) if uses(comparison, axis.var) else None
        if bound is None:
            return comparison
        return axis.var < bound[0] if bound[1] else axis.var >= bound[0]

    def choose(call: Call) -> Expr:
        if not isinstance(call.op, Op) or call.op.name != CHOICE:
            return call
        condition = analyzer.simplify(tvm_ffi.structural_map(call.args[0], (COMPARISONS, place)))
        if static(condition) is None:
            return call
        return call.args[1] if static(condition) else call.args[2]

    with analyzer.constraint_scope(tirx.all(axis.var >= low, axis.var < high)):
        return stage.mapped(lambda node: tvm_ffi.structural_map(node, (Call, choose)))
