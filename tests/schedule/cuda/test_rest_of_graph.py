"""Many functions in one module: which rule each gets, and that its kernels compute what LLVM's code does.

`test_graph` looks at one function at a time; here every kind that a model may hold has a line.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

from tests.cuda_emulator import Worker
from tests.graph.passes.small_graphs import quantized
from tests.models import gpt2, llama
from tests.schedule.cpu.graphs import EPSILON, Array, Build, make_graph, normal, tensor
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.read_through import read_through
from tvm_ternary.graph.pipeline import lower
from tvm_ternary.schedule.cuda.graph import schedule_module
from tvm_ternary.target import resolve

op = relax.op
TARGET = tvm.target.Target(resolve("cuda-sm_90").tvm)


class Cases:
    """Results of one graph, each by a name, on both devices.

    Parameters
    ----------
    builds : dict of str to callable
        Take ``emit`` and all inputs.
    inputs
        As `make_graph` takes them.
    """

    def __init__(self, builds: dict[str, Build], *inputs: Any) -> None:
        def build(emit: Any, *x: Any) -> Any:
            return relax.Tuple([emit(one(emit, *x)) for one in builds.values()])

        self.names = tuple(builds)
        lowered = lower_graph_ops(make_graph(build, *inputs))
        self.module, self.sources = schedule_module(read_through(lowered), TARGET)
        self.plain = relax.VirtualMachine(tvm.compile(lowered, target="llvm"), tvm.cpu())["main"]

    def results(self, gpu: Worker, *arrays: Array) -> Iterable[tuple[str, Array, Array]]:
        """Name, result on the GPU, result of LLVM's code."""
        wanted = [item.numpy() for item in self.plain(*map(tvm.runtime.tensor, arrays))]
        return zip(self.names, gpu.run(self.module, *arrays), wanted, strict=True)

    def check(self, gpu: Worker, *arrays: Array, terms: int) -> None:
        """Equal up to rounding `terms` additions in another order; integers and booleans to the bit."""
        for name, got, want in self.results(gpu, *arrays):
            assert got.dtype == want.dtype, name
            if got.dtype == np.float32:
                scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0)))
                tolerance = {"rtol": 16 * EPSILON, "atol": terms * scale * EPSILON}
                np.testing.assert_allclose(got, want, err_msg=name, **tolerance)
            else:
                np.testing.assert_array_equal(got, want, err_msg=name)


def test_normalisations(gpu: Worker) -> None:
    cases = Cases(
        {
            "rms norm": lambda emit, x, gamma: op.nn.rms_norm(x, gamma, [-1], epsilon=1e-5),
            "log softmax": lambda emit, x, gamma: op.nn.log_softmax(x, -1),
            "mean": lambda emit, x, gamma: op.mean(x, [-1]),
            "variance": lambda emit, x, gamma: op.variance(x, [-1]),
            "variance of columns": lambda emit, x, gamma: op.variance(x, [0]),
            "product": lambda emit, x, gamma: op.prod(x, [-1]),
            "softmax of columns": lambda emit, x, gamma: op.nn.softmax(x, 0),
        },
        tensor(("b", "n")),
        tensor(("n",)),
    )
    rows = ("rms_norm", "log_softmax", "mean", "variance", "variance1", "prod")
    assert cases.sources == {**dict.fromkeys(rows, "rule:rows"), "softmax": "rule:points"}
    for b, n in ((1, 1), (5, 31), (3, 33), (2, 300)):
        cases.check(gpu, 1 + normal(n, b, n) / 8, normal(1, n), terms=b + n)


@pytest.mark.parametrize("length", [513, 20000])
def test_rows_beyond_a_warp_and_beyond_all_registers(gpu: Worker, length: int) -> None:
    cases = Cases(
        {
            "softmax": lambda emit, x, gamma: op.nn.softmax(x, -1),
            "layer norm": lambda emit, x, gamma: op.nn.layer_norm(x, gamma, gamma, [-1]),
            "maximum": lambda emit, x, gamma: op.max(x, [-1]),
        },
        tensor((2, length)),
        tensor((length,)),
    )
    assert set(cases.sources.values()) == {"rule:rows"}
    cases.check(gpu, normal(1, 2, length), normal(2, length), terms=length // 8)


def test_infinity_and_nan(gpu: Worker) -> None:
    """They go where they go on a CPU, the sign of nothing else changed."""
    one = relax.const(np.float32(1))
    cases = Cases(
        {
            "relu": lambda emit, x: op.nn.relu(x),
            "at most one": lambda emit, x: op.minimum(x, one),
            "softmax": lambda emit, x: op.nn.softmax(x, -1),
            "sum": lambda emit, x: op.sum(x, [-1]),
            "largest": lambda emit, x: op.max(x, [-1]),
            "is nan": lambda emit, x: op.isnan(x),
            "tanh": lambda emit, x: op.tanh(x),
        },
        tensor(("b", "n")),
    )
    x = normal(0, 6, 40)
    x[0, 3], x[1, 7], x[2, 5:], x[3], x[4, 2:4] = np.nan, np.inf, -np.inf, -np.inf, (np.inf, -np.inf)
    for name, got, want in cases.results(gpu, x):
        for kind in (np.isnan, np.isposinf, np.isneginf) if want.dtype == np.float32 else (np.asarray,):
            np.testing.assert_array_equal(kind(got), kind(want), err_msg=name)


def test_products(gpu: Worker) -> None:
    """Every way in which factors are stored, and one row or column of them."""

    def einsum(emit: Any, *x: Any, how: str, factors: tuple[int, int]) -> Any:
        return op.einsum(relax.Tuple([x[n] for n in factors]), how)

    cases = Cases(
        {
            "first turned": partial(einsum, how="bkm,bkn->bmn", factors=(0, 1)),
            "second turned": partial(einsum, how="bmk,bnk->bmn", factors=(2, 3)),
            "both turned": partial(einsum, how="bkm,bnk->bmn", factors=(0, 3)),
            "broadcast": lambda emit, kt, b, a, *_: op.matmul(op.expand_dims(a, 1), op.expand_dims(b, 0)),
            "by a vector": lambda emit, kt, b, a, bt, v, *_: op.matmul(a, v),
            "a vector by": lambda emit, kt, b, a, bt, v, *_: op.matmul(v, b),
            "integers": lambda emit, *x: op.matmul(x[5], op.permute_dims(x[5])),
        },
        *(tensor(("b", *sides)) for sides in (("k", "m"), ("k", "n"), ("m", "k"), ("n", "k"))),
        tensor(("k",)),
        tensor(("m", "k"), "int64"),
    )
    assert set(cases.sources.values()) == {"rule:matmul", "rule:rows", "rule:columns", "rule:points"}
    assert all(who == "rule:matmul" for name, who in cases.sources.items() if "einsum" in name)
    for b, m, n, k in ((1, 1, 1, 1), (2, 5, 7, 3), (1, 33, 34, 35)):
        shapes = (b, k, m), (b, k, n), (b, m, k), (b, n, k), (k,)
        integers = np.random.default_rng(k).integers(-(2**30), 2**30, (m, k))
        cases.check(gpu, *(normal(i, *shape) for i, shape in enumerate(shapes)), integers, terms=4 * k)


@pytest.mark.parametrize("length", ["s", 33])
def test_products_of_moved_factors(gpu: Worker, length: int | str) -> None:
    """Projections of attention are read as they lie; no kernel moves them."""

    def build(emit: Any, q: Any, k: Any, v: Any) -> Any:
        scores = emit(op.matmul(op.permute_dims(q, [0, 2, 1, 3]), op.permute_dims(k, [0, 2, 3, 1])))
        return op.matmul(op.nn.softmax(scores), op.permute_dims(v, [0, 2, 1, 3]))

    cases = Cases(
        {"attention": build, "same": lambda emit, q, k, v: op.matmul(q, op.permute_dims(q, [0, 1, 3, 2]))},
        *[tensor((2, length, 4, 8))] * 3,
    )
    assert sorted(cases.sources.values()) == ["rule:matmul"] * 3 + ["rule:rows"]
    for s in (1, 7, 33) if length == "s" else (33,):
        cases.check(gpu, *(normal(n, 2, s, 4, 8) for n in range(3)), terms=64)


@pytest.mark.parametrize("width", [8, 9])
def test_what_moves_or_converts(gpu: Worker, width: int) -> None:
    """Vectors of four divide one of the widths."""
    cases = Cases(
        {
            "rows taken": lambda emit, x, i, c: op.take(x, op.clip(i, 0, 3), 0, "clip"),
            "columns taken": lambda emit, x, i, c: op.take(x, op.clip(i, 0, 3), 1, "clip"),
            "elements gathered": lambda emit, x, i, c: op.gather_elements(x, op.clip(i, 0, 3), 1),
            "padded": lambda emit, x, i, c: op.nn.pad(x, [1, 0, 3, 5]),
            "lower triangle": lambda emit, x, i, c: op.tril(x),
            "every third": lambda emit, x, i, c: op.strided_slice(x, [1], [1], [width], [3]),
            "three together": lambda emit, x, i, c: op.concat([x, op.negative(x), x], 1),
            "turned": lambda emit, x, i, c: op.permute_dims(x),
            "to float": lambda emit, x, i, c: op.astype(i, "float32"),
            "to int32": lambda emit, x, i, c: op.astype(op.multiply(x, relax.const(np.float32(9))), "int32"),
            "to bool": lambda emit, x, i, c: op.astype(i, "bool"),
            "from bool": lambda emit, x, i, c: op.astype(c, "float32"),
            "chosen": lambda emit, x, i, c: op.where(c, x, op.negative(x)),
            "chosen integers": lambda emit, x, i, c: op.where(c, i, op.negative(i)),
            "not": lambda emit, x, i, c: op.logical_not(c),
            "both": lambda emit, x, i, c: op.logical_and(c, op.less(i, op.negative(i))),
            "divided down": lambda emit, x, i, c: op.floor_divide(i, relax.const(3, "int64")),
            "remainder": lambda emit, x, i, c: op.floor_mod(i, relax.const(3, "int64")),
            "any": lambda emit, x, i, c: op.max(op.astype(c, "int32"), [-1]),
            "gelu": lambda emit, x, i, c: op.nn.gelu(x),
            "where the largest is": lambda emit, x, i, c: op.argmax(x, 0),
        },
        tensor(("b", width)),
        tensor(("b", width), "int64"),
        tensor(("b", width), "bool"),
    )
    assert cases.sources.pop(next(name for name in cases.sources if name.endswith("_max"))) == "rule:rows"
    assert set(cases.sources.values()) == {"rule:points"}
    for b in (1, 4, 131):
        x = normal(b, b, width)
        integers = np.random.default_rng(b).integers(-9, 9, (b, width))
        cases.check(gpu, x, integers, integers % 2 == 0, terms=1)


def test_a_number_alone(gpu: Worker) -> None:
    number = Cases({"minus": lambda emit, x: op.negative(x)}, tensor(()))
    number.check(gpu, np.array(1.5, np.float32), terms=1)


def test_nothing(gpu: Worker) -> None:
    """No rows, or rows of nothing: a sum of that is zero, where LLVM's code leaves what was there before."""
    cases = Cases(
        {
            "minus": lambda emit, a, b: op.negative(a),
            "softmax": lambda emit, a, b: op.nn.softmax(a, -1),
            "sum": lambda emit, a, b: op.sum(a, [-1]),
            "sum of columns": lambda emit, a, b: op.sum(a, [1]),
            "product": lambda emit, a, b: op.matmul(a, b),
        },
        tensor(("b", "m", "k")),
        tensor(("b", "k", "n")),
    )
    assert set(cases.sources.values()) == {"rule:points", "rule:rows", "rule:columns", "rule:matmul"}
    for b, m, k, n in ((0, 5, 6, 7), (2, 0, 6, 7), (2, 5, 0, 7), (2, 5, 6, 0)):
        for name, got, want in cases.results(gpu, np.zeros((b, m, k), np.float32), np.zeros((b, k, n), np.float32)):
            assert got.shape == want.shape, name
            assert name == "softmax" or not got.any(), name


def test_windows(gpu: Worker) -> None:
    """Convolutions and poolings."""
    cases = Cases(
        {
            "along time": lambda emit, x, s, w, v, d, t: op.nn.conv1d(s, v, padding=1, strides=2),
            "each channel": lambda emit, x, s, w, v, d, t: op.nn.conv2d(x, d, padding=1, groups=4),
            "dilated": lambda emit, x, s, w, v, d, t: op.nn.conv2d(x, w, padding=2, dilation=2),
            "transposed": lambda emit, x, s, w, v, d, t: op.nn.conv2d_transpose(x, t, strides=2),
            "largest": lambda emit, x, *_: op.nn.max_pool2d(x, [3, 3], [2, 2], [1, 1, 1, 1]),
            "mean": lambda emit, x, *_: op.nn.avg_pool2d(x, [2, 2], [2, 2]),
            "mean of all": lambda emit, x, *_: op.nn.adaptive_avg_pool2d(x, [1, 1]),
        },
        tensor((2, 4, 8, 10)),
        tensor((2, 4, 33)),
        *(tensor(shape) for shape in ((5, 4, 3, 3), (5, 4, 3), (4, 1, 3, 3), (4, 3, 3, 3))),
    )
    assert cases.sources.pop("adaptive_avg_pool2d") == "rule:rows"
    assert set(cases.sources.values()) == {"rule:columns"}
    shapes = (2, 4, 8, 10), (2, 4, 33), (5, 4, 3, 3), (5, 4, 3), (4, 1, 3, 3), (4, 3, 3, 3)
    cases.check(gpu, *(normal(n, *shape) for n, shape in enumerate(shapes)), terms=64)


def scatter(emit: Any, x: Any, i: Any) -> Any:
    return op.scatter_elements(x, i, x, 0, "add")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("cumsum", lambda emit, x, i: op.cumsum(x, 1)),
        ("sort", lambda emit, x, i: op.sort(x, -1)),
        ("topk", lambda emit, x, i: emit(op.topk(x, 3, -1))[0]),
        ("scatter_elements", scatter),
        ("scatter_nd", lambda emit, x, i: op.scatter_nd(x, op.strided_slice(i, [1], [0], [1]), x, "add")),
    ],
)
def test_points_that_may_meet_are_refused_in_one_line(name: str, build: Build) -> None:
    lowered = lower_graph_ops(make_graph(build, tensor((6, 8)), tensor((6, 8), "int64")))
    with pytest.raises(UnsupportedOperatorError, match=f"function {name}: is left to no thread") as caught:
        schedule_module(lowered, TARGET)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [gpt2, llama])
def test_a_language_model_needs_nobody_elses_schedules(model: Any) -> None:
    imported = import_onnx(model())
    layers = quantized(imported.params, dict.fromkeys(imported.params, "t1a8"))
    schedules = lower(imported, layers, resolve("cuda-sm_90"), bind_weights=True).schedules
    assert {"rule:matmul", "rule:rows", "rule:points"} <= set(schedules.values())
    assert all(who.startswith("rule:") for who in schedules.values())


def blocks(function: tvm.tirx.PrimFunc) -> int:
    """Blocks of the launch of a kernel of known sizes."""
    counts: list[int] = []

    def note(loop: tvm.tirx.For) -> None:
        if loop.thread_binding is not None and loop.thread_binding.thread_tag.startswith("blockIdx"):
            counts.append(int(loop.extent))

    tvm_ffi.structural_walk(function.body, (tvm.tirx.For, note))
    return int(np.prod(counts))


def test_attention_of_one_sentence_is_many_blocks() -> None:
    """12 heads, 128 tokens of 32: both products are cut finely enough for most multiprocessors of an H100."""
    cases = Cases(
        {
            "scores": lambda emit, a, b: op.matmul(a, b),
            "values": lambda emit, a, b: op.matmul(op.matmul(a, b), a),
        },
        tensor((1, 12, 128, 32)),
        tensor((1, 12, 32, 128)),
    )
    functions = [cases.module[name] for name, who in cases.sources.items() if who == "rule:matmul"]
    assert len(functions) == 2
    assert all(blocks(function) >= 96 for function in functions)
