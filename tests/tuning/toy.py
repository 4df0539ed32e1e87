"""A small task: a float matmul whose two tile sizes are open. Its `realize` runs in worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import tvm
from tvm import te
from tvm.s_tir import Schedule

from tvm_ternary.schedule.records import ANNOTATION

BROKEN = 5
"""A row tile that `realize` refuses."""
DEADLY = 7
"""A row tile whose code ends the process that runs it."""


@dataclass(frozen=True)
class Toy:
    """c (rows, 32) = a (rows, 16) b (16, 32)."""

    rows: int = 32
    space: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"rows": (1, 2, 4), "columns": (8, 16)})
    default: Mapping[str, int] = field(default_factory=lambda: {"rows": 1, "columns": 8})

    @property
    def name(self) -> str:
        return f"toy {self.rows}x32"

    @property
    def workload(self) -> Callable[[], tvm.IRModule]:
        return self._workload

    def _workload(self) -> tvm.IRModule:
        a, b = (te.placeholder(shape, name=name) for shape, name in (((self.rows, 16), "a"), ((16, 32), "b")))
        k = te.reduce_axis((0, 16), name="k")
        c = te.compute((self.rows, 32), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="c")
        return tvm.IRModule({"main": te.create_prim_func([a, b, c])})


def realize(module: tvm.IRModule) -> tvm.IRModule:
    schedule = Schedule(module)
    annotations = schedule.get(schedule.get_sblock("root")).annotations
    rows, columns = (int(annotations[ANNOTATION + name]) for name in ("rows", "columns"))
    if rows == BROKEN:
        raise ValueError("a tile of 5 rows does not fit")
    if rows == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    i, j, k = schedule.get_loops(schedule.get_sblock("c"))
    i_outer, i_inner = schedule.split(i, [None, rows])
    j_outer, j_inner = schedule.split(j, [None, columns])
    schedule.reorder(i_outer, j_outer, k, i_inner, j_inner)
    schedule.unroll(i_inner)
    schedule.vectorize(j_inner)
    return schedule.mod
