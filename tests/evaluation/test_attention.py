"""A rounded model as a metric sees it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention_model import RUNNER, attention_model, sample
from tvm_ternary.convert.attention import CalledAttention
from tvm_ternary.evaluation.attention import RoundedModel
from tvm_ternary.evaluation.metric import Metric
from tvm_ternary.kernels.rounded_attention import Rounding

SAMPLE = sample(130)


@pytest.fixture(scope="module")
def called() -> CalledAttention:
    return CalledAttention(attention_model(), RUNNER)


def test_what_is_packed_is_counted_and_changes_what_sees_it_alone(called: CalledAttention) -> None:
    exact, rounded = (RoundedModel(called, Rounding(planes, planes)) for planes in (0, 2))
    before, after = (model(SAMPLE)["y"] for model in (exact, rounded))
    np.testing.assert_array_equal(before[:, :127], after[:, :127])
    assert (np.abs(before - after)[:, 127:].max(-1) > 1e-4).all()
    # The last three tokens find one block.
    assert rounded.packed_share == pytest.approx(3 * 64 / (130 * 131 / 2))
    assert exact.packed_share == 0
    assert [spec.name for spec in rounded.inputs] == list(SAMPLE)
    assert [spec.name for spec in rounded.outputs] == ["y"]


def test_attentions_may_differ(called: CalledAttention) -> None:
    second = RoundedModel(called, {"attention.1": Rounding(1, 0, 0)})
    both = RoundedModel(called, Rounding(1, 0, 0))
    exact, one, two = (model(SAMPLE)["y"] for model in (RoundedModel(called, {}), second, both))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in ((exact, one), (one, two), (exact, two)))
    assert second.packed_share == both.packed_share / 2


def test_a_metric_takes_it_for_a_model(called: CalledAttention) -> None:
    model = RoundedModel(called, Rounding(2, 2, 0))
    metric = Metric("mean", lambda run: float(run(SAMPLE)["y"].mean()))
    assert metric.measure(model, [], []) == {"mean": model(SAMPLE)["y"].mean()}  # type: ignore[arg-type]
