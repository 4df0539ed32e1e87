"""Kernels written directly as TensorIR: loops bound to threads, and what the threads of a block do together.

The rules of this folder read a function as the CPU's do (`schedule/cpu/program.py`) and write a kernel for each group
of stages. Every loop over data is guarded by a comparison with the true extent, so that any size works, known or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import (
    AttrStmt,
    BufferLoad,
    BufferStore,
    CommReducer,
    Evaluate,
    For,
    ForKind,
    IfThenElse,
    IterVar,
    Stmt,
    Var,
)

from tvm_ternary.schedule.cpu.nest import INDEX, index, product, static

WARP = 32

# A loop over registers must be unrolled, or they become memory.
MAX_UNROLLED = 32

Body = Callable[[Expr], Stmt]


def bound(tag: str, extent: int | Expr, body: Body) -> Stmt:
    """Write a loop whose iterations are the blocks or threads of one axis of the launch.

    Blocks along x, the outermost axis, are launched only if there are any: for none TVM's runtime would launch one.

    Parameters
    ----------
    tag : str
        ``"blockIdx.x"``, ``"threadIdx.y"``, ...
    extent : int or Expr
    body : callable (Expr) -> Stmt
    """
    var = Var(tag.replace(".", "_"), INDEX)
    thread = IterVar(None, Var("", INDEX), IterVar.ThreadIndex, tag)
    launch = For(var, index(0), index(extent), ForKind.THREAD_BINDING, body(var), thread)
    if tag != "blockIdx.x" or (static(extent) or 0) > 0:
        return launch
    # A loop of the host, of one turn or none: below a condition, though the host's, TVM inserts no barriers.
    return For(Var("any", INDEX), index(0), tirx.min(index(extent), index(1)), ForKind.SERIAL, launch)


def unrolled(count: int, body: Body) -> Stmt:
    """Write the iterations of a short loop one after the other."""
    if count == 1:
        return body(index(0))
    var = Var("u", INDEX)
    return For(var, index(0), index(count), ForKind.UNROLLED, body(var))


def guarded(conditions: Sequence[Expr], body: Stmt) -> Stmt:
    """Do a statement only where all of some conditions hold."""
    known = [condition for condition in conditions if static(condition) != 1]
    return IfThenElse(tirx.all(*known), body, None) if known else body


def blocks_of(extents: Sequence[int | Expr], size: int) -> Expr:
    """How many blocks of `size` cover an iteration space."""
    return product([tirx.ceildiv(product(extents), index(size))])


def strided(extent: int | Expr, threads: int, thread: Expr, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
    """Share a range out over threads: thread t does t, t + threads, ... as long as they are below `extent`.

    Parameters
    ----------
    extent : int or Expr
    threads : int
    thread : Expr
        Which of them this one is.
    body : callable (step, position) -> Stmt
        Does one position; `step` counts this thread's positions.
    """
    known = static(extent)

    def step(number: Expr) -> Stmt:
        at = number * threads + thread
        whole = known is not None and known % threads == 0
        return guarded([] if whole else [at < extent], body(number, at))

    if known is not None and known <= threads * MAX_UNROLLED:
        return unrolled(-(-known // threads), step)
    var = Var("k", INDEX)
    return For(var, index(0), tirx.ceildiv(index(extent), index(threads)), ForKind.SERIAL, step(var))


def all_reduce(
    combine: Callable[[Expr, Expr], Expr], identity: Expr, value: Expr, result: BufferLoad, threads: Sequence[Expr]
) -> Stmt:
    """Combine one value of each thread; every thread gets the result.

    All threads of the block must arrive here.

    Parameters
    ----------
    combine : callable (Expr, Expr) -> Expr
    identity : Expr
    value : Expr
        This thread's.
    result : BufferLoad
        The element, in a buffer of scope "local", that receives what is combined.
    threads : sequence of Expr
        Loop variables of the thread axes to combine over.
    """
    left, right = (Var(name, identity.ty) for name in ("a", "b"))
    reducer = CommReducer([left], [right], [combine(left, right)], [identity])
    call = tirx.tvm_thread_allreduce(tirx.const(1, "uint32"), value, tirx.const(True, "bool"), result, *threads)
    return AttrStmt(reducer, "reduce_scope", index(0), Evaluate(call))


def row_reduce(
    combine: Callable[[Expr, Expr], Expr], own: Var, thread: Expr, threads: int
) -> tuple[list[Stmt], list[Var]]:
    """Combine the values of one or more whole warps; every thread gets the result, in the register it gave.

    Written out, since TVM's own all-reduce puts its result where the whole block can write it: storage rewriting then
    takes that place for what is computed of the result, and each thread changes it once more.

    Parameters
    ----------
    combine : callable (Expr, Expr) -> Expr
    own : Var
        A register: this thread's value, then the result.
    thread : Expr
        Number of this thread, all of which must arrive here.
    threads : int
        A multiple of a warp. With more than one warp, all threads of the block.

    Returns
    -------
    statements : list of Stmt
    buffers : list of Var
        What they need in shared memory.
    """
    zero = index(0)

    def step(distance: int) -> Stmt:
        mask, size = tirx.const(0xFFFFFFFF, "uint32"), tirx.const(WARP, "int32")
        other = tirx.op.tvm_warp_shuffle_xor(mask, own[zero], tirx.const(distance, "int32"), size, size)
        return BufferStore(own, combine(own[zero], other), [zero])

    within = [step(WARP >> n) for n in range(1, WARP.bit_length())]
    warps = threads // WARP
    if warps == 1:
        return within, []
    parts = shared([warps], own.dtype, "parts")
    give = BufferStore(parts, own[zero], [tirx.floordiv(thread, index(WARP))])
    take = [BufferStore(own, parts[zero], [zero])]
    take += [BufferStore(own, combine(own[zero], parts[index(warp)]), [zero]) for warp in range(1, warps)]
    return [*within, guarded([tirx.EQ(tirx.floormod(thread, index(WARP)), zero)], give), *take], [parts]


def first_of(threads: Sequence[Expr]) -> Expr:
    """Whether this thread is number zero on each of some thread axes."""
    return reduce(tirx.And, [tirx.EQ(thread, index(0)) for thread in threads])


def local(shape: Sequence[int | Expr], dtype: str, name: str) -> Var:
    """Registers of one thread."""
    return tirx.decl_buffer([index(size) for size in shape], dtype, name, scope="local")


def shared(shape: Sequence[int | Expr], dtype: str, name: str) -> Var:
    """Memory of one block."""
    return tirx.decl_buffer([index(size) for size in shape], dtype, name, scope="shared")
