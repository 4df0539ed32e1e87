"""Outputs compared sample by sample give what all of them at once give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_ternary.analysis import accuracy
from tvm_ternary.evaluation.logits import LogitsRule
from tvm_ternary.evaluation.outputs import OutputComparison
from tvm_ternary.runtime.manifest import TensorSpec

NONE = LogitsRule(frozenset(), frozenset())
HIDDEN = TensorSpec("h", "float32", ("b", "s", 4))
RANDOM = np.random.default_rng(0)


def test_samples_of_several_shapes() -> None:
    comparison = OutputComparison(HIDDEN, NONE, 5, 0)
    pairs = [RANDOM.normal(size=(2, 2, rows, 4)).astype(np.float32) for rows in (3, 1, 7)]
    for a, b in pairs:
        comparison.update(a, b, {})
    result = comparison.result()
    a, b = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    expected = accuracy.closeness(a, b)
    assert result.closeness is not None
    assert result.closeness.cosine == pytest.approx(expected.cosine)
    assert result.closeness.sqnr_db == pytest.approx(expected.sqnr_db)
    assert (result.closeness.max_error, result.equal) == (expected.max_error, 0)
    assert result.closeness.mean_error == pytest.approx(expected.mean_error)
    assert result.points.shape == (2, 15)
    found = {tuple(point) for point in result.points.T}
    assert found <= set(zip(a, b, strict=True))


def test_padding_is_left_out() -> None:
    comparison = OutputComparison(HIDDEN, NONE, 5, 0)
    a = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)
    b = a.copy()
    b[1, 2] += 9
    comparison.update(a, b, {"attention_mask": np.array([[1, 1, 1], [1, 1, 0]])})
    assert comparison.result().equal == 1


def test_predictions_over_samples_of_several_shapes() -> None:
    comparison = OutputComparison(HIDDEN, LogitsRule(frozenset("h"), frozenset("h")), 5, 0)
    ids, mask = RANDOM.integers(0, 4, (3, 6)), np.ones((3, 6), np.int64)
    mask[2, 3:] = 0
    a, b = RANDOM.normal(size=(2, 3, 6, 4)).astype(np.float32)
    for rows, length in ((slice(0, 2), 6), (slice(2, 3), 5)):
        part = (rows, slice(0, length))
        comparison.update(a[part], b[part], {"input_ids": ids[part], "attention_mask": mask[part]})
    logits, seen = comparison.result().logits, mask != 0
    assert logits is not None
    labels = accuracy.next_token_labels(ids, mask)
    assert logits.perplexity_float == pytest.approx(accuracy.perplexity(a, labels))
    assert logits.perplexity == pytest.approx(accuracy.perplexity(b, labels))
    assert logits.kl_divergence == pytest.approx(accuracy.kl_divergence(a[seen], b[seen]))
    assert logits.top1_agreement == pytest.approx(accuracy.top1_agreement(a[seen], b[seen]))


def test_integers_are_equal_or_not() -> None:
    comparison = OutputComparison(TensorSpec("n", "int64", (4,)), NONE, 5, 0)
    comparison.update(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), {})
    result = comparison.result()
    assert (result.equal, result.closeness, result.logits) == (0.75, None, None)


def test_nan_is_not_hidden() -> None:
    comparison = OutputComparison(HIDDEN, NONE, 5, 0)
    for b in (np.nan, 1.0):
        comparison.update(np.ones((1, 1, 4), np.float32), np.full((1, 1, 4), b, np.float32), {})
    close = comparison.result().closeness
    assert close is not None
    assert all(math.isnan(x) for x in (close.cosine, close.sqnr_db, close.max_error, close.mean_error))
