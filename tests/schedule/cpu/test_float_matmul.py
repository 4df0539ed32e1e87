"""Float matrix products of every raggedness, with what follows them, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from tvm import relax

from tests.schedule.cpu.graphs import EPSILON, TIERS, Array, Build, compile_graph, normal, runs_here, tensor

op = relax.op
# (M, K, N): below, at and beyond the tiles (12, 6, 4, 3 and 1 rows; 8, 16 and 32 columns), blocks of 192 rows, no work,
# and enough work for all threads.
SHAPES = (
    (1, 1, 1),
    (1, 40, 100),
    (2, 12, 16),
    (3, 13, 33),
    (4, 11, 31),
    (5, 3, 17),
    (6, 5, 8),
    (11, 7, 32),
    (12, 64, 32),
    (13, 7, 64),
    (25, 32, 100),
    (40, 20, 5),
    (0, 4, 5),
    (3, 0, 40),
    (3, 4, 0),
    (200, 9, 40),
    (400, 96, 130),
)


def rule_of(tier: str, build: Build, *inputs: Any) -> Any:
    compiled = compile_graph(tier, build, *inputs)
    assert compiled.rules == {"rule:matmul"}
    assert len(compiled.sources) == 1
    return compiled


def assert_product(result: Array, x: Array, y: Array) -> None:
    """Within K + 1 roundoffs of the sum of magnitudes (Higham, section 3.5), whatever the order of the sum."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    bound = (x.shape[-1] + 1) * EPSILON / 2 * (np.abs(x) @ np.abs(y))
    assert result.shape == (x @ y).shape
    assert np.all(np.abs(result - x @ y) <= bound)


@cache
def any_product(tier: str) -> Any:
    """All dimensions unknown."""
    return rule_of(tier, lambda emit, x, y: op.matmul(x, y), tensor(("m", "k")), tensor(("k", "n")))


def test_all_dimensions_unknown(tier: str) -> None:
    compiled = any_product(tier)
    for m, k, n in SHAPES:
        x, y = normal(m, m, k), normal(n, k, n)
        assert_product(compiled(x, y), x, y)


def on_tiers(name: str, values: Sequence[int]) -> pytest.MarkDecorator:
    """All values on one tier, and every other one on the others, which cut the same tiles to another width."""
    of_tier = {"avx512": values[::2], "avx2": values, "portable": values[1::2]}
    pairs = [(tier, value) for tier, some in of_tier.items() for value in some]
    return pytest.mark.parametrize(("tier", name), pairs, indirect=["tier"])


@on_tiers("rows", [1, 2, 5, 12, 13, 200])
def test_known_rows(tier: str, rows: int) -> None:
    compiled = rule_of(tier, lambda emit, x, y: op.matmul(x, y), tensor((rows, 24)), tensor((24, 70)))
    x, y = normal(1, rows, 24), normal(2, 24, 70)
    assert_product(compiled(x, y), x, y)


@on_tiers("columns", [2, 7, 8, 16, 24, 33, 384])
def test_layer_of_known_width(tier: str, columns: int) -> None:
    """(batch, length, K) by a constant (K, N): rows are batch and length together."""
    weight = normal(1, 24, columns)
    compiled = rule_of(tier, lambda emit, x: op.matmul(x, relax.const(weight)), tensor(("b", "s", 24)))
    for b, s in ((1, 1), (1, 7), (3, 5), (2, 12), (5, 43)):
        x = normal(b * s, b, s, 24)
        assert_product(compiled(x), x, weight)


def test_batches(tier: str) -> None:
    inputs = tensor(("b", 3, "m", "k")), tensor(("b", 3, "k", "n"))
    compiled = rule_of(tier, lambda emit, x, y: op.matmul(x, y), *inputs)
    for m, k, n in SHAPES:
        x, y = normal(m, 2, 3, m, k), normal(n, 2, 3, k, n)
        assert_product(compiled(x, y), x, y)


def test_batches_that_are_broadcast() -> None:
    """On one tier: only where a batch's operands start is another."""
    inputs = tensor(("b", 1, "m", "k")), tensor((1, 3, "k", "n"))
    compiled = rule_of("avx2", lambda emit, x, y: op.matmul(x, y), *inputs)
    for m, k, n in SHAPES:
        x, y = normal(m, 2, 1, m, k), normal(n, 1, 3, k, n)
        assert_product(compiled(x, y), x, y)


def test_vector_times_matrix(tier: str) -> None:
    compiled = rule_of(tier, lambda emit, x, y: op.matmul(x, y), tensor(("k",)), tensor(("k", "n")))
    for _, k, n in SHAPES:
        x, y = normal(k, k), normal(n, k, n)
        assert_product(compiled(x, y), x, y)


def test_second_factor_stored_transposed(tier: str) -> None:
    """Fused with the transpose, columns are apart in memory: the panel is gathered."""

    def build(emit: Any, x: Any, y: Any) -> Any:
        return op.einsum(relax.Tuple([x, y]), "mk,nk->mn")

    compiled = rule_of(tier, build, tensor(("m", "k")), tensor(("n", "k")))
    for m, k, n in SHAPES:
        x, y = normal(m, m, k), normal(n, n, k)
        assert_product(compiled(x, y), x, y.T)


def test_scores_of_attention(tier: str) -> None:
    """Scale and mask are done on the sums while they are in registers."""
    scale = np.float32(32**0.5)

    def build(emit: Any, q: Any, k: Any, mask: Any) -> Any:
        return op.add(emit(op.divide(emit(op.matmul(q, k)), relax.const(scale))), mask)

    inputs = tensor(("b", 4, "s", 32)), tensor(("b", 4, 32, "t")), tensor(("b", 1, 1, "t"))
    compiled = rule_of(tier, build, *inputs)
    for s, t in ((1, 1), (1, 40), (7, 7), (20, 20), (64, 64), (13, 33)):
        q, k, mask = normal(s, 2, 4, s, 32), normal(t, 2, 4, 32, t), normal(t + 1, 2, 1, 1, t)
        exact = q.astype(np.float64) @ k / scale + mask
        np.testing.assert_allclose(compiled(q, k, mask), exact, rtol=0, atol=1e-5)


def test_bias_and_activation(tier: str) -> None:
    """The sum is read twice by the activation, and still the whole layer is one function."""
    weight, bias = normal(1, 24, 70) / 5, normal(2, 70)

    def build(emit: Any, x: Any) -> Any:
        h = emit(op.add(emit(op.matmul(x, relax.const(weight))), relax.const(bias)))
        half = emit(op.multiply(h, relax.const(np.float32(0.5))))
        gate = emit(
            op.add(emit(op.erf(emit(op.divide(h, relax.const(np.float32(2**0.5)))))), relax.const(np.float32(1)))
        )
        return op.multiply(half, gate)

    compiled = rule_of(tier, build, tensor(("b", "s", 24)))
    for b, s in ((1, 1), (1, 7), (3, 5), (5, 43)):
        x = normal(s, b, s, 24)
        h = x.astype(np.float64) @ weight + bias
        np.testing.assert_allclose(compiled(x), h * special.ndtr(h), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tier", [name for name in TIERS if runs_here(name)])
def test_any_shape(tier: str) -> None:
    compiled = any_product(tier)
    size = st.integers(0, 90)

    @settings(max_examples=60)
    @given(size, size, size)
    def holds(m: int, k: int, n: int) -> None:
        x, y = normal(m, m, k), normal(n, k, n)
        assert_product(compiled(x, y), x, y)

    holds()
