"""Large outputs that are weights become copies; others stay what they are."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from tests.graph.passes.small_graphs import make_module, operators, random
from tests.ternary_matmul import NATIVE
from tvm_ternary.build.executable import build_executable
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.own_outputs import own_outputs
from tvm_ternary.schedule.cpu import schedule_module

TABLE = random(128, 192)


def test_weights_and_their_views_are_copied() -> None:
    def build(emit, x, w):  # type: ignore[no-untyped-def]
        table = relax.const(TABLE)
        view = emit(R.reshape(emit(R.expand_dims(table, [0])), (192, 128)))
        return [emit(R.add(x, x)), x, w, table, view, emit(R.reshape(x, (3, 2))), relax.const(np.float32(3))]

    weight = random(130, 130)
    module = make_module({"x": (2, 3)}, {"w": weight}, build)
    lowered = lower_graph_ops(module)
    copied = own_outputs(lowered)
    assert len(operators(copied)) == len(operators(lowered)) + 3
    scheduled, _ = schedule_module(copied, tvm.target.Target(NATIVE.tvm))
    machine = relax.VirtualMachine(build_executable(scheduled, NATIVE.tvm), tvm.cpu())
    x, w = random(2, 3, seed=1), tvm.runtime.tensor(weight)
    first = machine["main"](tvm.runtime.tensor(x), w)
    for number, output in enumerate(first):
        if number in (2, 3, 4):
            np.from_dlpack(output)[...] = 1
    second = machine["main"](tvm.runtime.tensor(x), w)
    wanted = (2 * x, x, weight, TABLE, TABLE.reshape(192, 128), x.reshape(3, 2), np.float32(3))
    for got, want in zip(second, wanted, strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


def test_nothing_to_copy_changes_nothing() -> None:
    module = make_module({"x": ("n", 3)}, {"w": random(3, 2)}, lambda emit, x, w: [emit(R.matmul(x, w)), x])
    assert own_outputs(module) is module


def test_results_of_one_call_are_memory_of_a_run() -> None:
    def build(emit, x):  # type: ignore[no-untyped-def]
        both = emit(R.split(x, 2))
        return [emit(relax.TupleGetItem(both, 1)), emit(R.reshape(emit(relax.TupleGetItem(both, 0)), (128, 256)))]

    module = make_module({"x": (256, 256)}, {}, build)
    assert own_outputs(module) is module
