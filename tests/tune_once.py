"""Tune a tiny matmul with one candidate and print its time in seconds. A program: with wrong versions it crashes."""

from __future__ import annotations

import sys
import tempfile
from types import ModuleType
from typing import Any

import tvm
from tvm import driver, te
from tvm.s_tir import Schedule, meta_schedule

SIZE = 16
TIMEOUT = 120.0


def matmul() -> tvm.tirx.PrimFunc:
    a, b = (te.placeholder((SIZE, SIZE), name=name) for name in "ab")
    k = te.reduce_axis((0, SIZE), name="k")
    c = te.compute((SIZE, SIZE), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="c")
    return te.create_prim_func([a, b, c])


def space(schedule: Schedule) -> None:
    _, columns, _ = schedule.get_loops(schedule.get_sblock("c"))
    schedule.split(columns, schedule.sample_perfect_tile(columns, n=2))


def build(module: tvm.IRModule, target: tvm.target.Target, _: Any) -> Any:
    return driver.build(module, target=target)


def main() -> None:
    # A tuning context imports every tensor intrinsic that TVM knows: ten seconds of parsing, and none is used here.
    sys.modules["tvm.s_tir.tensor_intrin"] = ModuleType("tvm.s_tir.tensor_intrin")
    with tempfile.TemporaryDirectory() as folder:
        database = meta_schedule.tune_tir(
            matmul(),
            tvm.target.Target({"kind": "llvm", "num-cores": 1}),
            work_dir=folder,
            max_trials_global=1,
            num_trials_per_iter=1,
            cost_model="random",
            builder=meta_schedule.builder.LocalBuilder(max_workers=1, timeout_sec=TIMEOUT, f_build=build),
            space=meta_schedule.space_generator.ScheduleFn(space, sch_rules=[], postprocs=[], mutator_probs={}),
        )
        (record,) = database.get_all_tuning_records()
        print(float(record.run_secs[0]))


if __name__ == "__main__":
    main()
