"""Turns, percentiles and means."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.bench.timing import PACE, WAKING, Pace, Spread, alternate, geometric_mean, pace_of, turn_ratio

POSITIVE = st.floats(1e-6, 1e6)


@given(st.lists(POSITIVE, min_size=1, max_size=20), POSITIVE)
def test_geometric_mean(values: list[float], factor: float) -> None:
    mean = geometric_mean(values)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert geometric_mean([value * factor for value in values]) == pytest.approx(mean * factor)
    assert geometric_mean([*values, *(1 / value for value in values)]) == pytest.approx(1)


def test_geometric_mean_of_known_numbers() -> None:
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean(iter([1, 10, 100])) == pytest.approx(10)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0]])
def test_geometric_mean_needs_positive_numbers(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least one number, all positive"):
        geometric_mean(values)


@given(st.permutations(range(11)))
def test_spread_takes_percentiles_of_any_order(samples: list[float]) -> None:
    assert Spread.of(samples) == Spread(5, 2, 8)


def test_spread_of_turns_is_of_their_calls() -> None:
    assert Spread.of_turns([[3.0, 1.0], [2.0]]) == Spread.of([1.0, 2.0, 3.0])


def test_ratio_is_of_the_same_turn() -> None:
    """A disturbance of whole turns leaves it alone, and one of a single call."""
    ours = [[1.0, 1.0, 9.0], [10.0, 10.0, 10.0], [2.0, 2.0, 2.0]]
    theirs = [[3.0, 3.0, 3.0], [30.0], [6.0, 7.0, 5.0]]
    assert turn_ratio(theirs, ours) == pytest.approx(3)


def test_spread_of_one_sample() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


ONCE = Pace(most_warming=1, most_timing=1)


def test_functions_take_turns_and_copies_rotate() -> None:
    log: list[str] = []
    names = {"ours": ["a0", "a1", "a2"], "peer": ["b0"]}
    calls = {key: [lambda name=name: log.append(name) for name in group] for key, group in names.items()}
    times = alternate(calls, 3, ONCE)
    assert log == [
        *("a0", "a1", "a2", "a0", "a1"),  # each once, and two to know how long one takes
        *("b0", "b0", "b0"),
        *("a2", "a0", "b0", "b0"),
        *("a1", "a2", "b0", "b0"),
        *("a0", "a1", "b0", "b0"),
    ]
    assert times.keys() == names.keys()
    assert all(0 <= spread.p20 <= spread.median <= spread.p80 < math.inf for spread in times.values())


def test_a_turn_has_calls_that_do_not_count() -> None:
    log: list[str] = []
    calls = {name: [lambda name=name: log.append(name)] for name in "ab"}
    alternate(calls, 2, Pace(warming=1e9, timing=1e9, most_warming=3, most_timing=2))
    assert "".join(log) == "aaabbb" + ("a" * 5 + "b" * 5) * 2


def test_others_wait_until_workers_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr("time.sleep", lambda seconds: log.append(f"sleep {seconds}"))
    alternate({name: [lambda name=name: log.append(name)] for name in "ab"}, 2, ONCE, {"a": 0.5})
    assert log[6:] == ["a", "a", "sleep 0.5", "b", "b"] * 2


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [(0.0, (8, 5)), (1e-5, (8, 5)), (3e-3, (7, 4)), (1e-2, (2, 1)), (0.5, (1, 1))],
)
def test_slow_functions_are_called_less_often(seconds: float, calls: tuple[int, int]) -> None:
    assert PACE.calls(seconds) == calls


def test_several_threads_are_warmed_for_longer() -> None:
    """However short a call is, a host has the time to give them a core each."""
    assert (pace_of(1), pace_of(2)) == (PACE, WAKING)
    assert [WAKING.calls(seconds)[0] for seconds in (5e-5, 1e-3, 0.5)] == [3000, 150, 1]
