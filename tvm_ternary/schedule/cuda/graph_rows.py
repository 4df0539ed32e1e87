"""Softmax, layer norm, RMS norm, reductions along rows: one kernel in which a few warps do all that is done to a row.

All stages of the function share their leading axes, the *rows*. A row's positions are shared out over the threads of a
warp, or of a few, in the same way in every stage; so what a stage hands on for each position stays in a register of the
very thread that needs it next, or in the output row. What is folded from a row every thread gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm.ir import Expr, TensorLoad
from tvm.tirx import BufferLoad, BufferStore, PrimFunc, Stmt, Var

from tvm_ternary.schedule.cpu.fold import Fold, read_fold
from tvm_ternary.schedule.cpu.nest import decompose, index, product, scope, sequence, static, substitute
from tvm_ternary.schedule.cpu.program import Axis, Program, Stage, loads

from .graph_nest import MAX_UNROLLED, WARP, bound, first_of, guarded, local, row_reduce, strided

# Threads of a row by its length: a warp needs no barrier, and its lanes hold up to 16 positions each in registers.
THREADS = ((16 * WARP, WARP), (128 * WARP, 4 * WARP))
THREADS_OF_LONG = 16 * WARP
THREADS_OF_UNKNOWN = 4 * WARP

# Rows of one warp that share a block, where there are enough of them to fill a GPU all the same.
ROWS = 4
MANY_ROWS = 4096

# A fold of fewer positions leaves most of a warp idle: a thread does it alone.
SHORTEST = 8


@dataclass(frozen=True)
class _Home:
    """Where a temporary lives while a row is worked on.

    Parameters
    ----------
    buffer : Var
    registers : int or None
        One for each position that a thread has, one alone for a value of the whole row; None for the output row.
    """

    buffer: Var
    registers: int | None


def schedule_rows(program: Program) -> PrimFunc | None:
    """Write one kernel with a block for each row, or for a few.

    Parameters
    ----------
    program : Program

    Returns
    -------
    PrimFunc or None
        None if the stages do not share rows, none of them folds or all are too short, one is neither a map nor a known
        fold, or a stage reads another thread's values.
    """
    stages = program.stages
    if not any(stage.reduced for stage in stages) or not all(s.is_map or read_fold(s) is not None for s in stages):
        return None
    found = _share_rows(stages)
    if found is None:
        return None
    rows, stages = found
    if any(stage.reduced and any(not axis.reduce for axis in stage.axes[len(rows) :]) for stage in stages):
        return None
    lengths = [product([axis.extent for axis in stage.axes[len(rows) :]]) for stage in stages]
    if len(stages) == 1 and (static(lengths[0]) or SHORTEST) < SHORTEST:
        return None
    threads = _threads(lengths)
    homes = _find_homes(program, stages, rows, threads)
    return None if homes is None else program.with_nest(_Kernel(rows, stages, threads, homes).nest())


def _share_rows(stages: Sequence[Stage]) -> tuple[tuple[Axis, ...], tuple[Stage, ...]] | None:
    """The leading axes that no stage folds, and the stages with those of the first; None if their extents differ."""
    count = min(next((n for n, axis in enumerate(s.axes) if axis.reduce), len(s.axes)) for s in stages)
    rows = stages[0].axes[:count]
    renamed = []
    for stage in stages:
        own = stage.axes[:count]
        if not all(tvm_ffi.structural_equal(a.extent, b.extent) for a, b in zip(own, rows, strict=True)):
            return None
        at = {axis.var: row.var for axis, row in zip(own, rows, strict=True)}
        moved = stage.mapped(lambda node, at=at: substitute(node, at))  # type: ignore[misc]
        renamed.append(Stage(stage.name, rows + stage.axes[count:], moved.body, moved.init))
    return rows, tuple(renamed)


def _threads(lengths: Sequence[Expr]) -> int:
    known = [static(length) for length in lengths]
    if None in known:
        return THREADS_OF_UNKNOWN
    longest = max(length for length in known if length is not None)
    return next((threads for most, threads in THREADS if longest <= most), THREADS_OF_LONG)


def _find_homes(
    program: Program, stages: Sequence[Stage], rows: Sequence[Axis], threads: int
) -> dict[Var, _Home] | None:
    """Give each temporary a place; None if a stage reads what another thread has, or there is no place."""
    homes: dict[Var, _Home] = {}
    temporaries = set(program.temporaries)
    for position, stage in enumerate(stages):
        buffer = stage.body.buffer
        readers = [other for other in stages[position + 1 :] if other.reads(buffer)]
        if buffer not in temporaries:
            if readers:
                return None
            continue
        inner = () if stage.reduced else stage.axes[len(rows) :]
        if not all(_reads_own(reader, stage, len(rows)) for reader in readers):
            return None
        count = -(-(static(product([axis.extent for axis in inner])) or threads * (MAX_UNROLLED + 1)) // threads)
        if count <= MAX_UNROLLED:
            homes[buffer] = _Home(local([count], buffer.dtype, buffer.name), count if inner else 1)
        elif all(home.registers is not None for home in homes.values()) and _fits_output(stage, stages[-1], len(rows)):
            homes[buffer] = _Home(stages[-1].body.buffer, None)
        else:
            return None
    return homes


def _reads_own(reader: Stage, writer: Stage, rows: int) -> bool:
    """Whether a stage reads, at each position, only what was written for that position, or for the whole row."""
    written = writer.body
    inner, own = reader.axes[rows:], () if writer.reduced else writer.axes[rows:]
    if own and not _same_extents(inner, own):
        return False
    here = {axis.var: mine.var for axis, mine in zip(own, inner, strict=False)}
    expected = [substitute(i, here) for i in written.indices]
    reads = [load for load in loads(reader.body) if load.source.same_as(written.buffer)]
    return all(tvm_ffi.structural_equal(load.indices, expected) for load in reads)


def _same_extents(a: Sequence[Axis], b: Sequence[Axis]) -> bool:
    return len(a) == len(b) and all(tvm_ffi.structural_equal(x.extent, y.extent) for x, y in zip(a, b, strict=True))


def _fits_output(writer: Stage, last: Stage, rows: int) -> bool:
    """Whether values can wait in the output: as large, and each replaced by the position that it was made for."""
    buffer, output = writer.body.buffer, last.body
    if not last.is_map or buffer.dtype != output.buffer.dtype:
        return False
    if not tvm_ffi.structural_equal(buffer.shape, output.buffer.shape):
        return False
    here = {axis.var: mine.var for axis, mine in zip(writer.axes[rows:], last.axes[rows:], strict=False)}
    same_place = tvm_ffi.structural_equal([substitute(i, here) for i in writer.body.indices], list(output.indices))
    return _same_extents(writer.axes[rows:], last.axes[rows:]) and bool(same_place)


@dataclass(frozen=True)
class _Kernel:
    """Writes the kernel."""

    rows: tuple[Axis, ...]
    stages: tuple[Stage, ...]
    threads: int
    homes: dict[Var, _Home]

    def nest(self) -> Stmt:
        """Blocks, rows of a block, threads of a row, stages."""
        extents = [axis.extent for axis in self.rows]
        total = product(extents)
        known = static(total) or 1
        together = ROWS if self.threads == WARP and known >= MANY_ROWS and known % ROWS == 0 else 1

        def thread(number: Expr) -> Stmt:
            at = {axis.var: i for axis, i in zip(self.rows, decompose(number, extents), strict=True)}
            own = [home.buffer for home in self.homes.values() if home.registers is not None]
            return bound("threadIdx.x", self.threads, lambda x: scope("row", substitute(self._stages(x), at), own))

        def block(number: Expr) -> Stmt:
            if together == 1:
                return thread(number)
            return bound("threadIdx.y", together, lambda y: thread(number * together + y))

        return bound("blockIdx.x", product([total // together]), block)

    def _stages(self, thread: Expr) -> Stmt:
        return sequence([self._stage(stage, thread) for stage in self.stages])

    def _stage(self, stage: Stage, thread: Expr) -> Stmt:
        fold = read_fold(stage)
        if fold is not None:
            return self._fold(stage, fold, thread)
        if stage.axes[len(self.rows) :]:
            return self._positions(stage, thread, lambda step: stage.body)
        # One value of the whole row: each thread makes its own, or one stores it.
        store = self._placed(stage.body, index(0))
        kept = stage.body.buffer in self.homes
        return store if kept else guarded([first_of([thread])], store)

    def _positions(self, stage: Stage, thread: Expr, body: Any) -> Stmt:
        """Do something at each of this thread's positions of a stage."""
        inner = stage.axes[len(self.rows) :]
        extents = [axis.extent for axis in inner]

        def one(step: Expr, at: Expr) -> Stmt:
            position = {axis.var: i for axis, i in zip(inner, decompose(at, extents), strict=True)}
            return substitute(self._placed(body(step), step), position)

        return strided(product(extents), self.threads, thread, one)

    def _fold(self, stage: Stage, fold: Fold, thread: Expr) -> Stmt:
        own = local([1], fold.target.dtype, "own")
        zero = [index(0)]
        start = BufferStore(own, fold.identity, zero)
        add = BufferStore(own, fold.combine(own[0], fold.value), zero)
        combine, buffers = row_reduce(fold.combine, own, thread, self.threads)
        finish = self._placed(BufferStore(fold.target, own[0], list(fold.indices)), index(0))
        if fold.target not in self.homes:
            finish = guarded([first_of([thread])], finish)
        terms = self._positions(stage, thread, lambda step: add)
        return scope("fold", sequence(start, terms, combine, finish), [own, *buffers])

    def _placed(self, node: Stmt, step: Expr) -> Stmt:
        """Point reads and writes of temporaries to their homes."""

        def where(home: _Home, indices: Sequence[Expr]) -> list[Expr]:
            if home.registers is None:
                return list(indices)
            return [step if home.registers > 1 else index(0)]

        def load(item: TensorLoad) -> Expr:
            home = self.homes.get(item.source)
            return item if home is None else BufferLoad(home.buffer, where(home, item.indices))

        def store(item: BufferStore) -> Stmt:
            home = self.homes.get(item.buffer)
            return item if home is None else BufferStore(home.buffer, item.value, where(home, item.indices))

        return tvm_ffi.structural_map(node, [(TensorLoad, load), (BufferStore, store)])
