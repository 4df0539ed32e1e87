"""Anything no rule knows: the loops as they are, shared out over threads where the points are independent."""

from __future__ import annotations

import tvm_ffi
from tvm.ir import Expr
from tvm.tirx import Bind, PrimFunc, Stmt, Var

from .nest import loop, product, sequence, space, substitute
from .program import Program, Stage, cost
from .simd import Simd


def schedule_loops(program: Program, _simd: Simd) -> PrimFunc | None:
    """Run stages one after another; LLVM vectorises what it can.

    Parameters
    ----------
    program : Program
    _simd : Simd

    Returns
    -------
    PrimFunc or None
        None if points of a stage may meet: it writes where its data say, or reads what another point writes.
    """
    if not all(stage.independent for stage in program.stages):
        return None
    return program.with_nest(sequence([_loops(stage) for stage in program.stages]), program.temporaries)


def _loops(stage: Stage) -> Stmt:
    def fold(at: dict[Var, Expr], position: int) -> Stmt:
        if position == len(stage.reduced):
            return substitute(stage.body, {**at, **_fresh_names(stage.body)})
        axis = stage.reduced[position]
        return loop(axis.extent, lambda k: fold({**at, axis.var: k}, position + 1), name="k")

    def point(indices: list[Expr]) -> Stmt:
        at = {axis.var: i for axis, i in zip(stage.spatial, indices, strict=True)}
        start = [] if stage.init is None else [substitute(stage.init, at)]
        return sequence(start, fold(at, 0))

    work = product([axis.extent for axis in stage.reduced]) * cost(stage.body)
    return space([axis.extent for axis in stage.spatial], work, point)


def _fresh_names(body: Stmt) -> dict[Var, Var]:
    """New variables for those that a statement binds: a guarded nest holds it twice, and each copy defines its own."""
    bound: list[Bind] = []
    tvm_ffi.structural_walk(body, (Bind, bound.append))
    return {bind.var: Var(bind.var.name, bind.var.ty) for bind in bound}
