"""Scheduling a whole module: what is left alone, what is named, and who answers first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from tests.schedule.cpu.graphs import TIERS, compile_module, make_graph, normal, tensor
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.schedule.cpu import schedule_function, schedule_module
from tvm_ternary.schedule.cpu.simd import Simd, simd_of
from tvm_ternary.target import resolve

op = relax.op
PORTABLE = tvm.target.Target(resolve(TIERS["portable"]).tvm)


def chain(emit: Any, x: Any) -> Any:
    return op.nn.softmax(emit(op.exp(emit(op.negative(x)))))


def test_every_function_is_scheduled_and_named() -> None:
    lowered = lower_graph_ops(make_graph(chain, tensor(("b", "n"))))
    scheduled, sources = schedule_module(lowered, PORTABLE)
    functions = {v.name_hint: f for v, f in scheduled.functions_items() if isinstance(f, tirx.PrimFunc)}
    assert functions.keys() == sources.keys()
    assert set(sources.values()) == {"rule:injective", "rule:rows"}
    assert all(function.attrs["tirx.is_scheduled"] for function in functions.values())


def test_the_module_given_is_not_changed() -> None:
    lowered = lower_graph_ops(make_graph(chain, tensor(("b", "n"))))
    before = lowered.clone()
    schedule_module(lowered, PORTABLE)
    tvm.ir.assert_structural_equal(lowered, before)


def test_scheduling_is_reproducible() -> None:
    lowered = lower_graph_ops(make_graph(chain, tensor(("b", "n"))))
    first, second = (schedule_module(lowered, PORTABLE)[0] for _ in range(2))
    assert first.script() == second.script()


@T.prim_func(private=True, s_tir=True)
def doubled(x: T.Buffer((T.int64(8),), "float32"), y: T.Buffer((T.int64(8),), "float32")):
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
    for i in range(T.int64(8)):
        with T.sblock("double"):
            v = T.axis.spatial(T.int64(8), i)
            y[v] = x[v] * T.float32(2)


def with_scheduled_kernel() -> tvm.IRModule:
    """exp before, a kernel that is scheduled already, a negation after."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((8,), "float32"))
    kernel = builder.add_func(doubled, "kernel")
    with builder.function("main", [x]):
        with builder.dataflow():
            before = builder.emit(op.exp(x))
            called = builder.emit(relax.call_tir(kernel, [before], relax.TensorType((8,), "float32")))
            result = builder.emit_output(op.negative(called))
        builder.emit_func_output(result)
    return builder.get()


def test_scheduled_kernels_are_neither_fused_nor_touched() -> None:
    lowered = lower_graph_ops(with_scheduled_kernel())
    scheduled, sources = schedule_module(lowered, PORTABLE)
    assert "kernel" not in sources
    assert len(sources) == 2
    tvm.ir.assert_structural_equal(scheduled["kernel"].body, doubled.body)


def test_a_graph_around_a_scheduled_kernel_runs(tier: str) -> None:
    x = normal(0, 8)
    result = compile_module(with_scheduled_kernel(), tier)(x)
    np.testing.assert_allclose(result, -2 * np.exp(x.astype(np.float64)), rtol=4e-7)


def test_reshapes_alone_copy_nothing() -> None:
    def build(emit: Any, x: Any) -> Any:
        batch, length, _ = x.ty.shape
        return op.nn.softmax(emit(op.reshape(emit(op.nn.softmax(x)), (batch, length, 4, 6))))

    _, sources = schedule_module(lower_graph_ops(make_graph(build, tensor(("b", "s", 24)))), PORTABLE)
    assert set(sources.values()) == {"rule:rows"}


@T.prim_func(s_tir=True)
def narrow_indices(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
    for i in range(64):
        with T.sblock("double"):
            v = T.axis.spatial(64, i)
            y[v] = x[v] * T.float32(2)


@T.prim_func(s_tir=True)
def shifted_onto_itself(x: T.Buffer((T.int64(64),), "float32")):
    for i in range(T.int64(63)):
        with T.sblock("shift"):
            v = T.axis.spatial(T.int64(63), i)
            x[v] = x[v + T.int64(1)]


@pytest.mark.parametrize("function", [narrow_indices, shifted_onto_itself])
def test_what_cannot_be_read_safely_stays_as_written(function: tirx.PrimFunc) -> None:
    scheduled, source = schedule_function(function, simd_of(PORTABLE))
    assert source == "fallback:as-written"
    tvm.ir.assert_structural_equal(scheduled.body, function.body)


@T.prim_func(s_tir=True)
def sum_from_five(x: T.Buffer((T.int64(4), T.int64(64)), "float32"), y: T.Buffer((T.int64(4),), "float32")):
    for i, k in T.grid(T.int64(4), T.int64(64)):
        with T.sblock("sum"):
            vi, vk = T.axis.remap("SR", [i, k])
            with T.init():
                y[vi] = T.float32(5)
            y[vi] = y[vi] + x[vi, vk]


def test_a_sum_that_starts_elsewhere_is_not_split_over_lanes() -> None:
    scheduled, source = schedule_function(sum_from_five, simd_of(PORTABLE))
    assert source == "fallback:loops"
    x, y = tvm.runtime.tensor(normal(0, 4, 64)), tvm.runtime.tensor(np.zeros(4, np.float32))
    tvm.compile(scheduled, target=PORTABLE)["sum_from_five"](x, y)
    np.testing.assert_allclose(y.numpy(), 5 + x.numpy().astype(np.float64).sum(-1), rtol=0, atol=1e-5)


def test_other_architectures_get_vectors_too() -> None:
    """The same rules, compiled for a CPU that is not this one."""
    target = tvm.target.Target(resolve("aarch64").tvm)
    weight = relax.const(normal(0, 32, 64))
    graph = make_graph(lambda emit, x: op.nn.softmax(emit(op.matmul(x, weight))), tensor(("b", "s", 32)))
    scheduled, sources = schedule_module(lower_graph_ops(graph), target)
    assert set(sources.values()) == {"rule:matmul", "rule:rows"}
    for name in sources:
        library = tvm.compile(scheduled[name].with_attr("global_symbol", "main"), target=target)
        assert "fmla\tv" in library.mod.inspect_source("asm")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x86-64-v2", Simd(128, 16)),
        ("x86-64-v3", Simd(256, 16)),
        ("x86-64-v4", Simd(512, 32)),
        ("avx512-vnni", Simd(512, 32)),
        ("aarch64", Simd(128, 32)),
    ],
)
def test_vector_unit_of_a_target(name: str, expected: Simd) -> None:
    assert simd_of(tvm.target.Target(resolve(name).tvm)) == expected


@pytest.mark.parametrize(("dtype", "lanes"), [("float32", 8), ("float64", 4), ("int8", 32), ("bool", 32), ("int64", 4)])
def test_lanes(dtype: str, lanes: int) -> None:
    assert Simd(256, 16).lanes(dtype) == lanes
