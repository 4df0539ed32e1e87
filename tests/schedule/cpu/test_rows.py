"""Reductions along rows and the normalisations built of them, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special
from tvm import relax

from tests.schedule.cpu.graphs import EPSILON, Array, Build, compile_graph, normal, tensor

op = relax.op
LENGTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1000)


def rule_of(tier: str, build: Build, *inputs: Any) -> Any:
    compiled = compile_graph(tier, build, *inputs)
    assert compiled.rules == {"rule:rows"}
    return compiled


def sum_bound(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Higham, Accuracy and Stability of Numerical Algorithms, section 4.2: n roundoffs of the sum of magnitudes."""
    axes = (axis,) if isinstance(axis, int) else axis
    terms = np.prod([x.shape[a] for a in axes])
    bound: Array = terms * EPSILON * np.abs(x.astype(np.float64)).sum(axis)
    return bound


@pytest.mark.parametrize("keepdims", [False, True])
def test_sum(tier: str, keepdims: bool) -> None:
    compiled = rule_of(tier, lambda emit, x: op.sum(x, [-1], keepdims), tensor(("b", "n")))
    for n in LENGTHS:
        x = normal(n, 5, n)
        error = np.abs(compiled(x) - x.astype(np.float64).sum(-1, keepdims=keepdims))
        assert np.all(error.reshape(-1) <= sum_bound(x))


@pytest.mark.parametrize("axes", [None, [1, 2], [0, 2]])
def test_sum_over_several_axes(tier: str, axes: list[int] | None) -> None:
    compiled = rule_of(tier, lambda emit, x: op.sum(x, axes), tensor(("b", "m", "n")))
    over = tuple(axes) if axes else (0, 1, 2)
    for n in LENGTHS[:-1]:
        x = normal(n, 3, 5, n)
        assert np.all(np.abs(compiled(x) - x.astype(np.float64).sum(over)) <= sum_bound(x, over))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_extremes_are_exact(tier: str, name: str, dtype: str) -> None:
    compiled = rule_of(tier, lambda emit, x: getattr(op, name)(x, [-1]), tensor(("b", "n"), dtype))
    for n in LENGTHS:
        x = (100 * normal(n, 5, n)).astype(dtype)
        np.testing.assert_array_equal(compiled(x), getattr(np, name)(x, -1))


def test_integer_sum_is_exact(tier: str) -> None:
    compiled = rule_of(tier, lambda emit, x: op.sum(x, [-1]), tensor(("b", "n"), "int64"))
    for n in LENGTHS:
        x = np.random.default_rng(n).integers(-(2**40), 2**40, (5, n))
        np.testing.assert_array_equal(compiled(x), x.sum(-1))


def test_product(tier: str) -> None:
    compiled = rule_of(tier, lambda emit, x: op.prod(x, [-1]), tensor(("b", "n")))
    for n in LENGTHS[:-1]:
        x = 1 + normal(n, 5, n) / 8
        np.testing.assert_allclose(compiled(x), x.astype(np.float64).prod(-1), rtol=n * EPSILON)


def test_mean_and_variance(tier: str) -> None:
    mean = rule_of(tier, lambda emit, x: op.mean(x, [-1]), tensor(("b", "n")))
    variance = rule_of(tier, lambda emit, x: op.variance(x, [-1]), tensor(("b", "n")))
    for n in LENGTHS:
        x = normal(n, 5, n)
        exact = x.astype(np.float64)
        assert np.all(np.abs(mean(x) - exact.mean(-1)) <= sum_bound(x) / n + EPSILON)
        np.testing.assert_allclose(variance(x), exact.var(-1), rtol=(n + 8) * EPSILON, atol=1e-12)


def test_sum_of_what_is_computed_on_the_way(tier: str) -> None:
    def build(emit: Any, x: Any, y: Any) -> Any:
        return op.sum(emit(op.multiply(x, emit(op.negative(y)))), [-1])

    compiled = rule_of(tier, build, tensor(("b", "n")), tensor(("b", "n")))
    assert len(compiled.sources) == 1
    for n in LENGTHS:
        x, y = normal(n, 5, n), normal(n + 1, 5, n)
        exact = -x.astype(np.float64) * y
        assert np.all(np.abs(compiled(x, y) - exact.sum(-1)) <= sum_bound(exact) + EPSILON)


@pytest.mark.parametrize("scale", [1, 50])
def test_softmax(tier: str, scale: int) -> None:
    compiled = rule_of(tier, lambda emit, x: op.nn.softmax(x, -1), tensor(("b", "n")))
    for n in LENGTHS:
        x = scale * normal(n, 5, n)
        exact = special.softmax(x.astype(np.float64), -1)
        # The distance to the maximum is rounded, its exponential within 2e-7; a sum of n positive terms; a division.
        relative = EPSILON * (x.max(-1, keepdims=True) - x + n) + 6e-7
        assert np.all(np.abs(compiled(x) - exact) <= relative * exact + 1e-37)


def test_softmax_of_a_masked_row(tier: str) -> None:
    compiled = rule_of(tier, lambda emit, x: op.nn.softmax(x, -1), tensor(("b", "n")))
    for n in LENGTHS:
        x = normal(n, 5, n)
        x[1, n // 2 + 1 :] = -np.inf
        x[2, n // 2 + 1 :] = np.finfo(np.float32).min
        x[3] = np.finfo(np.float32).min
        np.testing.assert_allclose(compiled(x), special.softmax(x.astype(np.float64), -1), rtol=6e-7 + n * EPSILON)


def test_softmax_of_no_rows(tier: str) -> None:
    compiled = rule_of(tier, lambda emit, x: op.nn.softmax(x, -1), tensor(("b", "n")))
    assert compiled(np.zeros((0, 5), np.float32)).shape == (0, 5)
    assert compiled(np.zeros((5, 0), np.float32)).shape == (5, 0)


def test_static_softmax(tier: str) -> None:
    for n in (1, 6, 16, 37):
        compiled = rule_of(tier, lambda emit, x: op.nn.softmax(x, -1), tensor((2, 3, n)))
        x = normal(n, 2, 3, n)
        np.testing.assert_allclose(compiled(x), special.softmax(x.astype(np.float64), -1), rtol=6e-7 + n * EPSILON)


def test_log_softmax(tier: str) -> None:
    compiled = rule_of(tier, lambda emit, x: op.nn.log_softmax(x, -1), tensor(("b", "n")))
    for n in LENGTHS:
        x = 4 * normal(n, 5, n)
        np.testing.assert_allclose(compiled(x), special.log_softmax(x.astype(np.float64), -1), rtol=1e-6, atol=2e-6)


def layer_norm(x: Array, gamma: Array, beta: Array, axes: tuple[int, ...]) -> Array:
    x = x.astype(np.float64)
    centred = x - x.mean(axes, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5) * gamma + beta
    return result


@pytest.mark.parametrize("shape", [(7,), (16,), (40,), (384,), (5, 9)])
def test_layer_norm(tier: str, shape: tuple[int, ...]) -> None:
    gamma, beta = normal(1, *shape), normal(2, *shape)
    axes = list(range(-len(shape), 0))

    def build(emit: Any, x: Any) -> Any:
        return op.nn.layer_norm(x, relax.const(gamma), relax.const(beta), axes, epsilon=1e-5)

    compiled = rule_of(tier, build, tensor(("b", "n", *shape)))
    for n in (1, 3, 20):
        x = 3 + normal(n, 2, n, *shape)
        # Mean and variance are off by n roundoffs of values near 3, which the deviation of 1 divides.
        np.testing.assert_allclose(compiled(x), layer_norm(x, gamma, beta, tuple(axes)), rtol=0, atol=2e-5)


def test_layer_norm_of_unknown_width(tier: str) -> None:
    def build(emit: Any, x: Any, gamma: Any, beta: Any) -> Any:
        return op.nn.layer_norm(x, gamma, beta, [-1], epsilon=1e-5)

    compiled = rule_of(tier, build, tensor(("b", "n")), tensor(("n",)), tensor(("n",)))
    for n in LENGTHS[1:]:
        x, gamma, beta = normal(n, 5, n), normal(n + 1, n), normal(n + 2, n)
        np.testing.assert_allclose(compiled(x, gamma, beta), layer_norm(x, gamma, beta, (-1,)), rtol=0, atol=2e-5)


def test_rms_norm(tier: str) -> None:
    gamma = normal(1, 40)

    def build(emit: Any, x: Any) -> Any:
        return op.nn.rms_norm(x, relax.const(gamma), [-1], epsilon=1e-5)

    compiled = rule_of(tier, build, tensor(("b", "n", 40)))
    for n in (1, 3, 20):
        x = normal(n, 2, n, 40)
        exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * gamma
        np.testing.assert_allclose(compiled(x), exact, rtol=2e-6)


def test_matrix_times_vector(tier: str) -> None:
    compiled = rule_of(tier, lambda emit, x, y: op.matmul(x, y), tensor(("m", "k")), tensor(("k",)))
    for k in LENGTHS:
        x, y = normal(k, 7, k), normal(k + 1, k)
        terms = x.astype(np.float64) * y
        assert np.all(np.abs(compiled(x, y) - terms.sum(-1)) <= sum_bound(terms) + EPSILON)
