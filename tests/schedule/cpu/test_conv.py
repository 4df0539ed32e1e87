"""Convolutions with their channels last, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tvm import relax

from tests.schedule.cpu.graphs import TIERS, Array, compile_graph, normal, tensor

op = relax.op


@dataclass(frozen=True)
class Case:
    """One convolution: channels, taps and how the taps are laid over the image."""

    inputs: int
    outputs: int
    taps: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def weight(self) -> Array:
        return normal(self.outputs, *self.taps, self.inputs // self.groups, self.outputs)

    def build(self, x: Any) -> Any:
        return op.nn.conv2d(
            x,
            relax.const(self.weight),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            data_layout="NHWC",
            kernel_layout="HWIO",
        )

    def exact(self, x: Array) -> tuple[Array, Array]:
        """The result in float64, and the sum of magnitudes that bounds its error in float32."""
        top, left, bottom, right = self.padding
        padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
        reach = tuple((t - 1) * d + 1 for t, d in zip(self.taps, self.dilation, strict=True))
        view = np.lib.stride_tricks.sliding_window_view(padded, reach, (1, 2))
        view = view[:, :: self.stride[0], :: self.stride[1], :, :: self.dilation[0], :: self.dilation[1]]
        groups = np.stack(np.split(view, self.groups, 3))
        weight = np.stack(np.split(self.weight.astype(np.float64), self.groups, 3))

        def multiply(a: Array, b: Array) -> Array:
            return np.concatenate(np.einsum("gnhwcij,gijco->gnhwo", a, b), 3)

        return multiply(groups, weight), multiply(np.abs(groups), np.abs(weight))


CASES = {
    "one tap": Case(6, 40, (1, 1)),
    "one tap, strided": Case(6, 24, (1, 1), stride=(2, 2)),
    "one channel in": Case(1, 17, (3, 3), stride=(2, 1), padding=(1, 1, 1, 1)),
    "few channels": Case(6, 12, (3, 3), padding=(0, 0, 1, 1)),
    "no padding": Case(6, 70, (2, 3)),
    "dilated": Case(6, 33, (3, 2), padding=(2, 1, 2, 1), dilation=(2, 3)),
    "grouped": Case(6, 48, (3, 3), padding=(1, 1, 1, 1), groups=3),
    "depthwise": Case(6, 6, (3, 3), padding=(1, 1, 1, 1), groups=6),
    "depthwise, strided": Case(6, 6, (5, 5), stride=(2, 2), padding=(2, 2, 2, 2), groups=6),
    "depthwise, two a channel": Case(6, 12, (3, 3), stride=(1, 2), padding=(1, 1, 1, 1), groups=6),
}


# Those that are compiled for sizes known only at run time.
DYNAMIC = ("one tap", "one channel in", "dilated", "depthwise, strided")
# Those with more taps than a line has with its padding.
HIGH = ("no padding", "few channels")
# The sizes of the image, and what they are in the runs.
SHAPES: dict[str, tuple[tuple[int | str, ...], list[tuple[int, ...]]]] = {
    "image": ((2, 7, 31), [(2, 7, 31)]),
    "line": ((1, 1, 131), [(1, 1, 131)]),
    "any image": (("b", "h", "w"), [(1, 4, 3), (2, 9, 14), (1, 5, 40)]),
    "any line": ((1, 1, "w"), [(1, 1, 2), (1, 1, 57), (1, 1, 260)]),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_convolutions(tier: str, kind: str) -> None:
    shape, sizes = SHAPES[kind]
    names = [name for name in CASES if ("any" not in kind or name in DYNAMIC)]
    names = [name for name in names if "line" not in kind or name not in HIGH]
    # Half of them: between images and lines, each tier has all.
    half = (list(TIERS).index(tier) + ("line" in kind)) % 2
    cases = [CASES[name] for n, name in enumerate(CASES) if name in names and (n % 2 == half or name in HIGH)]
    plain = [case for case in cases if case.inputs > 1]
    compiled = compile_graph(
        tier,
        lambda emit, x, y: relax.Tuple([emit(case.build(x if case in plain else y)) for case in cases]),
        tensor((*shape, 6)),
        tensor((*shape, 1)),
    )
    assert compiled.rules == {"rule:convolution"}
    for size in sizes:
        x, y = normal(1, *size, 6), normal(2, *size, 1)
        for case, got in zip(cases, compiled(x, y), strict=True):
            exact, bound = case.exact(x if case in plain else y)
            assert np.all(np.abs(got - exact) <= 1e-5 * np.abs(exact) + 1e-6 * bound), case


def test_results_go_through_what_follows(tier: str) -> None:
    """A bias, an activation function and a residual are part of the convolution's store; a gate is not."""
    first, second = normal(1, 3, 3, 8, 24), normal(2, 1, 1, 24, 24)
    bias = normal(3, 24)

    def conv(emit: Any, x: Any, weight: Array, padding: int) -> Any:
        return emit(op.nn.conv2d(x, relax.const(weight), 1, padding, data_layout="NHWC", kernel_layout="HWIO"))

    def build(emit: Any, x: Any, residual: Any) -> Any:
        sums = emit(op.add(conv(emit, x, first, 1), relax.const(bias)))
        image = emit(op.add(emit(op.nn.relu(sums)), residual))
        gate = conv(emit, emit(op.mean(image, [1, 2], keepdims=True)), second, 0)
        return op.multiply(emit(op.sigmoid(gate)), image)

    compiled = compile_graph(tier, build, tensor((1, 9, 10, 8)), tensor((1, 9, 10, 24)))
    assert sorted(compiled.rules) == ["rule:columns", "rule:convolution"]
    assert len(compiled.sources) == 3
    x, residual = normal(4, 1, 9, 10, 8), normal(5, 1, 9, 10, 24)
    image = np.maximum(exact_of(x, first) + bias, 0) + residual
    gate = image.mean((1, 2), keepdims=True) @ second[0, 0].astype(np.float64)
    np.testing.assert_allclose(compiled(x, residual), image / (1 + np.exp(-gate)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("channels", [24, 40])
def test_a_gate_of_ragged_channels_behind_a_bias(tier: str, channels: int) -> None:
    """No element of the gate is computed twice, not even where TVM lets it lie in the memory of the sums."""
    weight, bias = normal(2, 1, 1, channels, channels), normal(3, channels)

    def build(emit: Any, x: Any, image: Any) -> Any:
        sums = emit(op.nn.conv2d(x, relax.const(weight), 1, 0, data_layout="NHWC", kernel_layout="HWIO"))
        gate = emit(op.clip(emit(op.add(sums, relax.const(bias))), 0.0, 1.0))
        return emit(op.add(image, emit(op.multiply(image, gate))))

    compiled = compile_graph(tier, build, tensor(("batch", 1, 1, channels)), tensor(("batch", 3, 5, channels)))
    x, image = normal(4, 2, 1, 1, channels), normal(5, 2, 3, 5, channels)
    gate = np.clip(x.astype(np.float64) @ weight[0, 0] + bias, 0, 1)
    np.testing.assert_allclose(compiled(x, image), image + image * gate, rtol=1e-5, atol=2e-5)


def exact_of(x: Array, weight: Array) -> Array:
    view = np.lib.stride_tricks.sliding_window_view(
        np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2)
    )
    result: Array = np.einsum("nhwcij,ijco->nhwo", view, weight)
    return result
