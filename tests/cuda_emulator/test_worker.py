"""Modules of TVM on the fake GPU: the host code, TVM's CUDA runtime and the generated kernels are the real ones."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.s_tir import dlight
from tvm.script import tirx as T

from tests.cuda_emulator import EmulatorError, Out, Worker


@pytest.fixture(scope="module")
def gpu() -> Iterator[Worker]:
    with Worker(compute_capability=(9, 0)) as worker:
        yield worker


@T.prim_func(s_tir=True)
def by_rows(x: T.handle, y: T.handle):  # type: ignore[no-untyped-def]
    T.func_attr({"global_symbol": "main", "tirx.noalias": True, "tirx.is_scheduled": True})
    m = T.int64()
    X = T.match_buffer(x, (m, 64), "float32")
    Y = T.match_buffer(y, (m, 64), "float32")
    if m <= T.int64(2):
        with T.launch_thread("blockIdx.x", m) as row, T.launch_thread("threadIdx.x", 64) as lane:
            Y[row, lane] = X[row, 63 - lane] + T.float32(1)
    else:
        with T.launch_thread("blockIdx.x", m) as row, T.launch_thread("threadIdx.x", 32) as lane:
            Y[row, lane] = X[row, 63 - lane]
            Y[row, lane + 32] = X[row, 31 - lane]


@pytest.mark.parametrize(("m", "added"), [(1, 1), (2, 1), (3, 0), (70, 0)])
def test_the_host_chooses_a_kernel(gpu: Worker, rng: np.random.Generator, m: int, added: int) -> None:
    x = rng.standard_normal((m, 64)).astype(np.float32)
    y = np.empty_like(x)
    assert gpu.run(by_rows, x, Out(y)) == []
    np.testing.assert_array_equal(y, x[:, ::-1] + np.float32(added))
    assert gpu.counters["launches"] == 1


@T.prim_func(s_tir=True)
def past_the_end(x: T.handle, y: T.handle):  # type: ignore[no-untyped-def]
    T.func_attr({"global_symbol": "main", "tirx.noalias": True, "tirx.is_scheduled": True})
    X = T.match_buffer(x, (64,), "float32")
    Y = T.match_buffer(y, (64,), "float32")
    with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", 64) as lane:
        Y[lane] = X[lane + 1]


@T.prim_func(s_tir=True)
def half_written(x: T.handle, y: T.handle):  # type: ignore[no-untyped-def]
    T.func_attr({"global_symbol": "main", "tirx.noalias": True, "tirx.is_scheduled": True})
    X = T.match_buffer(x, (64,), "float32")
    Y = T.match_buffer(y, (64,), "float32")
    with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", 32) as lane:
        Y[lane] = X[lane]


def test_errors_reach_the_caller_and_the_worker_goes_on(gpu: Worker) -> None:
    x, y = np.ones(64, np.float32), np.empty(64, np.float32)
    with pytest.raises(
        EmulatorError, match=r"kernel main_kernel, .* thread \(63,0,0\).* where no memory is.*\(line \d+: `"
    ):
        gpu.run(past_the_end, x, Out(y))
    with pytest.raises(EmulatorError, match="of which nothing wrote byte 128"):
        gpu.run(half_written, x, Out(y))
    with pytest.raises(EmulatorError, match=r"Mismatched Y.ndim"):
        gpu.run(by_rows, x[None], Out(y))
    rows = np.empty((1, 64), np.float32)
    gpu.run(by_rows, x[None], Out(rows))
    np.testing.assert_array_equal(rows, np.full((1, 64), 2))


def network(dtype: str) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 64), dtype))
    w = relax.Var("w", relax.TensorType((64, 48), dtype))
    g = relax.Var("g", relax.TensorType((48,), dtype))
    with builder.function("main", [x, w, g]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, w))
            y = builder.emit(relax.op.nn.layer_norm(y, g, g, axes=[-1]))
            y = builder.emit(relax.op.nn.gelu(y))
            y = builder.emit_output(relax.op.nn.softmax(y, -1))
        builder.emit_func_output(y)
    with tvm.target.Target({"kind": "cuda", "arch": "sm_90"}):
        module = relax.get_pipeline("zero")(builder.get())
        rules = ("Matmul", "GEMV", "Reduction", "GeneralReduction", "Fallback")
        return dlight.ApplyDefaultSchedule(*(getattr(dlight.gpu, rule)() for rule in rules))(module)


def expected(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> Any:
    from math import erf, sqrt

    y = x.astype(np.float64) @ w.astype(np.float64)
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5) * g + g
    y = y * (0.5 + 0.5 * np.vectorize(erf)(y / sqrt(2)))
    y = np.exp(y - y.max(1, keepdims=True))
    return y / y.sum(1, keepdims=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 3e-2)])
@pytest.mark.parametrize("n", [1, 37])
def test_a_network(gpu: Worker, rng: np.random.Generator, dtype: str, tolerance: float, n: int) -> None:
    """TVM's own kernels are free of races, and right."""
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in ((n, 64), (64, 48), (48,))]
    [y] = gpu.run(network(dtype), *arrays, seed=n)
    np.testing.assert_allclose(y, expected(*arrays), rtol=tolerance, atol=1e-4 if dtype == "float16" else 1e-7)
    assert gpu.counters["launches"] == 3
    assert gpu.counters["copies_from_device"] == 0


def test_a_graph_is_captured(gpu: Worker, rng: np.random.Generator) -> None:
    """TVM runs what it captures once by itself before: every call of `run` makes a virtual machine of its own."""

    @T.prim_func(private=True, s_tir=True)
    def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        for lane in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("double"):
                i = T.axis.spatial(64, lane)
                y[i] = x[i] * T.float32(2)

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((64,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            name, y = builder.add_func(double, "double"), x
            for _ in range(5):
                y = builder.emit(relax.call_tir(name, relax.Tuple([y]), relax.TensorType((64,), "float32")))
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    value = rng.standard_normal(64).astype(np.float32)
    [result] = gpu.run(builder.get(), value, config={"relax.backend.use_cuda_graph": True})
    np.testing.assert_array_equal(result, 32 * value)
    assert gpu.counters["graphs"] == 1
    assert gpu.counters["launches"] >= 5


def test_the_source_of_a_module(gpu: Worker) -> None:
    assert "main_kernel" in gpu.source(by_rows)
