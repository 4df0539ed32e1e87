"""What counts as bound to threads, and as one thread's work."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from tvm_ternary.schedule.cuda.graph import schedule_function
from tvm_ternary.schedule.cuda.graph_check import is_alone, is_bound
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
