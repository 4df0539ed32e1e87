"""Reductions across rows, convolutions and poolings, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax

from tests.schedule.cpu.graphs import EPSILON, Array, Build, compile_graph, normal, tensor

op = relax.op
LENGTHS = (1, 3, 4, 7, 9, 16, 17, 33, 100)


def rule_of(tier: str, build: Build, *inputs: Any) -> Any:
    compiled = compile_graph(tier, build, *inputs)
    assert compiled.rules == {"rule:columns"}
    return compiled


@pytest.mark.parametrize("columns", ["n", 6, 64, 130])
def test_sum_over_the_middle_axis(tier: str, columns: int | str) -> None:
    compiled = rule_of(tier, lambda emit, x: op.sum(x, [1]), tensor(("b", "m", columns)))
    for m in LENGTHS:
        for n in LENGTHS if columns == "n" else (columns,):
            x = normal(m, 2, m, int(n))
            bound = m * EPSILON * np.abs(x.astype(np.float64)).sum(1)
            assert np.all(np.abs(compiled(x) - x.astype(np.float64).sum(1)) <= bound)


@pytest.mark.parametrize("axes", [[0], [0, 1]])
def test_mean_over_leading_axes(tier: str, axes: list[int]) -> None:
    compiled = rule_of(tier, lambda emit, x: op.mean(x, axes), tensor(("b", "m", "n")))
    for n in LENGTHS:
        x = normal(n, 4, 5, n)
        np.testing.assert_allclose(compiled(x), x.astype(np.float64).mean(tuple(axes)), rtol=0, atol=1e-6)


def test_a_mean_over_an_image_loses_few_bits(tier: str) -> None:
    """One running sum over all pixels would lose as many bits as their number has."""
    compiled = rule_of(tier, lambda emit, x: op.mean(x, [1, 2]), tensor((1, 160, 170, 20)))
    x = normal(1, 1, 160, 170, 20) + np.float32(100)
    np.testing.assert_allclose(compiled(x), x.astype(np.float64).mean((1, 2)), rtol=3e-6)


def test_masked_mean_pooling(tier: str) -> None:
    """What a sentence model does last: a product is summed over the sequence as it is made."""

    def build(emit: Any, x: Any, mask: Any) -> Any:
        weights = emit(op.astype(emit(op.expand_dims(mask, 2)), "float32"))
        return op.sum(emit(op.multiply(x, weights)), [1])

    compiled = rule_of(tier, build, tensor(("b", "s", 40)), tensor(("b", "s"), "int64"))
    assert len(compiled.sources) == 1
    for s in LENGTHS:
        x, mask = normal(s, 2, s, 40), np.random.default_rng(s).integers(0, 2, (2, s))
        np.testing.assert_allclose(compiled(x, mask), np.einsum("bsd,bs->bd", x.astype(np.float64), mask), atol=2e-5)


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_matmul_of_other_types(tier: str, dtype: str) -> None:
    compiled = rule_of(tier, lambda emit, x, y: op.matmul(x, y), tensor(("m", "k"), dtype), tensor(("k", "n"), dtype))
    for n in LENGTHS:
        x, y = ((9 * normal(n + i, *shape)).astype(dtype) for i, shape in enumerate([(5, 12), (12, n)]))
        np.testing.assert_allclose(compiled(x, y), x @ y, rtol=1e-12, atol=1e-9)


def windows(x: Array, size: tuple[int, ...], stride: int, padding: int, fill: float = 0.0) -> Array:
    """(N, C, ..., window ...) views of a padded input, in float64."""
    spatial = x.ndim - 2
    x = np.pad(x.astype(np.float64), [(0, 0)] * 2 + [(padding, padding)] * spatial, constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, size, tuple(range(2, x.ndim)))
    result: Array = view[(slice(None), slice(None), *[slice(None, None, stride)] * spatial)]
    return result


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_conv1d(tier: str, stride: int, padding: int) -> None:
    weight = normal(1, 11, 6, 5)

    def build(emit: Any, x: Any) -> Any:
        return op.nn.relu(emit(op.nn.conv1d(x, relax.const(weight), stride, padding)))

    compiled = compile_graph(tier, build, tensor(("b", 6, 40)))
    assert "rule:columns" in compiled.rules
    assert compiled.rules <= {"rule:columns", "rule:injective"}
    x = normal(2, 2, 6, 40)
    exact = np.maximum(np.einsum("nclk,fck->nfl", windows(x, (5,), stride, padding), weight), 0)
    np.testing.assert_allclose(compiled(x), exact, rtol=0, atol=3e-5)


def test_conv1d_of_unknown_length(tier: str) -> None:
    weight = normal(1, 11, 6, 5)
    compiled = rule_of(tier, lambda emit, x: op.nn.conv1d(x, relax.const(weight), 1, 2), tensor(("b", 6, "n")))
    for n in (5, 16, 17, 40):
        x = normal(n, 2, 6, n)
        exact = np.einsum("nclk,fck->nfl", windows(x, (5,), 1, 2), weight)
        np.testing.assert_allclose(compiled(x), exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (5, 1, 0)])
def test_conv2d(tier: str, kernel: int, stride: int, padding: int) -> None:
    weight = normal(1, 9, 4, kernel, kernel)

    def build(emit: Any, x: Any) -> Any:
        return op.nn.conv2d(x, relax.const(weight), stride, padding)

    compiled = rule_of(tier, build, tensor(("b", 4, 14, 20)))
    x = normal(2, 2, 4, 14, 20)
    exact = np.einsum("nchwij,fcij->nfhw", windows(x, (kernel, kernel), stride, padding), weight)
    np.testing.assert_allclose(compiled(x), exact, rtol=0, atol=5e-5)


def test_conv2d_that_is_one_wide(tier: str) -> None:
    """A 1-D convolution as some files spell it: neighbours in memory are those of the axis before the last."""
    weight = normal(1, 9, 4, 5, 1)
    shape = tensor((1, 4, 300, 1))
    compiled = rule_of(tier, lambda emit, x: op.nn.conv2d(x, relax.const(weight)), shape)
    x = normal(2, 1, 4, 300, 1)
    exact = np.einsum("nchwij,fcij->nfhw", windows(x, (5, 1), 1, 0), weight)
    np.testing.assert_allclose(compiled(x), exact, rtol=0, atol=5e-5)


def test_depthwise_conv2d(tier: str) -> None:
    weight = normal(1, 5, 1, 3, 3)

    def build(emit: Any, x: Any) -> Any:
        return op.nn.conv2d(x, relax.const(weight), padding=1, groups=5)

    compiled = rule_of(tier, build, tensor(("b", 5, 14, 20)))
    x = normal(2, 2, 5, 14, 20)
    exact = np.einsum("nchwij,cij->nchw", windows(x, (3, 3), 1, 1), weight[:, 0])
    np.testing.assert_allclose(compiled(x), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 1)])
def test_pooling(tier: str, size: int, stride: int, padding: int) -> None:
    shape = tensor((2, 4, 14, 20))
    x = normal(1, 2, 4, 14, 20)
    largest = rule_of(tier, lambda emit, x: op.nn.max_pool2d(x, (size, size), (stride, stride), padding), shape)
    exact = windows(x, (size, size), stride, padding, -np.inf).max((-1, -2))
    np.testing.assert_array_equal(largest(x), exact)
    mean = rule_of(
        tier,
        lambda emit, x: op.nn.avg_pool2d(x, (size, size), (stride, stride), padding, count_include_pad=True),
        shape,
    )
    exact = windows(x, (size, size), stride, padding).mean((-1, -2))
    np.testing.assert_allclose(mean(x), exact, rtol=0, atol=1e-6)
