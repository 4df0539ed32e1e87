"""Measures of accuracy against their closed forms and plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tvm_ternary.analysis import accuracy
from tvm_ternary.errors import InputError

RANDOM = np.random.default_rng(0)
# Few values, so that there are ties.
VALUES = arrays.arrays(np.float64, st.integers(2, 12), elements=st.integers(-3, 3).map(float))


def test_closeness_by_hand() -> None:
    close = accuracy.closeness(np.array([3.0, 4.0]), np.array([3.0, 3.5]))
    assert close.relative_error == pytest.approx(0.1)
    assert close.sqnr_db == pytest.approx(20)
    assert close.cosine == pytest.approx((9 + 14) / (5 * math.hypot(3, 3.5)))
    assert (close.max_error, close.mean_error) == (0.5, 0.25)


def test_float32_is_summed_in_float64() -> None:
    reference = np.full(1 << 20, 1e4, np.float32)
    assert accuracy.relative_error(reference, reference + np.float32(1)) == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_equal_arrays(value: float) -> None:
    same = np.full((2, 3), value)
    assert accuracy.closeness(same, same) == accuracy.Closeness(math.inf, 1.0, 0.0, 0.0, 0.0)


def test_a_zero_reference_and_a_nan_are_seen() -> None:
    zero, one = np.zeros(2), np.ones(2)
    close = accuracy.closeness(zero, one)
    assert (close.sqnr_db, close.cosine, close.relative_error) == (-math.inf, 0.0, math.inf)
    close = accuracy.closeness(one, np.array([1.0, np.nan]))
    assert all(math.isnan(value) for value in (close.sqnr_db, close.cosine, close.relative_error, close.max_error))


def test_row_cosines() -> None:
    reference = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    array = np.array([[-2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(accuracy.row_cosines(reference, array), [-1, math.sqrt(0.5), 1])


def _softmax(row: Any) -> list[float]:
    exponents = [math.exp(value) for value in row]
    return [value / sum(exponents) for value in exponents]


def test_kl_divergence_against_its_definition() -> None:
    reference, logits = RANDOM.normal(size=(2, 4, 5)).astype(np.float32)
    rows = [
        sum(p * math.log(p / q) for p, q in zip(_softmax(a), _softmax(b), strict=True))
        for a, b in zip(reference, logits, strict=True)
    ]
    assert accuracy.kl_divergence(reference, logits) == pytest.approx(np.mean(rows))
    # Logits are right up to a constant.
    assert accuracy.kl_divergence(reference, reference + 7) == pytest.approx(0, abs=1e-12)


def test_kl_divergence_of_large_and_masked_logits() -> None:
    masked = np.array([[1000.0, -np.inf, 0.0]])
    assert accuracy.kl_divergence(masked, masked) == 0
    assert accuracy.kl_divergence(masked, np.array([[-np.inf, 0.0, 0.0]])) == math.inf


def test_top1_agreement() -> None:
    reference = np.array([[1, 2], [3, 1], [5, 5], [0, 1]])
    assert accuracy.top1_agreement(reference, np.array([[0, 9], [1, 3], [1, 1], [0, 1]])) == 0.75


def test_perplexity_of_a_uniform_guess_is_the_number_of_classes() -> None:
    labels = np.array([[0, 6], [-1, 3]])
    assert accuracy.perplexity(np.zeros((2, 2, 7)), labels) == pytest.approx(7)


def test_perplexity_against_its_definition() -> None:
    logits, labels = RANDOM.normal(size=(3, 4)), np.array([2, -1, 0])
    likelihoods = [_softmax(row)[label] for row, label in zip(logits, labels, strict=True) if label >= 0]
    assert accuracy.perplexity(logits, labels) == pytest.approx(math.prod(likelihoods) ** (-1 / 2))
    assert accuracy.perplexity(np.array([[0.0, 1e6]]), np.array([0])) == math.inf
    assert math.isnan(accuracy.perplexity(np.array([[0.0, np.nan]]), np.array([0])))


def test_next_tokens() -> None:
    ids, mask = np.array([[5, 6, 7], [8, 9, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(accuracy.next_token_labels(ids), [[6, 7, -1], [9, 0, -1]])
    np.testing.assert_array_equal(accuracy.next_token_labels(ids, mask), [[6, 7, -1], [9, -1, -1]])


@given(VALUES, st.integers(0, 9))
def test_correlations_against_loops(x: Any, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=len(x))
    if np.ptp(x) == 0:
        assert math.isnan(accuracy.pearson(x, y))
        return
    assert accuracy.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [np.mean([1 + sum(other < value for other in x), sum(other <= value for other in x)]) for value in x]
    order = [1 + sum(other < value for other in y) for value in y]
    assert accuracy.spearman(x, y) == pytest.approx(np.corrcoef(ranks, order)[0, 1])
    assert accuracy.pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert accuracy.spearman(x, np.exp(x)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: accuracy.cosine(np.ones(2), np.ones(3)), r"shapes \(2,\) and \(3,\)"),
        (lambda: accuracy.closeness(np.ones((0, 2)), np.ones((0, 2))), "no element"),
        (lambda: accuracy.perplexity(np.ones((2, 3)), np.array([0])), r"shape \(1,\); expected \(2,\)"),
        (lambda: accuracy.perplexity(np.ones((1, 3)), np.array([-1])), "none is left to predict"),
        (lambda: accuracy.perplexity(np.ones((1, 3)), np.array([3])), "one is 3; expected less than 3"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        call()
