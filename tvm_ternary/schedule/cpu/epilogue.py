"""What happens to a finished sum: it is stored, or first goes through the element-wise stage that follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm_ffi
from tvm.ir import Expr, TensorLoad
from tvm.tirx import BufferStore, Stmt

from .nest import substitute
from .program import Stage, loads

Writer = Callable[[Sequence[Expr], Expr], Stmt]


def read_writer(fold: Stage, after: Sequence[Stage]) -> Writer | None:
    """Find how the results of a reduction stage are stored.

    Parameters
    ----------
    fold : Stage
        Reduces into one element for every point of its spatial axes.
    after : sequence of Stage
        What follows it: nothing, or one map that reads each result at its own point.

    Returns
    -------
    callable (indices, Expr) -> Stmt, or None
        Stores one result, given the indices of the spatial axes. None if something else follows.
    """
    if not after:
        return _direct(fold)
    if len(after) > 1 or not after[0].is_map or len(after[0].axes) != len(fold.spatial):
        return None
    return _through(fold, after[0])


def _direct(fold: Stage) -> Writer:
    store = fold.body

    def write(indices: Sequence[Expr], total: Expr) -> Stmt:
        at = {axis.var: i for axis, i in zip(fold.spatial, indices, strict=True)}
        return BufferStore(store.buffer, total, [substitute(i, at) for i in store.indices])

    return write


def _through(fold: Stage, after: Stage) -> Writer | None:
    target = fold.body.buffer
    same_point = {axis.var: own.var for axis, own in zip(fold.spatial, after.axes, strict=True)}
    expected = [substitute(i, same_point) for i in fold.body.indices]
    reads = [load for load in loads(after.body) if load.source.same_as(target)]
    if not reads or any(not tvm_ffi.structural_equal(load.indices, expected) for load in reads):
        return None

    def write(indices: Sequence[Expr], total: Expr) -> Stmt:
        finished = tvm_ffi.structural_map(
            after.body, (TensorLoad, lambda load: total if load.source.same_as(target) else load)
        )
        return substitute(finished, {axis.var: i for axis, i in zip(after.axes, indices, strict=True)})

    return write
