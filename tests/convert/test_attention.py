"""Attention taken out of small models: what it is given, how errors are told, and which planes are enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.attention_model import RUNNER, attention_model, attention_of, heads_of, outputs_of, sample
from tvm_ternary.convert.attention import CalledAttention, attention_errors, choose_planes
from tvm_ternary.errors import InputError

Array = npt.NDArray[Any]
MODEL = attention_model()


def test_outputs_are_those_of_the_model_in_the_order_of_the_samples() -> None:
    samples = [sample(length, seed) for seed, length in enumerate((5, 9, 5, 1, 9))]
    outputs = CalledAttention(MODEL, RUNNER).run(samples, attention_of)
    for inputs, found in zip(samples, outputs, strict=True):
        want = outputs_of(inputs)[-1]
        # Sums of 16 in float32, twice.
        np.testing.assert_allclose(found["y"][0], want, atol=64 * 2.0**-24 * np.abs(want).max())


def test_what_fails_in_a_call_is_told_and_the_next_run_works() -> None:
    called = CalledAttention(MODEL, RUNNER)

    def fails(*_: Any) -> Array:
        raise ValueError("of this kind")

    with pytest.raises(ValueError, match="of this kind"):
        called.run([sample(3)], fails)
    assert len(called.run([sample(3)], attention_of)) == 1
    with pytest.raises(InputError, match="no sample"):
        called.run([], attention_of)
    with pytest.raises(InputError, match="mask"):
        called.run([{"x": sample(3)["x"]}], attention_of)


def test_errors_are_of_each_head_of_keys_and_of_queries_that_see_something_packed() -> None:
    """Keys alone, one plane: the first block, for the queries from its last token on."""
    samples = [sample(70, 1), sample(70, 2), sample(64, 3)]
    found = attention_errors(MODEL, samples, planes=(1,), window=0, values=False, runner=RUNNER)
    for layer in (0, 1):
        moved, exact = np.zeros(2), np.zeros(2)
        for inputs in samples:
            q, k, v = heads_of([inputs["x"][0], outputs_of(inputs)[0]][layer], layer)
            block = k[:, :64]
            sign = np.clip(np.rint(block / (1.534 * np.abs(block).mean(1, keepdims=True))), -1, 1)
            keys = np.concatenate([sign * ((block * sign).sum(1) / (sign != 0).sum(1))[:, None], k[:, 64:]], axis=1)
            old, new = (attention_of(layer, q, one, v, inputs["mask"][0])[:, 63:] for one in (k, keys))
            moved += np.square(new - old).reshape(2, -1).sum(1)
            exact += np.square(old).reshape(2, -1).sum(1)
        heads = found[f"attention.{layer}"]
        assert heads == {n: {1: pytest.approx(np.sqrt(moved[n] / exact[n]), rel=1e-4)} for n in (0, 1)}
        assert all(error[1] > 0.01 for error in heads.values())


def test_more_planes_are_nearer_and_what_is_not_packed_is_not_measured() -> None:
    seen: list[tuple[str, int, int]] = []
    found = attention_errors(MODEL, [sample(130)], runner=RUNNER, progress=lambda *step: seen.append(step))
    for heads in found.values():
        assert all(of[1] > of[2] > of[3] > 0 for of in heads.values())
    assert seen[-1][1] == seen[-1][2]
    nothing = attention_errors(MODEL, [sample(127)], runner=RUNNER)
    assert all(np.isnan(error) for heads in nothing.values() for of in heads.values() for error in of.values())
    assert set(choose_planes(nothing, 9.0).values()) == {0}


def test_the_fewest_planes_that_are_enough_for_every_head() -> None:
    errors = {
        "easy": {0: {1: 0.05, 2: 0.02, 3: 0.01}, 1: {1: 0.1, 2: 0.03, 3: 0.01}},
        "one hard head": {0: {1: 0.05, 2: 0.02, 3: 0.01}, 1: {1: 0.9, 2: 0.3, 3: 0.08}},
        "hard": {0: {1: 0.9, 2: 0.5, 3: 0.2}},
        "unknown": {0: {1: np.nan, 2: np.nan, 3: np.nan}},
    }
    assert choose_planes(errors, 0.1) == {"easy": 1, "one hard head": 3, "hard": 0, "unknown": 0}
    assert choose_planes({"two given": {0: {3: 0.1, 2: 0.1}}}, 0.1) == {"two given": 2}
    assert choose_planes({}, 0.1) == {}
