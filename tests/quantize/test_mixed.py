"""The choice of a scheme for each matrix, against all choices there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import OptionError
from tvm_ternary.quantize import mixed
from tvm_ternary.quantize.mixed import Candidate, within_bits, within_error

# Few values, so that ties in bits, in error and in their ratio are common.
numbers = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10))
options = st.lists(
    st.builds(Candidate, st.sampled_from("abc"), numbers.map(lambda x: x + 1), numbers), min_size=1, max_size=5
)
problems = st.lists(options, min_size=0, max_size=5)


def named(problem: list[list[Candidate]]) -> dict[str, list[Candidate]]:
    return {f"m{i}": each for i, each in enumerate(problem)}


@given(problems, st.floats(0, 1))
def test_no_choice_is_better(problem: list[list[Candidate]], share: float) -> None:
    least = sum(min(one.bits for one in each) for each in problem)
    budget = least + share * (sum(max(one.bits for one in each) for each in problem) - least)
    got = within_bits(named(problem), budget)
    best = min(
        sum(one.error for one in choice)
        for choice in itertools.product(*problem)
        if sum(one.bits for one in choice) <= budget * (1 + 1e-15)
    )
    assert got.exact
    assert got.bits <= budget * (1 + 1e-12)
    assert got.error == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert got.bound <= best * (1 + 1e-9) + 1e-9
    for name, each in named(problem).items():
        assert got.decisions[name].candidate in each


def test_more_bits_never_hurt_and_the_bound_is_close() -> None:
    rng = np.random.default_rng(0)
    candidates = {}
    for i in range(150):
        weights, hard = float(rng.choice([147456, 589824])), float(rng.lognormal())
        candidates[f"m{i}"] = [
            Candidate(
                f"t{p}g{g}",
                weights * (2 * p + 32 * p / g),
                hard * 0.2**p * (1 + g / 500) * float(rng.uniform(0.9, 1.1)),
            )
            for p in (1, 2, 3, 4)
            for g in (32, 64, 128)
        ]
    weights = sum(min(one.bits for one in each) for each in candidates.values()) / 2.25
    errors = []
    for bpw in (2.5, 3.5, 4.5, 6.5, 10.0):
        got = within_bits(candidates, bpw * weights)
        assert got.exact
        assert got.bits <= bpw * weights
        assert got.bound * (1 - 1e-12) <= got.error <= got.bound * 1.001
        errors.append(got.error)
        assert got == within_bits(candidates, bpw * weights)
    assert errors == sorted(errors, reverse=True)


def test_too_many_partial_choices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    problem = named([[Candidate(str(i), 1 + b, e) for i, (b, e) in enumerate(rng.random((20, 2)))] for _ in range(12)])
    budget = 12 * 1.3
    exact = within_bits(problem, budget)
    monkeypatch.setattr(mixed, "_STATES", 2)
    got = within_bits(problem, budget)
    assert not got.exact
    assert got.bits <= budget
    assert exact.error < got.error < 1.1 * exact.error
    assert got.bound == exact.bound


def test_reasons_name_the_neighbours() -> None:
    one = [Candidate("t1", 20, 0.5), Candidate("t2", 40, 0.1), Candidate("t3", 60, 0.02), Candidate("worse", 50, 0.3)]
    got = within_bits({"a": one, "b": [Candidate("float", 320, 0.0)]}, 365)
    assert got.decisions["a"].candidate.label == "t2"
    assert got.decisions["a"].reason == "error 0.1; t1 would have 0.5 with 50% fewer bits; t3 0.02 with 50% more"
    assert got.decisions["b"].reason == "error 0; there is no other candidate"
    assert list(got.decisions) == ["a", "b"]


def test_a_budget_below_the_smallest_is_refused() -> None:
    with pytest.raises(OptionError, match=r"bit budget: 1,000 bits, but the smallest .* take 2,000; raise it"):
        within_bits({"a": [Candidate("t1", 2000, 1.0)]}, 1000)


@given(options, st.floats(0, 10))
def test_within_an_error_the_fewest_bits(each: list[Candidate], limit: float) -> None:
    got = within_error({"m": each}, limit)["m"]
    fewest = min((one.bits for one in each if one.error <= limit), default=math.inf)
    assert (math.inf if got is None else got.candidate.bits) == fewest


def test_reasons_within_an_error() -> None:
    one = [Candidate("t1", 20, 0.5), Candidate("t2", 40, 0.1)]
    assert within_error({"m": one}, 0.01)["m"] is None
    second, first = (within_error({"m": one}, limit)["m"] for limit in (0.2, 0.6))
    assert second is not None
    assert first is not None
    assert second.reason == "error 0.1 of at most 0.2; t1 has 0.5"
    assert first.reason == "error 0.5 of at most 0.6; nothing takes fewer bits"
