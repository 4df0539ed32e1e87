"""Batch norms become part of the convolutions in front of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from tests.graph.passes.test_channels_last import operators, same, weights
from tests.schedule.cpu.graphs import make_graph, normal, tensor
from tvm_ternary.graph.passes.conv_scale import fold_scales

op = relax.op


def vector(seed: int, *shape: int) -> Any:
    return relax.const(np.abs(normal(seed, *shape)) + np.float32(0.5))


def test_a_batch_norm_costs_an_addition() -> None:
    def build(emit: Any, x: Any) -> Any:
        y = emit(op.nn.conv2d(x, weights(1, 6, 3, 3, 3), 1, 1))
        norm = op.nn.batch_norm(y, *(vector(seed, 6) for seed in range(2, 6)), axis=1, training=False)
        y = emit(relax.TupleGetItem(emit(norm), 0))
        return op.nn.relu(emit(op.multiply(relax.const(np.float32(0.5)), y)))

    moved = same(build, [tensor(("b", 3, 5, 6))], normal(1, 2, 3, 5, 6))
    assert [name for name in operators(moved) if name in ("add", "subtract", "multiply", "divide")] == ["add"]


def test_each_group_has_its_own_scales() -> None:
    def build(emit: Any, x: Any) -> Any:
        y = emit(op.nn.conv1d(x, weights(1, 8, 1, 3), 1, 1, groups=4))
        return op.divide(emit(op.add(emit(op.multiply(y, vector(2, 8, 1))), vector(3, 1, 8, 1))), vector(4, 1))

    moved = same(build, [tensor((2, 4, 9))], normal(1, 2, 4, 9))
    assert not {"multiply", "divide"} & set(operators(moved))


def test_what_others_read_is_left() -> None:
    """A result that is read before it is scaled, scales along another axis, and a bias alone."""

    def build(emit: Any, x: Any) -> Any:
        y = emit(op.nn.conv2d(x, weights(1, 6, 3, 1, 1)))
        z = emit(op.nn.conv2d(x, weights(2, 6, 3, 1, 1)))
        z = emit(op.multiply(z, vector(3, 4)))
        w = emit(op.add(emit(op.nn.conv2d(x, weights(4, 6, 3, 1, 1))), vector(5, 6, 1, 1)))
        return op.add(
            emit(op.add(y, emit(op.multiply(y, vector(6, 6, 1, 1))))), emit(op.divide(vector(7, 1), emit(op.add(z, w))))
        )

    module = make_graph(build, tensor((1, 3, 4, 4)))
    assert fold_scales(module) is module
