"""Channels last from one convolution to the next: the same values, and transposed copies only at the ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from tests.schedule.cpu.graphs import Array, Build, compile_module, make_graph, normal, tensor
from tvm_ternary.graph.passes.channels_last import channels_last

op = relax.op
TIER = "portable"


def operators(module: tvm.IRModule) -> list[str]:
    """Names of the operators of ``main``."""
    names: list[str] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            names.append(expr.op.name.removeprefix("relax."))

    relax.analysis.post_order_visit(module["main"], visit)
    return names


def same(build: Build, inputs: list[Any], *arrays: Array) -> tvm.IRModule:
    """Check that the pass changes no value; give what it made."""
    module = make_graph(build, *inputs)
    moved = channels_last(module)
    before, after = compile_module(module, TIER), compile_module(moved, TIER)
    for got, expected in zip(before(*arrays), after(*arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))
    return moved


def weights(seed: int, *shape: int) -> Any:
    return relax.const(normal(seed, *shape) / np.float32(np.sqrt(np.prod(shape[1:]))))


def test_a_chain_is_transposed_at_its_ends_only() -> None:
    """Everything that lies between convolutions goes along: arithmetic, pooling, concatenation, squeeze and excite."""

    def build(emit: Any, x: Any, y: Any) -> Any:
        a = emit(op.nn.conv2d(x, weights(1, 8, 3, 3, 3), (2, 1), (1, 1, 1, 1)))
        a = emit(op.nn.relu(emit(op.add(a, relax.const(normal(2, 8, 1, 1))))))
        mean = emit(op.mean(a, [2, 3], keepdims=True))
        gate = emit(op.sigmoid(emit(op.nn.conv2d(mean, weights(3, 8, 8, 1, 1)))))
        a = emit(op.multiply(a, gate))
        b = emit(op.nn.conv2d(a, weights(4, 8, 1, 3, 3), 1, (1, 1), groups=8))
        c = emit(op.concat([a, b, emit(op.nn.max_pool2d(a, (3, 3), (1, 1), (1, 1)))], 1))
        c = emit(op.strided_slice(c, [1], [3], [21]))
        c = emit(op.nn.avg_pool2d(c, (2, 2), (2, 2)))
        c = emit(op.add(emit(op.nn.conv2d(c, weights(5, 6, 18, 1, 1))), y))
        return op.nn.conv2d(emit(op.multiply(relax.const(np.float32(0.5)), c)), weights(6, 5, 6, 1, 1))

    shapes = [tensor(("b", 3, 16, 10)), tensor((1, 6, 4, 5))]
    moved = same(build, shapes, normal(7, 2, 3, 16, 10), normal(8, 1, 6, 4, 5))
    # The image, the operand that comes from outside, the result.
    assert operators(moved).count("permute_dims") == 3


def test_rows_of_a_recogniser() -> None:
    """A feature map becomes a sequence: its transposition undoes ours."""

    def build(emit: Any, x: Any) -> Any:
        a = emit(op.nn.conv2d(x, weights(1, 8, 1, 3, 3), 1, (1, 1)))
        a = emit(op.mean(a, [2], keepdims=True))
        rows = emit(op.permute_dims(emit(op.squeeze(a, [2])), [0, 2, 1]))
        return op.matmul(rows, weights(2, 8, 5))

    moved = same(build, [tensor((2, 1, 6, "w"))], normal(3, 2, 1, 6, 9))
    assert "permute_dims" not in operators(moved)


def test_one_dimension() -> None:
    def build(emit: Any, x: Any) -> Any:
        a = emit(op.nn.relu(emit(op.nn.conv1d(x, weights(1, 8, 4, 3), 2, 1, groups=1))))
        b = emit(op.nn.conv1d(a, weights(2, 8, 2, 3), 1, 2, dilation=2, groups=4))
        return op.expand_dims(emit(op.max(emit(op.add(a, b)), [2])), [1])

    same(build, [tensor((2, 4, "n"))], normal(3, 2, 4, 11))


def test_a_single_channel() -> None:
    def build(emit: Any, x: Any) -> Any:
        one = emit(op.nn.conv2d(x, weights(1, 1, 3, 3, 3), 1, 1))
        return op.sigmoid(emit(op.nn.conv2d(one, weights(2, 1, 1, 1, 1))))

    same(build, [tensor(("b", 3, 4, 5))], normal(2, 2, 3, 4, 5))


def test_resize() -> None:
    def build(emit: Any, x: Any) -> Any:
        a = emit(op.nn.conv2d(x, weights(1, 4, 3, 1, 1)))
        return op.image.resize2d(
            a, (8, 10), method="nearest_neighbor", coordinate_transformation_mode="asymmetric", rounding_method="floor"
        )

    same(build, [tensor((1, 3, 4, 5))], normal(2, 1, 3, 4, 5))


# Kernel, stride, padding, output padding.
TRANSPOSED = (
    ((3, 3), 2, 1, 1),
    ((4, 5), (2, 3), (1, 0, 2, 1), 0),
    ((1, 1), 2, 0, 1),
)


def test_transposed_convolutions() -> None:
    def build(emit: Any, x: Any) -> Any:
        return relax.Tuple(
            [
                emit(op.nn.conv2d_transpose(x, weights(1, 3, 4, *kernel), stride, padding, (extra, extra)))
                for kernel, stride, padding, extra in TRANSPOSED
            ]
        )

    moved = same(build, [tensor((2, 3, 5, "w"))], normal(2, 2, 3, 5, 6))
    assert "nn.conv2d_transpose" not in operators(moved)


def test_other_models_are_left_alone() -> None:
    module = make_graph(lambda emit, x: op.permute_dims(emit(op.nn.relu(x)), [0, 2, 1]), tensor((2, 3, 4)))
    assert channels_last(module) is module
