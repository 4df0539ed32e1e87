"""One thread for each point: element-wise work, transposes, gathers, concatenations, and folds too short to share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, Op, Range
from tvm.sym import Analyzer, detect_linear_equation
from tvm.tirx import EQ, GE, GT, LE, LT, NE, And, Bind, Cast, Not, Or, PrimFunc, Select, Stmt, Var

from tvm_ternary.schedule.cpu.nest import decompose, index, loop, product, sequence, static, substitute, vector
from tvm_ternary.schedule.cpu.program import CHOICE, Program, Stage, loads, uses

from .graph_nest import WARP, blocks_of, bound, guarded

# Threads of a block: some of each multiprocessor's 2048 find work even where a tensor is small.
THREADS = 128

# Elements of 4 bytes that one instruction moves.
WIDTH = 4

# Data types of which a vector of four is one that CUDA has, loads and arithmetic included.
VECTOR_TYPES = ("float32", "int32")

# Written by vectors of conditions, which the code generator takes apart lane by lane.
CONDITIONS = (EQ, NE, LT, LE, GT, GE, And, Or, Not, Select)

# Points in a row of blocks: from here on, axes are not put together any further.
ROW = 256


def schedule_points(program: Program) -> PrimFunc | None:
    """Write a kernel for each stage, with a thread for each point of its spatial axes.

    Parameters
    ----------
    program : Program

    Returns
    -------
    PrimFunc or None
        None if the points of a stage may meet: it writes where its data say, or reads what another point writes.
    """
    if not all(stage.independent for stage in program.stages):
        return None
    return program.with_nest(sequence([stage_kernel(stage) for stage in program.stages]), program.temporaries)


def stage_kernel(stage: Stage) -> Stmt:
    """The kernel of one stage whose points are independent.

    Parameters
    ----------
    stage : Stage
        With `independent`.
    """
    extents = [axis.extent for axis in stage.spatial]
    width = _width(stage)
    if width > 1:
        extents[-1] = product([tirx.floordiv(extents[-1], index(width))])

    def point(indices: list[Expr]) -> Stmt:
        def element(lane: Expr) -> Stmt:
            own = [*indices[:-1], indices[-1] * width + lane] if width > 1 else indices
            return _serial(stage, dict(zip((axis.var for axis in stage.spatial), own, strict=True)))

        return vector(width, element)

    return grid(extents, point)


def grid(extents: Sequence[Expr], body: Callable[[list[Expr]], Stmt]) -> Stmt:
    """Launch a thread for each point of an iteration space.

    Where all extents are known the points are numbered through, and the divisions that tell a number's point are by
    constants. Otherwise blocks cover the trailing axes only, so that divisions by sizes known at run time are the same
    for all threads of a block.

    Parameters
    ----------
    extents : sequence of Expr
    body : callable (indices) -> Stmt
    """
    outer = _outer(extents)
    inner = product(extents[outer:])
    known = static(inner)
    threads = THREADS if known is None else min(THREADS, -(-known // WARP) * WARP)
    chunks = blocks_of([inner], threads)

    def block(number: Expr) -> Stmt:
        row, chunk = decompose(number, [product(extents[:outer]), chunks])

        def thread(own: Expr) -> Stmt:
            at = chunk * threads + own
            whole = known is not None and known % threads == 0
            point = [*decompose(row, extents[:outer]), *decompose(at, extents[outer:])]
            return guarded([] if whole else [at < inner], body(point))

        return bound("threadIdx.x", threads, thread)

    return bound("blockIdx.x", product([*extents[:outer], chunks]), block)


def _outer(extents: Sequence[Expr]) -> int:
    """How many leading axes are numbered by blocks alone."""
    if all(static(extent) is not None for extent in extents):
        return 0
    outer = len(extents)
    while outer > 0:
        outer -= 1
        points = static(product(extents[outer:]))
        if points is None or points >= ROW:
            break
    return outer


def _serial(stage: Stage, at: dict[Var, Expr]) -> Stmt:
    """One point: its reduced axes are loops of the thread."""

    def fold(at: dict[Var, Expr], position: int) -> Stmt:
        if position == len(stage.reduced):
            return substitute(stage.body, {**at, **_fresh_names(stage.body)})
        axis = stage.reduced[position]
        return loop(axis.extent, lambda k: fold({**at, axis.var: k}, position + 1), name="k")

    start = [] if stage.init is None else [substitute(stage.init, at)]
    return sequence(start, fold(at, 0))


def _fresh_names(body: Stmt) -> dict[Var, Var]:
    """New variables for those that a statement binds."""
    found: list[Bind] = []
    tvm_ffi.structural_walk(body, (Bind, found.append))
    return {bind.var: Var(bind.var.name, bind.var.ty) for bind in found}


def _width(stage: Stage) -> int:
    """Elements that a thread does at once: `WIDTH` where all of them lie side by side, and aligned, in all buffers."""
    size = static(stage.axes[-1].extent) if stage.is_map and stage.axes else None
    if size is None or size % WIDTH or not _has_vectors(stage):
        return 1
    column = stage.axes[-1].var
    analyzer = Analyzer()
    for axis in stage.axes:
        analyzer.bind(axis.var, Range(0, axis.extent))
    accesses = [(load.source, load.indices) for load in loads(stage.body)]
    accesses.append((stage.body.buffer, stage.body.indices))
    moving = [(buffer, indices) for buffer, indices in accesses if any(uses(i, column) for i in indices)]
    return WIDTH if all(_side_by_side(*access, column, analyzer) for access in moving) else 1


def _has_vectors(stage: Stage) -> bool:
    """Whether what changes along the last axis is arithmetic, for which CUDA has vectors, and no choice."""
    column = stage.axes[-1].var
    scalar: list[Any] = []

    def note(node: Any) -> None:
        if uses(node, column):
            scalar.append(node)

    def note_choice(call: Call) -> None:
        if isinstance(call.op, Op) and call.op.name == CHOICE:
            note(call.args[0])

    def note_cast(cast: Cast) -> None:
        if str(cast.ty) not in VECTOR_TYPES:
            note(cast)

    tvm_ffi.structural_walk(stage.body, [(CONDITIONS, note), (Call, note_choice), (Cast, note_cast)])
    return not scalar


def _side_by_side(buffer: Var, indices: Sequence[Expr], column: Var, analyzer: Analyzer) -> bool:
    """Whether `WIDTH` columns from a multiple of it on are that many elements from a multiple of it on."""
    size = static(buffer.shape[-1])
    if str(buffer.dtype) not in VECTOR_TYPES or size is None or size % WIDTH:
        return False
    linear = detect_linear_equation(indices[-1], [column])
    if len(linear) != 2 or static(linear[0]) != 1 or any(uses(i, column) for i in indices[:-1]):
        return False
    return bool(analyzer.can_prove_equal(tirx.floormod(linear[1], index(WIDTH)), index(0)))
