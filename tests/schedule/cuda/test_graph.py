"""The rules for the rest of a graph, as generated code in the emulator, against the unscheduled functions on LLVM.

The emulator watches every access: a race, an element nobody wrote or a read beyond a buffer is an error there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from tests.cuda_emulator import Worker
from tests.schedule.cpu.graphs import EPSILON, Array, Build, make_graph, normal, tensor
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.kernels.recurrence import Recurrence
from tvm_ternary.schedule.cpu import recurrence
from tvm_ternary.schedule.cuda.graph import schedule_function, schedule_module
from tvm_ternary.schedule.cuda.graph_check import is_bound
from tvm_ternary.target import resolve

op = relax.op
TARGET = tvm.target.Target(resolve("cuda-sm_90").tvm)
# One position, less than a warp, a warp and one more, more than a block.
LENGTHS = (1, 7, 33, 130)


class Graph:
    """A graph scheduled for a GPU, and the same one left as it is."""

    def __init__(self, build: Build, *inputs: Any) -> None:
        lowered = lower_graph_ops(make_graph(build, *inputs))
        self.module, self.sources = schedule_module(lowered, TARGET)
        self.plain = relax.VirtualMachine(tvm.compile(lowered, target="llvm"), tvm.cpu())

    def check(self, gpu: Worker, *arrays: Array, terms: int = 1) -> None:
        """Equal up to rounding `terms` additions in another order; integers to the bit, NaN where there is one."""
        got = gpu.run(self.module, *arrays)[0]
        want = self.plain["main"](*map(tvm.runtime.tensor, arrays)).numpy()
        assert got.dtype == want.dtype
        if got.dtype == np.float32:
            scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0)))
            np.testing.assert_allclose(got, want, rtol=16 * EPSILON, atol=terms * scale * EPSILON)
        else:
            np.testing.assert_array_equal(got, want)


def graph(rule: str, build: Build, *inputs: Any) -> Graph:
    """A graph, every function of which that rule schedules."""
    made = Graph(build, *inputs)
    assert set(made.sources.values()) == {rule}, made.sources
    return made


@pytest.mark.parametrize("length", ["n", *LENGTHS])
def test_softmax(gpu: Worker, length: int | str) -> None:
    made = graph("rule:rows", lambda emit, x: op.nn.softmax(x, -1), tensor(("b", 3, length)))
    for n in (length,) if isinstance(length, int) else LENGTHS:
        made.check(gpu, normal(7, 5, 3, n) * 8, terms=n)


def test_softmax_of_infinity_and_nan(gpu: Worker) -> None:
    made = graph("rule:rows", lambda emit, x: op.nn.softmax(x, -1), tensor(("b", "n")))
    x = normal(0, 4, 40)
    x[0, 3], x[1, 5], x[2, :39] = np.nan, -np.inf, -np.inf
    made.check(gpu, x, terms=40)


@pytest.mark.parametrize("length", [1, 33, 384, 1024, 5000])
def test_layer_norm(gpu: Worker, length: int) -> None:
    inputs = (tensor(("b", "m", length)), tensor((length,)), tensor((length,)))
    made = graph("rule:rows", lambda emit, x, g, b: op.nn.layer_norm(x, g, b, axes=[-1]), *inputs)
    made.check(gpu, normal(1, 2, 3, length) + 1, normal(2, length), normal(3, length), terms=64 + length // 8)


def test_many_rows_share_blocks(gpu: Worker) -> None:
    made = graph("rule:rows", lambda emit, x: op.nn.softmax(x, -1), tensor((4096, 9)))
    made.check(gpu, normal(5, 4096, 9), terms=9)


@pytest.mark.parametrize(
    ("name", "dtype"), [("sum", "float32"), ("max", "float32"), ("min", "int64"), ("sum", "int64")]
)
@pytest.mark.parametrize("axes", [[-1], [1], [0], None, [0, 2]])
def test_reductions(gpu: Worker, name: str, dtype: str, axes: list[int] | None) -> None:
    made = Graph(lambda emit, x: getattr(op, name)(x, axes), tensor(("b", "m", "n"), dtype))
    assert not any("dlight" in source for source in made.sources.values())
    for shape in ((1, 1, 1), (3, 7, 33), (2, 40, 5)):
        made.check(gpu, (normal(4, *shape) * 50).astype(dtype), terms=int(np.prod(shape)))


def test_mean_over_tokens_that_count(gpu: Worker) -> None:
    def build(emit: Any, x: Any, mask: Any) -> Any:
        wide = emit(op.broadcast_to(op.expand_dims(op.astype(mask, "float32"), -1), x.ty.shape))
        total = emit(op.sum(emit(op.multiply(x, wide)), 1))
        return op.divide(total, op.maximum(emit(op.sum(wide, 1)), relax.const(1e-9, "float32")))

    made = Graph(build, tensor(("b", "s", 48)), tensor(("b", "s"), "int64"))
    for s in LENGTHS:
        mask = np.random.default_rng(s).integers(0, 2, (3, s))
        mask[0] = 0
        made.check(gpu, normal(s, 3, s, 48), mask, terms=s)


def test_sums_over_tokens_read_neighbours_side_by_side() -> None:
    """A lane is a column: by rows, the lanes of a warp would read a whole row apart."""
    made = Graph(lambda emit, x: op.sum(x, 1), tensor(("b", "s", 384)))
    assert set(made.sources.values()) == {"rule:columns"}


@pytest.mark.parametrize("sizes", [("m", "n", "k"), (1, 5, 64), (33, 1, 7), (64, 64, 32), (200, 130, 40)])
def test_batched_matmul(gpu: Worker, sizes: tuple[Any, ...]) -> None:
    m, n, k = sizes
    made = Graph(lambda emit, a, b: op.matmul(a, b), tensor(("b", 2, m, k)), tensor(("b", 2, k, n)))
    known = [(1, 1, 1), (33, 7, 65), (4, 130, 32)] if m == "m" else [(m, n, k)]
    for rows, columns, inner in known:
        made.check(gpu, normal(1, 2, 2, rows, inner), normal(2, 2, 2, inner, columns), terms=4 * inner)


def test_scores_of_attention(gpu: Worker) -> None:
    """A product with a transposed factor, a division and a mask behind it."""

    def build(emit: Any, q: Any, k: Any, mask: Any) -> Any:
        scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))))
        return op.add(emit(op.divide(scores, relax.const(4.0, "float32"))), mask)

    heads = tensor(("b", 2, "s", 16))
    made = Graph(build, heads, heads, tensor(("b", 1, 1, "s")))
    assert "rule:matmul" in made.sources.values()
    for s in (1, 31, 70):
        mask = np.where(np.arange(s) < s // 2, np.float32(0), np.float32(-3e38)).reshape(1, 1, 1, s).repeat(2, 0)
        made.check(gpu, normal(1, 2, 2, s, 16), normal(2, 2, 2, s, 16), mask, terms=64)


def test_rows_of_a_table_and_rows_beyond_it(gpu: Worker) -> None:
    made = graph(
        "rule:points", lambda emit, t, i: op.take(t, i, 0, "nan"), tensor((50, 12)), tensor(("b", "s"), "int64")
    )
    for s in LENGTHS:
        indices = np.random.default_rng(s).integers(0, 50, (2, s))
        indices[0, 0] = 99
        made.check(gpu, normal(1, 50, 12), indices)


@pytest.mark.parametrize("axes", [[0, 2, 1, 3], [3, 2, 1, 0], [0, 1, 3, 2]])
@pytest.mark.parametrize("size", ["s", 6])
def test_transposes(gpu: Worker, axes: list[int], size: int | str) -> None:
    made = graph("rule:points", lambda emit, x: op.permute_dims(x, axes), tensor(("b", size, 3, 8)))
    for s in (1, 40) if size == "s" else (6,):
        made.check(gpu, normal(s, 2, s, 3, 8))


@pytest.mark.parametrize("width", [1, 5, 8, 300, "n"])
def test_elements(gpu: Worker, width: int | str) -> None:
    """Vectors of four where a row is whole ones, and choices, which are made one by one."""

    def build(emit: Any, x: Any, y: Any) -> Any:
        return op.where(emit(op.greater(x, y)), emit(op.multiply(x, y)), emit(op.tanh(emit(op.add(x, y)))))

    both = tensor(("m", width))
    for n in (width,) if isinstance(width, int) else (1, 129):
        x, y = normal(1, 7, n), normal(2, 7, n)
        x[0, 0] = np.nan
        graph("rule:points", build, both, both).check(gpu, x, y)
        graph("rule:points", lambda emit, a, b: op.add(op.multiply(a, b), a), both, both).check(gpu, x, y)


def test_parts_put_together(gpu: Worker) -> None:
    made = graph("rule:points", lambda emit, a, b: op.concat([a, b], 1), tensor(("b", "m")), tensor(("b", "n")))
    for m, n in ((1, 1), (33, 5), (4, 128)):
        made.check(gpu, normal(1, 3, m), normal(2, 3, n))


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_where_the_extreme_is(gpu: Worker, name: str) -> None:
    made = graph("rule:points", lambda emit, x: getattr(op, name)(x, -1), tensor(("b", "n")))
    for n in LENGTHS:
        made.check(gpu, normal(n, 4, n).round(1))


def test_convolution_with_padding(gpu: Worker) -> None:
    made = Graph(lambda emit, x, w: op.nn.conv2d(x, w, padding=1), tensor(("b", 3, 9, 11)), tensor((5, 3, 3, 3)))
    made.check(gpu, normal(1, 2, 3, 9, 11), normal(2, 5, 3, 3, 3), terms=64)


def test_no_kernel_leaves_a_statement_to_no_thread() -> None:
    plain = Graph(lambda emit, x: op.nn.softmax(x, -1), tensor(("b", "n")))
    functions = [f for f in plain.module.functions.values() if isinstance(f, tirx.PrimFunc)]
    assert functions
    assert all(is_bound(f) and f.attrs["tirx.is_scheduled"] for f in functions)
    lowered = lower_graph_ops(make_graph(lambda emit, x: op.nn.softmax(x, -1), tensor(("b", "n"))))
    assert not any(is_bound(f) for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc))


def test_what_was_scheduled_is_left_alone() -> None:
    lowered = lower_graph_ops(make_graph(lambda emit, x: op.exp(x), tensor(("n",))))
    once, sources = schedule_module(lowered, TARGET)
    twice, again = schedule_module(once, TARGET)
    assert sources
    assert not again
    tvm.ir.assert_structural_equal(once, twice)


def test_a_recurrence_is_refused_by_name() -> None:
    shape = Recurrence("rnn", 8, (False,), (("tanh",),))
    with pytest.raises(UnsupportedOperatorError, match="function rnn: is a loop over its steps in one function"):
        schedule_function(recurrence(shape, None, None), TARGET, "rnn")


def test_an_order_that_matters_is_refused_by_name() -> None:
    """A running sum: each element needs the one before it, and no rule here knows how to share that out."""
    lowered = lower_graph_ops(make_graph(lambda emit, x: op.cumsum(x, 0), tensor(("n",))))
    with pytest.raises(UnsupportedOperatorError, match="function cumsum: is left to no thread"):
        schedule_module(lowered, TARGET)
