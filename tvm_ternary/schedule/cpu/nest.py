"""Loop nests written directly as TensorIR.

Schedule primitives guard the ragged end of a loop with a predicate, and a predicate inside a vectorised loop makes TVM
fall back to scalars; with dynamic shapes that is every loop. The rules of this folder therefore write their nests with
these few helpers, which treat the ragged end so that it stays vectorised (`strips`).

Buffers that must stay in registers are small and of scope "global": those TVM puts on the stack, from where LLVM
promotes them. For a buffer of scope "local" it would call the allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, PrimType, TensorLoad
from tvm.s_tir import SBlock, SBlockRealize
from tvm.sym import Analyzer
from tvm.tirx import For, ForKind, IfThenElse, IntImm, SeqStmt, Stmt, Var
from tvm.tirx.analysis import undefined_vars

INDEX = "int64"

# Work is counted in scalar operations; vectorised, one takes about a tenth of a cycle. An idle pool costs 5 to 20 us to
# wake: with less work than this one thread is done sooner.
PARALLEL_MIN_WORK = 1 << 19

# Axes are fused into tasks until a task carries no more than this: small enough to share out evenly, and no smaller,
# for a task costs the index arithmetic of the fused axes.
TASK_WORK = 1 << 15

# Stands for a variable that is known only at run time when tasks are sized.
TYPICAL_DYNAMIC = 64

# What an open number of tasks is at least before axes are no longer fused. With known extents tasks are fused for their
# size; with open ones that is a guess, and divisions by what is open cost some percent of a small task.
ENOUGH_TASKS = 8


def index(value: int | Expr) -> Expr:
    """Turn a Python integer into an index expression; expressions pass."""
    return IntImm(INDEX, value) if isinstance(value, int) else value


def static(value: int | Expr) -> int | None:
    """The value of an index expression if it is a constant, else None."""
    if isinstance(value, int):
        return value
    return int(value.value) if isinstance(value, IntImm) else None


def product(values: Sequence[int | Expr]) -> Expr:
    """Multiply extents; constants are folded."""
    return Analyzer().simplify(reduce(lambda a, b: a * b, map(index, values), index(1)))


def sequence(*statements: Stmt | Sequence[Stmt]) -> Stmt:
    """Put statements one after another, flattening lists."""
    flat: list[Stmt] = []
    for item in statements:
        flat.extend([item] if isinstance(item, Stmt) else item)
    return flat[0] if len(flat) == 1 else SeqStmt(flat)


def loop(extent: int | Expr, body: Callable[[Expr], Stmt], kind: ForKind = ForKind.SERIAL, name: str = "i") -> Stmt:
    """Write one loop from zero; a loop of one iteration is only its body."""
    if static(extent) == 1:
        return body(index(0))
    var = Var(name, INDEX)
    return For(var, index(0), index(extent), kind, body(var))


def vector(lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """Write a statement that is done for `lanes` consecutive values at once."""
    return loop(lanes, body, ForKind.VECTORIZED, "lane")


def scope(name: str, body: Stmt, buffers: Sequence[Var] = ()) -> Stmt:
    """Wrap a statement in an opaque block that owns `buffers`."""
    return SBlockRealize([], True, SBlock([], [], [], name, body, alloc_buffers=list(buffers)))


def substitute(node: Any, values: Mapping[Var, Expr]) -> Any:
    """Replace variables in an expression or statement."""
    return tvm_ffi.structural_map(node, (Var, lambda var: values.get(var, var)))


def fit_lanes(extent: int | Expr, lanes: int) -> int:
    """The widest power of two that is at most `lanes` and, where it is known, at most `extent`."""
    known = static(extent)
    while known is not None and lanes > max(known, 1):
        lanes //= 2
    return lanes


def strips(
    extent: int | Expr, lanes: int, body: Callable[[Expr, int, Expr | None], Stmt], *, overlap: bool = True
) -> list[Stmt]:
    """Cover a range with vectors, the ragged end included.

    The end is done by one more vector that ends exactly at `extent` and so overlaps the one before it. Only a range
    shorter than one vector is walked one by one, or the end where it must not overlap.

    Parameters
    ----------
    extent : int or Expr
    lanes : int
    body : callable (base, width, stale) -> Stmt
        Writes the code for elements ``base .. base + width``. `stale` is None, or how many of the first of them another
        call has done already: a body that must not do them twice has to mask them.
    overlap : bool
        Whether any element may be done twice at all.

    Returns
    -------
    list of Stmt
    """
    known = static(extent)
    if known is not None:
        lanes = fit_lanes(known, lanes)
        main = loop(known // lanes, lambda i: body(i * lanes, lanes, None), name="strip")
        rest = known % lanes
        if rest and not overlap:
            return [main, loop(rest, lambda i: body(known - rest + i, 1, None), name="rest")]
        return [main] if rest == 0 else [main, body(index(known - lanes), lanes, index(lanes - rest))]
    rest = tirx.floormod(extent, lanes)
    main = loop(tirx.floordiv(extent, lanes), lambda i: body(i * lanes, lanes, None), name="strip")
    if lanes == 1:
        return [main]
    if not overlap:
        return [main, loop(rest, lambda i: body(extent - rest + i, 1, None), name="rest")]
    overlapped = body(extent - lanes, lanes, index(lanes) - rest)
    short = loop(extent, lambda i: body(i, 1, None), name="short")
    return [main, IfThenElse(rest > 0, IfThenElse(extent >= lanes, overlapped, short), None)]


def typical(value: int | Expr) -> int:
    """How much an extent or amount of work is, at least 1, if each variable in it is `TYPICAL_DYNAMIC`.

    What is open counts no less than a variable, quotients too: too few tasks leave threads idle, while too many cost a
    little index arithmetic.
    """
    known = static(value)
    if known is not None:
        return max(known, 1)
    # What is read from a tensor is open, too.
    value = tvm_ffi.structural_map(value, (TensorLoad, lambda load: IntImm(str(load.ty.dtype), TYPICAL_DYNAMIC)))
    sizes = {
        var: IntImm(str(var.ty.dtype), TYPICAL_DYNAMIC) for var in undefined_vars(value) if isinstance(var.ty, PrimType)
    }
    found = static(Analyzer().simplify(substitute(value, sizes)))
    return TYPICAL_DYNAMIC if found is None else max(found, TYPICAL_DYNAMIC)


def _are_open_but_enough(extents: Sequence[int | Expr]) -> bool:
    """Whether there are tasks for all threads whatever the open extents are: more would cost index arithmetic only."""
    known = [value for value in map(static, extents) if value is not None]
    return len(known) < len(extents) and prod(known) >= ENOUGH_TASKS


def decompose(flat: Expr, extents: Sequence[int | Expr]) -> list[Expr]:
    """Split one row-major index into an index for every extent."""
    indices: list[Expr] = []
    for position, extent in enumerate(extents):
        if static(extent) == 1:
            indices.append(index(0))
            continue
        inner = product(extents[position + 1 :])
        value = flat if static(inner) == 1 else tirx.floordiv(flat, inner)
        # The first index that can move needs no remainder: the flat index is below the product.
        moving_before = any(static(e) != 1 for e in extents[:position])
        indices.append(tirx.floormod(value, index(extent)) if moving_before else value)
    return indices


def space(extents: Sequence[int | Expr], work: int | Expr, body: Callable[[list[Expr]], Stmt]) -> Stmt:
    """Run a body over an iteration space whose points are independent, on all threads if that pays.

    Leading axes are fused into one parallel loop until a task is small enough to share out evenly; the other axes stay
    loops of their own, so that their indices need no division.

    Parameters
    ----------
    extents : sequence of int or Expr
    work : int or Expr
        Elementary operations of one point.
    body : callable (indices) -> Stmt

    Returns
    -------
    Stmt
    """
    fused = min(1, len(extents))
    while fused < len(extents) and prod(map(typical, [*extents[fused:], work])) > TASK_WORK:
        if _are_open_but_enough(extents[:fused]):
            break
        fused += 1
    outer = extents[:fused]

    def nest(indices: list[Expr]) -> Stmt:
        if len(indices) == len(extents):
            return body(indices)
        return loop(extents[len(indices)], lambda i: nest([*indices, i]), name=f"ax{len(indices)}")

    def tasks(kind: ForKind) -> Stmt:
        return loop(product(outer), lambda task: nest(decompose(task, outer)), kind, "task")

    # One task, which may turn out at run time, wakes nobody.
    pays = Analyzer().simplify(tirx.all(product([*extents, work]) >= PARALLEL_MIN_WORK, product(outer) > 1))
    known = static(pays)
    if known is not None:
        return tasks(ForKind.PARALLEL) if known else nest([])
    return IfThenElse(pays, tasks(ForKind.PARALLEL), nest([]))
