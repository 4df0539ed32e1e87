"""Element-wise chains, broadcasts, copies and gathers: exact, or within the rounding of the functions they call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special
from tvm import relax

from tests.schedule.cpu.graphs import Array, Build, compile_graph, normal, tensor

op = relax.op
# Rows shorter than a vector of any tier, exactly one, one more, and many.
LENGTHS = (1, 3, 4, 7, 8, 9, 16, 17, 31, 33, 100)


def check(tier: str, build: Build, inputs: list[Any], cases: list[tuple[Array, ...]], expected: Any) -> None:
    """Compile once, run every case, and demand equality."""
    compiled = compile_graph(tier, build, *inputs)
    assert compiled.rules == {"rule:injective"}
    for arrays in cases:
        np.testing.assert_array_equal(compiled(*arrays), expected(*arrays))


def rows(*shape: int) -> list[tuple[Array, ...]]:
    return [(normal(length, 3, length, *shape),) for length in LENGTHS]


def test_chain_is_one_function(tier: str) -> None:
    def build(emit: Any, x: Any) -> Any:
        return op.nn.relu(emit(op.subtract(emit(op.add(x, x)), relax.const(np.float32(1)))))

    compiled = compile_graph(tier, build, tensor(("b", "n")))
    assert list(compiled.sources.values()) == ["rule:injective"]
    for (x,) in rows():
        np.testing.assert_array_equal(compiled(x), np.maximum(x + x - np.float32(1), 0))


@pytest.mark.parametrize("tail", [(), (1,), (2,), (5,), (3, 2)])
def test_short_last_axes_make_rows_together(tier: str, tail: tuple[int, ...]) -> None:
    check(tier, lambda emit, x: op.negative(x), [tensor(("b", "n", *tail))], rows(*tail), np.negative)


def test_scalar(tier: str) -> None:
    check(tier, lambda emit, x: op.negative(x), [tensor(())], [(np.array(1.5, np.float32),)], np.negative)


def test_empty(tier: str) -> None:
    empty = [(np.zeros((0, 5), np.float32),), (np.zeros((5, 0), np.float32),)]
    check(tier, lambda emit, x: op.negative(x), [tensor(("b", "n"))], empty, np.negative)


def test_broadcast(tier: str) -> None:
    cases = [(normal(n, 2, 1, n), normal(n + 1, 1, 5, 1)) for n in LENGTHS]
    check(tier, lambda emit, x, y: op.add(x, y), [tensor(("b", 1, "n")), tensor((1, "m", 1))], cases, np.add)


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_transpose(tier: str, axes: tuple[int, ...]) -> None:
    def build(emit: Any, x: Any) -> Any:
        return op.permute_dims(x, axes)

    check(tier, build, [tensor(("b", "n", 4, 24))], rows(4, 24), lambda x: x.transpose(axes))


def test_reshape_between_operators(tier: str) -> None:
    def build(emit: Any, x: Any) -> Any:
        batch, length, _ = x.ty.shape
        heads = emit(op.reshape(emit(op.negative(x)), (batch, length, 4, 6)))
        return op.permute_dims(heads, (0, 2, 1, 3))

    check(tier, build, [tensor(("b", "n", 24))], rows(24), lambda x: -x.reshape(3, -1, 4, 6).transpose(0, 2, 1, 3))


@pytest.mark.parametrize(("begin", "end", "step"), [(1, 30, 1), (1, 30, 3), (0, 40, 2)])
def test_slice(tier: str, begin: int, end: int, step: int) -> None:
    def build(emit: Any, x: Any) -> Any:
        return op.strided_slice(x, [1], [begin], [end], [step])

    check(tier, build, [tensor(("b", 40))], [(normal(0, 3, 40),)], lambda x: x[:, begin:end:step])


def test_concatenate_along_rows_of_unknown_length(tier: str) -> None:
    cases = [(normal(n, 3, n), normal(n + 1, 3, m)) for n in LENGTHS for m in (1, 5, 16, 40)]
    inputs = [tensor(("b", "n")), tensor(("b", "m"))]
    check(tier, lambda emit, x, y: op.concat([x, y], 1), inputs, cases, lambda x, y: np.concatenate([x, y], 1))


def test_rotate_half(tier: str) -> None:
    def build(emit: Any, x: Any) -> Any:
        high, low = (emit(op.strided_slice(x, [2], [a], [b])) for a, b in ((12, 24), (0, 12)))
        return op.concat([emit(op.negative(high)), low], 2)

    def expected(x: Array) -> Array:
        return np.concatenate([-x[..., 12:], x[..., :12]], -1)

    check(tier, build, [tensor(("b", "n", 24))], rows(24), expected)


def test_concatenate_many(tier: str) -> None:
    cases = [tuple(normal(n + i, 3, n + i) for i in range(6)) for n in LENGTHS]
    inputs = [tensor(("b", f"n{i}")) for i in range(6)]
    check(tier, lambda emit, *x: op.concat(list(x), 1), inputs, cases, lambda *x: np.concatenate(x, 1))


def test_pad(tier: str) -> None:
    def build(emit: Any, x: Any) -> Any:
        return op.nn.pad(x, [0, 0, 3, 5])

    check(tier, build, [tensor(("b", "n"))], rows(), lambda x: np.pad(x, ((0, 0), (3, 5))))


def test_take_copies_rows(tier: str) -> None:
    def build(emit: Any, x: Any, i: Any) -> Any:
        return op.take(x, i, axis=0, mode="clip")

    generator = np.random.default_rng(0)
    cases = [(normal(n, 50, n), generator.integers(0, 50, (2, n))) for n in LENGTHS]
    check(tier, build, [tensor((50, "n")), tensor(("b", "m"), "int64")], cases, lambda x, i: x[i])


def test_where(tier: str) -> None:
    cases = [(normal(n, 3, n) > 0, normal(n + 1, 3, n), normal(n + 2, 3, n)) for n in LENGTHS]
    inputs = [tensor(("b", "n"), "bool"), tensor(("b", "n")), tensor(("b", "n"))]
    check(tier, lambda emit, c, x, y: op.where(c, x, y), inputs, cases, np.where)


def test_casts(tier: str) -> None:
    cases = [(np.random.default_rng(n).integers(-9, 9, (3, n)),) for n in LENGTHS]
    inputs = [tensor(("b", "n"), "int64")]
    check(tier, lambda emit, x: op.astype(x, "float32"), inputs, cases, lambda x: x.astype(np.float32))


def test_comparisons(tier: str) -> None:
    """Booleans are bytes, but a vector of them would be four of what is compared."""
    cases = [(normal(n, 3, n), normal(n + 1, 3, n)) for n in LENGTHS]
    check(tier, lambda emit, x, y: op.less(x, y), [tensor(("b", "n")), tensor(("b", "n"))], cases, np.less)


def test_two_outputs(tier: str) -> None:
    compiled = compile_graph(tier, lambda emit, x: op.split(x, 2, 1), tensor(("b", 20)))
    x = normal(0, 3, 20)
    for result, expected in zip(compiled(x), np.split(x, 2, 1), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_a_value_that_is_read_in_two_places_goes_through_a_buffer(tier: str) -> None:
    """exp(x) + exp(x)^T is one function of two passes."""

    def build(emit: Any, x: Any) -> Any:
        e = emit(op.exp(x))
        return op.add(e, emit(op.permute_dims(e, (1, 0))))

    compiled = compile_graph(tier, build, tensor(("n", "n")))
    assert list(compiled.sources.values()) == ["rule:injective"]
    for n in LENGTHS:
        x = normal(n, n, n)
        e = np.exp(x.astype(np.float64))
        np.testing.assert_allclose(compiled(x), e + e.T, rtol=4e-7)


@pytest.mark.parametrize(
    ("name", "expected", "bound"),
    [
        ("gelu", lambda x: x * special.ndtr(x), 5e-7),
        # tanh(y) is off by up to 4e-7, and is multiplied by x / 2.
        ("gelu_tanh", lambda x: x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)), 3e-7),
        ("silu", lambda x: x * special.expit(x), 5e-7),
    ],
)
def test_activations(tier: str, name: str, expected: Any, bound: float) -> None:
    """Absolute error at most `bound` times the magnitude of the argument."""
    compiled = compile_graph(tier, lambda emit, x: getattr(op.nn, name)(x), tensor(("b", "n")))
    assert compiled.rules == {"rule:injective"}
    for (x,) in rows():
        x = 4 * x
        error = np.abs(compiled(x) - expected(x.astype(np.float64)))
        assert np.all(error <= bound * np.maximum(np.abs(x), 1e-30))
