"""Whether a function runs on threads, all of it: what no launch encloses would run nowhere, or on the host."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import SBlockRealize
from tvm.tirx import AllocBuffer, AttrStmt, Bind, For, ForKind, IfThenElse, PrimFunc, SeqStmt

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
