"""Buffers of schedules are shrunk, those of nests that are written out stay, and both compute the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import te, tirx
from tvm.s_tir import Schedule
from tvm.tirx import BufferStore, PrimFunc

from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence
from tvm_ternary.schedule.lowering import TIR_PIPELINE

ROWS, WIDTH = 8, 16


def scheduled() -> PrimFunc:
    """(x + 1) * 2, a row at a time."""
    x = te.placeholder((ROWS, WIDTH), "float32", "x")
    more = te.compute(x.shape, lambda i, j: x[i, j] + tirx.const(1.0, "float32"), name="more")
    twice = te.compute(x.shape, lambda i, j: more[i, j] * tirx.const(2.0, "float32"), name="twice")
    schedule = Schedule(te.create_prim_func([x, twice]))
    schedule.compute_at(schedule.get_sblock("more"), schedule.get_loops(schedule.get_sblock("twice"))[0])
    return schedule.mod["main"]


def written_out() -> PrimFunc:
    """The same, through a buffer for all rows."""
    x, y, more = (tirx.decl_buffer([index(ROWS), index(WIDTH)], "float32", name) for name in ("x", "y", "more"))

    def row(i: tirx.Expr) -> tirx.Stmt:
        add = loop(WIDTH, lambda j: BufferStore(more, x[i, j] + tirx.const(1.0, "float32"), [i, j]))
        return sequence(add, loop(WIDTH, lambda j: BufferStore(y, more[i, j] * tirx.const(2.0, "float32"), [i, j])))

    return PrimFunc([x, y], scope("root", loop(ROWS, row), [more]))


@tvm.ir.instrument.pass_instrument
class Sizes:
    """Notes how large buffers are before TVM puts them together."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def run_before_pass(self, module: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
        if info.name == "tirx.StorageRewrite":
            for function in module.functions.values():
                tvm_ffi.structural_walk(function.body, (tirx.AllocBuffer, self.note))

    def note(self, node: tirx.AllocBuffer) -> None:
        self.found.append(math.prod(int(extent) for extent in node.buffer.shape))


@pytest.mark.parametrize(("function", "left"), [(scheduled(), WIDTH), (written_out(), ROWS * WIDTH)])
def test_buffers(function: PrimFunc, left: int) -> None:
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    sizes = Sizes()
    with tvm.transform.PassContext(instruments=[sizes]):
        main = tvm.compile(module, tvm.target.Target({"kind": "llvm"}), tir_pipeline=TIR_PIPELINE)["main"]
    assert sizes.found == [left]
    x = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    y = tvm.runtime.tensor(np.zeros_like(x))
    main(tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), (x + 1) * 2)
