"""Sums of multiples of dimensions, as manifests spell them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.runtime.linear import Linear, read_linear


@pytest.mark.parametrize(
    ("text", "factors", "offset"),
    [
        ("past + length", {"past": 1, "length": 1}, 0),
        ("rows * 32", {"rows": 32}, 0),
        ("2 * 3 * rows", {"rows": 6}, 0),
        ("a - b * 2 + 5 - 7", {"a": 1, "b": -2}, -2),
        ("DynamicDimension.0 + batch-size", {"DynamicDimension.0": 1, "batch-size": 1}, 0),
    ],
)
def test_reading(text: str, factors: dict[str, int], offset: int) -> None:
    assert read_linear(text) == Linear(factors, offset)


@pytest.mark.parametrize("text", ["rows", "batch size", "rows // 2", "a * b", "a +", "2 + 3", "", "a - a"])
def test_what_is_none(text: str) -> None:
    assert read_linear(text) is None


FACTORS = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(-9, 9).filter(bool), min_size=1)
LINEAR = st.builds(Linear, FACTORS, st.integers(-9, 9))


@given(LINEAR, LINEAR, st.integers(-4, 4), st.fixed_dictionaries({name: st.integers(1, 9) for name in "abc"}))
def test_arithmetic(x: Linear, y: Linear, number: int, sizes: dict[str, int]) -> None:
    left, right = x.value(sizes), y.value(sizes)
    assert left is not None
    assert right is not None
    assert (x + y).value(sizes) == left + right
    assert (x - y).value(sizes) == left - right
    assert (number - x * number).value(sizes) == number - left * number
    assert x.put(sizes) == left
    again = x.put({"a": y})
    assert isinstance(again, int) or again.value(sizes) == x.value({**sizes, "a": right})


@given(st.integers(2, 40), st.integers(-20, 20), st.integers(1, 50))
def test_a_multiple_tells_its_dimension(factor: int, offset: int, rows: int) -> None:
    formula = factor * Linear({"rows": 1}) + offset
    assert formula.multiple == ("rows", factor)
    assert formula.solve(factor * rows + offset) == rows
    assert formula.solve(factor * rows + offset + 1) is None
    assert formula.solve(offset) is None, "a dimension is at least 1"


def test_names() -> None:
    assert Linear({"a": 1}).name == "a"
    assert [other.name for other in (Linear({"a": 2}), Linear({"a": 1}, 1), Linear({"a": 1, "b": 1}))] == [None] * 3
    assert str(Linear({"rows": 32, "past": 1}, -4)) == "32 * rows + past - 4"
    assert Linear({"a": 1}, 1).multiple is Linear({"a": 2, "b": 2}).multiple is None
