"""What counts as bound to threads, and as one thread's work."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_ternary.schedule.cpu.program import read_stages
from tvm_ternary.schedule.cuda.graph import schedule_function
from tvm_ternary.schedule.cuda.graph_check import is_alone, is_bound, is_serial
from tvm_ternary.target import resolve

TARGET = tvm.target.Target(resolve("cuda-sm_90").tvm)


@T.prim_func(s_tir=True)
def plain(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
    for i in range(64):
        with T.sblock("y"):
            n = T.axis.spatial(64, i)
            y[n] = x[n] + T.float32(1)


@T.prim_func(s_tir=True)
def half_bound(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32"), z: T.Buffer((64,), "float32")) -> None:
    for i in T.thread_binding(64, thread="threadIdx.x"):
        with T.sblock("y"):
            n = T.axis.spatial(64, i)
            y[n] = x[n] + T.float32(1)
    for i in range(64):
        with T.sblock("z"):
            n = T.axis.spatial(64, i)
            z[n] = x[n] + T.float32(2)


@T.prim_func(s_tir=True)
def alone(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
    for _ in T.thread_binding(1, thread="threadIdx.x"):
        for i in range(64):
            with T.sblock("y"):
                n = T.axis.spatial(64, i)
                y[n] = x[n] + T.float32(1)


def test_every_statement_must_be_bound() -> None:
    assert not is_bound(plain)
    assert not is_bound(half_bound)
    assert is_bound(alone)
    scheduled, _ = schedule_function(plain, TARGET, "plain")
    assert is_bound(scheduled)
    assert not is_alone(scheduled)


def test_one_thread_is_not_enough() -> None:
    assert is_alone(alone)
    assert not is_alone(half_bound)


@T.prim_func(s_tir=True)
def scatter(i: T.Buffer((64,), "int32"), x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
    with T.sblock("root"), T.sblock("scatter"):
        for n in range(64):
            y[i[n]] = y[i[n]] + x[n]


@T.prim_func(s_tir=True)
def along_a_row(x: T.Buffer((T.int64(64), 8), "float32"), y: T.Buffer((T.int64(64), 8), "float32")) -> None:
    for i in range(T.int64(64)):
        with T.sblock("y"):
            n = T.axis.spatial(T.int64(64), i)
            for k in range(8):
                y[n, k] = x[n, k]


def test_loops_in_one_point_are_one_threads_work() -> None:
    """A schedule may launch a thousand threads for that, all but one of which do nothing."""
    for function, serial in ((scatter, True), (along_a_row, False)):
        stages = read_stages(function)
        assert stages is not None
        assert [is_serial(stage) for stage in stages] == [serial]
