"""A PrimFunc read as what it computes: a short list of stages, each one statement over a box of axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm.ir import Call, Expr, Op, Range, TensorLoad
from tvm.s_tir import SBlockRealize
from tvm.sym import Analyzer
from tvm.tirx import BufferLoad, BufferStore, For, ForKind, IterVar, PrimFunc, SeqStmt, Stmt, Var

from .nest import INDEX, index, scope, static, substitute

# A choice of which only the chosen side is evaluated.
CHOICE = "prim.if_then_else"

# What a transcendental function costs next to an addition, for deciding whether to compute it twice or share it out.
CALL_COST = 16

AXIS_TYPES = (IterVar.DataPar, IterVar.CommReduce)


@dataclass(frozen=True)
class Axis:
    """One axis of a stage: its variable, its extent (from zero), and whether the stage sums, maximises, ... over it."""

    var: Var
    extent: Expr
    reduce: bool


@dataclass(frozen=True)
class Stage:
    """One block of a PrimFunc, its loops stripped off.

    Parameters
    ----------
    name : str
    axes : tuple of Axis
    body : Stmt
        Done for every point of the axes.
    init : Stmt or None
        Done before the first point of the reduced axes.
    """

    name: str
    axes: tuple[Axis, ...]
    body: Stmt
    init: Stmt | None

    @property
    def spatial(self) -> tuple[Axis, ...]:
        """The axes whose points are independent."""
        return tuple(axis for axis in self.axes if not axis.reduce)

    @property
    def reduced(self) -> tuple[Axis, ...]:
        """The axes that are folded into one value."""
        return tuple(axis for axis in self.axes if axis.reduce)

    @property
    def stores(self) -> list[BufferStore]:
        """Every store of the body."""
        found: list[BufferStore] = []
        tvm_ffi.structural_walk(self.body, (BufferStore, found.append))
        return found

    @property
    def independent(self) -> bool:
        """Whether the indices show that points of the spatial axes neither write nor read each other's elements."""
        stores = self.stores
        apart = all(_distinct(store.indices, self.spatial) for store in stores)
        own = [(load, store) for load in loads(self.body) for store in stores if load.source.same_as(store.buffer)]
        return apart and all(tvm_ffi.structural_equal(load.indices, store.indices) for load, store in own)

    @property
    def is_map(self) -> bool:
        """Whether every point is one store that depends on no other point."""
        return (
            not self.reduced
            and isinstance(self.body, BufferStore)
            and self.independent
            and not self.reads(self.body.buffer)
        )

    def writes(self, buffer: Var) -> bool:
        """Whether the stage stores into a buffer."""
        return any(store.buffer.same_as(buffer) for store in self.stores)

    def reads(self, buffer: Var) -> bool:
        """Whether the stage loads from a buffer."""
        return any(load.source.same_as(buffer) for load in loads(self.body))

    def mapped(self, change: Callable[[Any], Any]) -> Stage:
        """The same stage with `change` applied to its statements."""
        return replace(self, body=change(self.body), init=None if self.init is None else change(self.init))


@dataclass(frozen=True)
class Program:
    """The stages of a PrimFunc in order and the buffers that only they see."""

    func: PrimFunc
    stages: tuple[Stage, ...]
    temporaries: tuple[Var, ...]

    def with_nest(self, body: Stmt, buffers: Sequence[Var] = ()) -> PrimFunc:
        """The function with its body replaced by a finished loop nest that owns `buffers`."""
        return self.func.with_body(scope("root", body, buffers))

    def leading_maps(self) -> tuple[Stage, ...]:
        """The element-wise stages that come before the first reduction."""
        first = next((n for n, stage in enumerate(self.stages) if not stage.is_map), len(self.stages))
        return self.stages[:first]

    def written_by(self, stages: Sequence[Stage]) -> list[Var]:
        """The temporaries that some of the stages fill."""
        return [buffer for buffer in self.temporaries if any(stage.writes(buffer) for stage in stages)]


def loads(node: Any) -> list[TensorLoad]:
    """Every buffer element that an expression or statement reads."""
    found: list[TensorLoad] = []
    tvm_ffi.structural_walk(node, (TensorLoad, found.append))
    return found


def calls(node: Any) -> list[str]:
    """Names of the operators that an expression or statement calls."""
    found: list[str] = []

    def visit(call: Call) -> None:
        if isinstance(call.op, Op):
            found.append(call.op.name)

    tvm_ffi.structural_walk(node, (Call, visit))
    return found


def innermost(load: TensorLoad) -> Expr | None:
    """The index that walks through neighbours in memory: that of the last dimension longer than one, if any."""
    return next(
        (i for i, size in zip(reversed(load.indices), reversed(load.source.shape), strict=True) if static(size) != 1),
        None,
    )


def uses(node: Any, var: Var) -> bool:
    """Whether a variable occurs in an expression or statement."""
    found: list[Var] = []
    tvm_ffi.structural_walk(node, (Var, lambda v: found.append(v) if v.same_as(var) else None))
    return bool(found)


def cost(node: Any) -> int:
    """Scalar operations of one point, roughly."""
    return 1 + len(loads(node)) + CALL_COST * len([name for name in calls(node) if name != CHOICE])


def read_stages(func: PrimFunc) -> tuple[Stage, ...] | None:
    """Read the body of a PrimFunc as stages, exactly as they stand.

    Parameters
    ----------
    func : PrimFunc

    Returns
    -------
    tuple of Stage, or None
        None if the function is anything but perfect nests from zero with one block each.
    """
    root = func.body
    if not isinstance(root, SBlockRealize) or root.block.iter_vars or root.block.match_buffers:
        return None
    stages: list[Stage] = []
    for stmt in _statements(root.block.body):
        stage = _read_stage(stmt)
        if stage is None:
            return None
        stages.append(stage)
    return tuple(stages)


def simplify_stage(stage: Stage) -> Stage:
    """Drop axes of one point and reduce the index arithmetic that fused reshapes leave behind.

    Parameters
    ----------
    stage : Stage

    Returns
    -------
    Stage
    """
    single = {axis.var: index(0) for axis in stage.axes if static(axis.extent) == 1}
    # That a stage folds is told by an axis: one stays, however short.
    kept = [stage.reduced[-1]] if stage.reduced and all(axis.var in single for axis in stage.reduced) else []
    axes = tuple(axis for axis in stage.axes if axis.var not in single or axis in kept)
    analyzer = Analyzer()
    for axis in axes:
        analyzer.bind(axis.var, Range(0, axis.extent))

    def load(node: TensorLoad) -> Expr:
        return BufferLoad(node.source, [analyzer.simplify(i) for i in node.indices])

    def store(node: BufferStore) -> Stmt:
        return BufferStore(node.buffer, node.value, [analyzer.simplify(i) for i in node.indices])

    def change(node: Any) -> Any:
        return tvm_ffi.structural_map(substitute(node, single), [(TensorLoad, load), (BufferStore, store)])

    return replace(stage.mapped(change), axes=axes)


def _distinct(indices: Sequence[Expr], axes: tuple[Axis, ...]) -> bool:
    """Whether every point of the axes has an element of its own: each axis stands alone in some index."""
    alone = [i for i in indices if isinstance(i, Var)]
    return all(static(axis.extent) == 1 or any(i.same_as(axis.var) for i in alone) for axis in axes)


def _statements(stmt: Stmt) -> Iterator[Stmt]:
    if isinstance(stmt, SeqStmt):
        for child in stmt.seq:
            yield from _statements(child)
    else:
        yield stmt


def _read_stage(stmt: Stmt) -> Stage | None:
    extents: dict[Var, Expr] = {}
    while isinstance(stmt, For):
        if static(stmt.min) != 0 or stmt.kind != ForKind.SERIAL or stmt.thread_binding is not None:
            return None
        extents[stmt.loop_var] = stmt.extent
        stmt = stmt.body
    if not isinstance(stmt, SBlockRealize) or static(stmt.predicate) != 1:
        return None
    block = stmt.block
    if block.alloc_buffers or block.match_buffers:
        return None
    fixed: dict[Var, Expr] = {}
    axes: list[Axis] = []
    for iter_var, value in zip(block.iter_vars, stmt.iter_values, strict=True):
        if static(value) is not None:
            fixed[iter_var.var] = value
        elif value in extents and iter_var.iter_type in AXIS_TYPES and str(iter_var.var.ty) == INDEX:
            axes.append(Axis(iter_var.var, extents.pop(value), iter_var.iter_type == IterVar.CommReduce))
        else:
            return None
    if any(static(extent) != 1 for extent in extents.values()):
        return None
    return Stage(block.name_hint, tuple(axes), block.body, block.init).mapped(lambda node: substitute(node, fixed))
