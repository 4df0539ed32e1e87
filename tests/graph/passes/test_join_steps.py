"""Products of the steps of an unrolled loop become one product, where they are products of one sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from tests.graph.passes.test_channels_last import operators
from tests.schedule.cpu.graphs import compile_module, make_graph, normal, tensor
from tvm_ternary.graph.passes.join_steps import join_steps

op = relax.op
STEPS, WIDTH = 4, 6


def loop(emit: Any, x: Any, w: Any, r: Any) -> Any:
    """A recurrent net: every step multiplies its input by w and the state before by r."""
    state = emit(op.zeros((2, WIDTH), "float32"))
    for t in range(STEPS):
        step = emit(op.squeeze(emit(op.strided_slice(x, [0], [t], [t + 1])), [0]))
        state = emit(op.tanh(emit(op.add(emit(op.matmul(step, w)), emit(op.matmul(state, r))))))
    return op.negative(state)


def imported(steps: int) -> tvm.IRModule:
    module = make_graph(loop, tensor((steps, 2, 5)), tensor((5, WIDTH)), tensor((WIDTH, WIDTH)))
    module["main"] = module["main"].with_attr("num_input", 1)
    return module


def test_inputs_of_all_steps_are_multiplied_at_once() -> None:
    module = imported(STEPS)
    joined = join_steps(module)
    assert operators(module).count("matmul") == 2 * STEPS
    assert operators(joined).count("matmul") == 1 + STEPS
    arrays = [normal(seed, *shape) for seed, shape in enumerate([(STEPS, 2, 5), (5, WIDTH), (WIDTH, WIDTH)])]
    before, after = (compile_module(m, "portable")(*arrays) for m in (module, joined))
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)


def test_a_few_steps_of_a_long_sequence_stay_apart() -> None:
    module = imported(2 * STEPS + 1)
    assert join_steps(module) is module
