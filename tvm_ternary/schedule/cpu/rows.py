"""Softmax, layer norm, RMS norm, reductions along rows: all that is done to a row is done while it is in cache.

All stages of the function share their leading axes, the *rows*. One loop runs over rows; inside it the stages follow
each other. What they hand on stays in registers (a mean), in the output row (the exponentials of a softmax), or in a
buffer of one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad
from tvm.tirx import BufferLoad, BufferStore, PrimFunc, Select, Stmt, Var

from .fold import Fold, accumulator, finish, fold_range, read_fold, start
from .nest import fit_lanes, index, loop, product, scope, sequence, space, static, strips, substitute, vector
from .program import Axis, Program, Stage, cost, loads
from .simd import Simd


@dataclass(frozen=True)
class _Home:
    """Where the elements of a temporary live while a row is worked on: a buffer, and which old indices it keeps."""

    buffer: Var
    kept: tuple[int, ...]
    owned: bool


def schedule_rows(program: Program, simd: Simd) -> PrimFunc | None:
    """One parallel loop over rows, vectors along each row.

    Parameters
    ----------
    program : Program
    simd : Simd

    Returns
    -------
    PrimFunc or None
        None if the stages do not share rows, none of them reduces, or one is neither a map nor a known fold.
    """
    stages = program.stages
    if not any(stage.reduced for stage in stages):
        return None
    if not all(stage.is_map or read_fold(stage) is not None for stage in stages):
        return None
    rows = min(_leading_spatial(stage) for stage in stages)
    shared = stages[0].axes[:rows]
    if not all(_same_extents(shared, stage.axes[:rows]) for stage in stages):
        return None
    stages = tuple(_rename_rows(stage, shared) for stage in stages)
    homes = _find_homes(program, stages, shared)
    if homes is None:
        return None
    stages = tuple(_move(stage, homes) for stage in stages)
    work = sum(_stage_work(stage, rows) for stage in stages)

    def one_row(indices: list[Expr]) -> Stmt:
        at = {axis.var: i for axis, i in zip(shared, indices, strict=True)}
        fresh = {home.buffer: _copy(home.buffer) for home in homes.values() if home.owned}
        body = sequence([_emit(stage, rows, simd) for stage in stages])
        return scope("row", _rebuffer(substitute(body, at), fresh), list(fresh.values()))

    return program.with_nest(space([axis.extent for axis in shared], work, one_row))


def _leading_spatial(stage: Stage) -> int:
    count = 0
    while count < len(stage.axes) and not stage.axes[count].reduce:
        count += 1
    return count


def _same_extents(a: tuple[Axis, ...], b: tuple[Axis, ...]) -> bool:
    return all(tvm_ffi.structural_equal(x.extent, y.extent) for x, y in zip(a, b, strict=True))


def _rename_rows(stage: Stage, shared: tuple[Axis, ...]) -> Stage:
    values = {axis.var: row.var for axis, row in zip(stage.axes, shared, strict=False)}
    renamed = stage.mapped(lambda node: substitute(node, values))
    return Stage(stage.name, shared + stage.axes[len(shared) :], renamed.body, renamed.init)


def _stage_work(stage: Stage, rows: int) -> Expr:
    return product([axis.extent for axis in stage.axes[rows:]]) * cost(stage.body)


def _is_row_index(i: Expr, shared: tuple[Axis, ...]) -> bool:
    return static(i) == 0 or any(i.same_as(axis.var) for axis in shared)


def _find_homes(program: Program, stages: tuple[Stage, ...], shared: tuple[Axis, ...]) -> dict[Var, _Home] | None:
    """Give each temporary a place of one row's size; None if a stage reads another row's elements."""
    homes: dict[Var, _Home] = {}
    for buffer in program.temporaries:
        writers = [stage for stage in stages if stage.body.buffer.same_as(buffer)]
        if len(writers) != 1:
            return None
        written = writers[0].body.indices
        kept = tuple(d for d, i in enumerate(written) if not _is_row_index(i, shared))
        fixed = [d for d in range(len(written)) if d not in kept]
        for load in (load for stage in stages for load in loads(stage.body) if load.source.same_as(buffer)):
            if any(not tvm_ffi.structural_equal(load.indices[d], written[d]) for d in fixed):
                return None
        output = stages[-1].body
        output_free = all(home.owned for home in homes.values())
        if output_free and _can_share(buffer, written, output, stages[-1]):
            homes[buffer] = _Home(output.buffer, tuple(range(len(written))), False)
        else:
            shape = [buffer.shape[d] for d in kept] or [index(1)]
            homes[buffer] = _Home(tirx.decl_buffer(shape, buffer.dtype, buffer.name), kept, True)
    return homes


def _can_share(buffer: Var, written: list[Expr], output: BufferStore, last: Stage) -> bool:
    """Whether a temporary can live in the output: as large, and read last by the store to the very same element."""
    if buffer.dtype != output.buffer.dtype or not tvm_ffi.structural_equal(buffer.shape, output.buffer.shape):
        return False
    if not last.is_map or len(written) != len(output.indices):
        return False
    own = [load for load in loads(output.value) if load.source.same_as(buffer)]
    moving = [i for i in written if static(i) != 0]
    return len(moving) == len(last.axes) and all(tvm_ffi.structural_equal(load.indices, output.indices) for load in own)


def _move(stage: Stage, homes: dict[Var, _Home]) -> Stage:
    """Point reads and writes of temporaries to their homes."""

    def where(home: _Home, indices: Any) -> list[Expr]:
        return [indices[d] for d in home.kept] or [index(0)]

    def load(node: TensorLoad) -> Expr:
        home = homes.get(node.source)
        return node if home is None else BufferLoad(home.buffer, where(home, node.indices))

    def store(node: BufferStore) -> Stmt:
        home = homes.get(node.buffer)
        return node if home is None else BufferStore(home.buffer, node.value, where(home, node.indices))

    return stage.mapped(lambda node: tvm_ffi.structural_map(node, [(TensorLoad, load), (BufferStore, store)]))


def _copy(buffer: Var) -> Var:
    return tirx.decl_buffer(buffer.shape, buffer.dtype, buffer.name)


def _rebuffer(node: Stmt, fresh: dict[Var, Var]) -> Stmt:
    """Give one copy of a row's code buffers of its own: a guarded nest holds the code twice."""

    def load(item: TensorLoad) -> Expr:
        return BufferLoad(fresh[item.source], item.indices) if item.source in fresh else item

    def store(item: BufferStore) -> Stmt:
        return BufferStore(fresh[item.buffer], item.value, item.indices) if item.buffer in fresh else item

    return tvm_ffi.structural_map(node, [(TensorLoad, load), (BufferStore, store)])


def _emit(stage: Stage, rows: int, simd: Simd) -> Stmt:
    inner = stage.axes[rows:]
    fold = read_fold(stage)
    if fold is None:
        return _emit_map(stage, inner, simd)
    kept = [axis for axis in inner if not axis.reduce]
    reduced = [axis for axis in inner if axis.reduce]

    def nest(position: int) -> Stmt:
        if position == len(kept):
            return _emit_fold(fold, reduced, simd)
        axis = kept[position]
        return loop(axis.extent, lambda i: substitute(nest(position + 1), {axis.var: i}), name="kept")

    return nest(0)


def _emit_fold(fold: Fold, reduced: list[Axis], simd: Simd) -> Stmt:
    last = reduced[-1]
    lanes = fit_lanes(last.extent, simd.lanes(str(fold.target.dtype)))
    acc = accumulator(fold, lanes)

    def nest(position: int) -> Stmt:
        axis = reduced[position]
        if axis is last:
            return sequence(fold_range(fold, acc, lanes, axis.extent, lambda k: substitute(fold.value, {axis.var: k})))
        return loop(axis.extent, lambda k: substitute(nest(position + 1), {axis.var: k}), name="k")

    total = BufferStore(fold.target, acc[0], list(fold.indices))
    return scope("fold", sequence(start(fold, acc, lanes), nest(0), finish(fold, acc, lanes), total), [acc])


def _emit_map(stage: Stage, inner: tuple[Axis, ...], simd: Simd) -> Stmt:
    if not inner:
        return stage.body
    store = stage.body
    last = inner[-1]
    in_place = any(load.source.same_as(store.buffer) for load in loads(store.value))
    lanes = simd.lanes(str(store.buffer.dtype))

    def strip(base: Expr, width: int, stale: Expr | None) -> Stmt:
        def step(lane: Expr) -> Stmt:
            at = {last.var: base + lane}
            value, indices = substitute(store.value, at), [substitute(i, at) for i in store.indices]
            if stale is not None and in_place:
                # The element was updated already by the vector before: leave it.
                value = Select(lane >= stale, value, BufferLoad(store.buffer, indices))
            return BufferStore(store.buffer, value, indices)

        return vector(width, step)

    def nest(position: int) -> Stmt:
        axis = inner[position]
        if axis is last:
            return sequence(strips(axis.extent, lanes, strip))
        return loop(axis.extent, lambda i: substitute(nest(position + 1), {axis.var: i}), name="ax")

    return nest(0)
