"""Element-wise stages folded into the stages that read them, so that what they compute never goes through memory."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm.ir import Expr, TensorLoad
from tvm.s_tir import SBlockRealize
from tvm.tirx import PrimFunc, Var

from .nest import static, substitute
from .program import CHOICE, Program, Stage, calls, cost, loads, read_stages, simplify_stage, uses

# An expression read in several places is written out in each: beyond this many operations it stays a buffer.
MAX_INLINED_COST = 256


def read_program(func: PrimFunc) -> Program | None:
    """Read a PrimFunc as stages and inline those that are cheap to compute where they are read.

    Parameters
    ----------
    func : PrimFunc
        As ``LegalizeOps`` and ``FuseTIR`` leave it.

    Returns
    -------
    Program or None
        None if the function is anything but perfect nests with one block each.
    """
    read = read_stages(func)
    if read is None or not isinstance(func.body, SBlockRealize):
        return None
    stages = list(read)
    temporaries = list(func.body.block.alloc_buffers)
    while _each_written_once(stages):
        ready = next((stage for stage in stages if _worth_inlining(stage, stages, temporaries)), None)
        if ready is None:
            break
        stages = _inline(stages, ready)
        temporaries = [buffer for buffer in temporaries if not ready.writes(buffer)]
    return Program(func, tuple(simplify_stage(stage) for stage in stages), tuple(temporaries))


def _each_written_once(stages: list[Stage]) -> bool:
    """Whether a buffer means the same values from the stage that writes it to the end."""
    written = [store.buffer for stage in stages for store in stage.stores]
    early = any(
        stage.reads(store.buffer)
        for position, stage in enumerate(stages)
        for later in stages[position + 1 :]
        for store in later.stores
    )
    return len(written) == len(set(written)) and not early


def _worth_inlining(stage: Stage, stages: list[Stage], temporaries: list[Var]) -> bool:
    if not stage.is_map or not any(stage.writes(buffer) for buffer in temporaries) or not _invertible(stage):
        return False
    buffer = stage.body.buffer
    readers = [other for other in stages if other.reads(buffer)]
    reads = [load for reader in readers for load in loads(reader.body) if load.source.same_as(buffer)]
    if not readers or (len(reads) > 1 and len(reads) * cost(stage.body.value) > MAX_INLINED_COST):
        return False
    if any(reader.reduced for reader in readers) and CHOICE in calls(stage.body):
        # A padding: inside a reduction its condition would be asked again for every step, and keep it from vectors.
        return False
    # What is dear is not computed more often than it was: a mean is made once a row, an exponential once an element.
    # Read twice at the same place it is written twice, but LLVM merges that.
    after_reduction = any(other.reduced and any(stage.reads(s.buffer) for s in other.stores) for other in stages)
    dear = after_reduction or any(name != CHOICE for name in calls(stage.body))
    one_place = all(tvm_ffi.structural_equal(load.indices, reads[0].indices) for load in reads)
    return not dear or (len(readers) == 1 and one_place and _same_box(readers[0], stage))


def _invertible(stage: Stage) -> bool:
    """Whether the stage writes each element at its own axes, so that an index tells the point."""
    names = [i for i in stage.body.indices if static(i) != 0]
    moving = [axis.var for axis in stage.axes if uses(stage.body, axis.var)]
    return (
        all(isinstance(i, Var) for i in names)
        and len(names) == len(set(names))
        and {axis.var for axis in stage.axes}.issuperset(names)
        and set(names).issuperset(moving)
    )


def _same_box(a: Stage, b: Stage) -> bool:
    """Whether two stages have as many points along as many axes."""
    return len(a.axes) == len(b.axes) and all(
        tvm_ffi.structural_equal(x.extent, y.extent) for x, y in zip(a.axes, b.axes, strict=True)
    )


def _inline(stages: list[Stage], producer: Stage) -> list[Stage]:
    """Replace every read of what `producer` writes by the expression it writes."""
    store = producer.body

    def expand(load: TensorLoad) -> Expr:
        if not load.source.same_as(store.buffer):
            return load
        values = {where: at for where, at in zip(store.indices, load.indices, strict=True) if isinstance(where, Var)}
        return substitute(store.value, values)

    def change(node: Any) -> Any:
        return tvm_ffi.structural_map(node, (TensorLoad, expand))

    return [stage.mapped(change) for stage in stages if stage is not producer]
