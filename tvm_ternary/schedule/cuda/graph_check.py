"""Whether a function runs on threads, all of it: what no launch encloses would run nowhere, or on the host.

And whether it runs on more than one.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm.s_tir import SBlockRealize
from tvm.tirx import AllocBuffer, AttrStmt, Bind, For, ForKind, IfThenElse, PrimFunc, SeqStmt

from tvm_ternary.schedule.cpu.program import Stage

_THREADS = ("thread_extent", "virtual_thread")


def is_bound(func: PrimFunc) -> bool:
    """Whether each of a function's statements stands under a loop over threads."""
    return _is_bound(func.body)


def _is_bound(stmt: Any) -> bool:
    if isinstance(stmt, AttrStmt):
        return stmt.attr_key in _THREADS or _is_bound(stmt.body)
    if isinstance(stmt, For):
        return stmt.kind == ForKind.THREAD_BINDING or _is_bound(stmt.body)
    if isinstance(stmt, SBlockRealize):
        return stmt.block.init is None and _is_bound(stmt.block.body)
    if isinstance(stmt, SeqStmt):
        return all(map(_is_bound, stmt.seq))
    if isinstance(stmt, IfThenElse):
        # A condition on sizes chooses among kernels.
        return _is_bound(stmt.then_case) and (stmt.else_case is None or _is_bound(stmt.else_case))
    return isinstance(stmt, AllocBuffer | Bind)


def is_alone(func: PrimFunc) -> bool:
    """Whether all of a function is one thread's work."""
    extents: list[Any] = []

    def note(loop: For) -> None:
        if loop.kind == ForKind.THREAD_BINDING:
            extents.append(loop.extent)

    def note_launch(attribute: AttrStmt) -> None:
        if attribute.attr_key in _THREADS:
            extents.append(attribute.value)

    tvm_ffi.structural_walk(func.body, [(For, note), (AttrStmt, note_launch)])
    return all(getattr(extent, "value", None) == 1 for extent in extents)


def is_serial(stage: Stage) -> bool:
    """Whether a stage is one point with loops in it, as a scatter is: no schedule makes it more than one thread's."""
    loops: list[For] = []
    tvm_ffi.structural_walk(stage.body, (For, loops.append))
    return not stage.axes and bool(loops)
