"""Folding many values into one: what a reduction stage combines, and how lanes do it side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad
from tvm.tirx import Add, BufferStore, FloatImm, IntImm, Max, Min, Mul, Select, Stmt, Var

from .nest import fit_lanes, index, strips, vector
from .program import Stage, loads

COMBINE: dict[type, Callable[[Expr, Expr], Expr]] = {
    Add: lambda a, b: a + b,
    Mul: lambda a, b: a * b,
    Max: tirx.max,
    Min: tirx.min,
}
NEUTRAL = {Add: 0.0, Mul: 1.0}


@dataclass(frozen=True)
class Fold:
    """A reduction ``target = combine(target, value)`` that starts from `identity`.

    Parameters
    ----------
    target : Var
        Buffer that a stage folds into.
    indices : tuple of Expr
        Where in it.
    value : Expr
    identity : Expr
    combine : callable (Expr, Expr) -> Expr
        Associative and commutative, up to rounding.
    """

    target: Var
    indices: tuple[Expr, ...]
    value: Expr
    identity: Expr
    combine: Callable[[Expr, Expr], Expr]


def read_fold(stage: Stage) -> Fold | None:
    """See a reduction stage as a fold; None if it is not one of sum, product, maximum and minimum."""
    store, init = stage.body, stage.init
    if not stage.reduced or not isinstance(store, BufferStore) or not isinstance(init, BufferStore):
        return None
    combine = COMBINE.get(type(store.value))
    if combine is None or not _starts_neutral(type(store.value), init.value):
        return None
    for kept, value in ((store.value.a, store.value.b), (store.value.b, store.value.a)):
        if (
            isinstance(kept, TensorLoad)
            and kept.source.same_as(store.buffer)
            and tvm_ffi.structural_equal(kept.indices, store.indices)
            and not any(load.source.same_as(store.buffer) for load in loads(value))
        ):
            return Fold(store.buffer, tuple(store.indices), value, init.value, combine)
    return None


def _starts_neutral(operation: type, value: Expr) -> bool:
    """Whether every lane may start from a value: it is constant, and counted once or often makes no difference."""
    if not isinstance(value, (IntImm, FloatImm)):
        return False
    # Maximum and minimum of equal values are that value, whatever it is.
    neutral = NEUTRAL.get(operation)
    return neutral is None or float(value.value) == neutral


def accumulator(fold: Fold, lanes: int, name: str = "lanes") -> Var:
    """A register-sized buffer with one running value a lane."""
    return tirx.decl_buffer((index(lanes),), fold.target.dtype, name)


def start(fold: Fold, acc: Var, lanes: int) -> Stmt:
    """Set every lane to the identity."""
    return vector(lanes, lambda lane: BufferStore(acc, fold.identity, [lane]))


def fold_range(fold: Fold, acc: Var, lanes: int, extent: int | Expr, value: Callable[[Expr], Expr]) -> list[Stmt]:
    """Fold ``value(0) .. value(extent - 1)`` into the lanes of `acc`.

    A ragged end is one more vector whose stale lanes count as the identity.
    """

    def strip(base: Expr, width: int, stale: Expr | None) -> Stmt:
        def step(lane: Expr) -> Stmt:
            item = value(base + lane)
            if stale is not None:
                item = Select(lane >= stale, item, fold.identity)
            return BufferStore(acc, fold.combine(acc[lane], item), [lane])

        return vector(width, step)

    return strips(extent, fit_lanes(extent, lanes), strip)


def finish(fold: Fold, acc: Var, lanes: int) -> list[Stmt]:
    """Combine the lanes pairwise; the result is in lane 0."""

    def halve(half: int) -> Stmt:
        return vector(half, lambda lane: BufferStore(acc, fold.combine(acc[lane], acc[lane + half]), [lane]))

    return [halve(lanes >> step) for step in range(1, lanes.bit_length())]
