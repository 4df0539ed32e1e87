"""What observers gather, against the same computed at once."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import InputError
from tvm_ternary.quantize.observers import Observer


def draw_rows(seed: int, rows: int, columns: int) -> np.ndarray:
    """Rows whose columns differ in size by orders of magnitude, one of them always zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-4, 4, columns) + rng.standard_normal(columns)
    x[:, 0] = 0
    return x.astype(np.float32)


def observe(x: np.ndarray, cuts: list[int]) -> Observer:
    observer = Observer(x.shape[1])
    for part in np.split(x, sorted(cuts)):
        observer.update(part)
    return observer


@given(st.integers(0, 2**32 - 1), st.integers(1, 1300), st.integers(1, 9))
def test_sums_are_those_of_all_rows_at_once(seed: int, rows: int, columns: int) -> None:
    x = draw_rows(seed, rows, columns)
    got = observe(x, []).statistics()
    wide = x.astype(np.float64)
    assert got.count == rows
    size = np.abs(wide).mean(axis=0)
    np.testing.assert_array_less(np.abs(got.mean - wide.mean(axis=0)), 1e-6 * size + 1e-30)
    np.testing.assert_array_equal(got.absmax, np.abs(x).max(axis=0))
    np.testing.assert_allclose(got.square, (wide**2).mean(axis=0), rtol=1e-6)
    assert got.hessian is not None
    assert got.hessian.dtype == np.float32
    np.testing.assert_array_equal(got.hessian, got.hessian.T)
    root = np.sqrt((wide**2).mean(axis=0))
    # Products are rounded to float32 and summed over 512 rows in it, so errors grow with sizes, not with results.
    np.testing.assert_array_less(np.abs(got.hessian - wide.T @ wide / rows), 1e-5 * np.outer(root, root) + 1e-30)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 1200), max_size=5))
def test_batches_do_not_matter(seed: int, cuts: list[int]) -> None:
    x = draw_rows(seed, 1200, 5)
    once, parts = observe(x, []).statistics(), observe(x, cuts).statistics()
    for name in ("mean", "absmax", "square", "hessian", "histogram"):
        np.testing.assert_array_equal(getattr(once, name), getattr(parts, name))


def test_looking_changes_nothing() -> None:
    x = draw_rows(3, 700, 4)
    observer = observe(x[:300], [])
    first = observer.statistics()
    observer.update(x[300:])
    np.testing.assert_array_equal(observer.statistics().hessian, observe(x, []).statistics().hessian)
    np.testing.assert_array_equal(first.hessian, observe(x[:300], []).statistics().hessian)
    assert first.count == 300


@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.floats(0, 100))
def test_percentiles_are_within_their_bound(seed: int, rows: int, q: float) -> None:
    x = draw_rows(seed, rows, 6)
    x[:, 1] *= np.float32(1e-9)
    got = observe(x, []).statistics().percentile(q)
    rank = min(max(1, int(np.ceil(q / 100 * rows))), rows)
    exact = np.sort(np.abs(x), axis=0)[rank - 1]
    assert (got >= exact).all()
    assert (got <= np.maximum(exact * (1 + 1 / 32), 2.0**-24)).all()


@pytest.mark.parametrize("size", [1e-45, 2.0**-24, 1.0, 65535.0, 65536.0, 1e17])
def test_the_last_percentile_is_the_largest(size: float) -> None:
    x = np.array([[size], [-size / 3], [0]], dtype=np.float32)
    statistics = observe(x, []).statistics()
    np.testing.assert_array_equal(statistics.percentile(100), statistics.absmax)


def test_what_is_not_wanted_is_not_gathered() -> None:
    observer = Observer(3, hessian=False, percentiles=False)
    observer.update(np.ones((2, 3), np.float32))
    got = observer.statistics()
    assert got.hessian is None
    assert got.histogram is None
    np.testing.assert_array_equal(got.mean, [1, 1, 1])


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (np.zeros((2, 4), np.float32), "the input: shape (2, 4), expected (rows, 3)"),
        (np.zeros(3, np.float32), "shape (3,)"),
        (
            np.array([[0, 0, 0], [0, np.nan, 0]], np.float32),
            "nan in row 11, column 1, expected finite values up to 1e+17",
        ),
        (np.array([[0, 0, -np.inf]], np.float32), "-inf in row 10, column 2"),
        (np.array([[2e17, 0, 0]], np.float32), "2e+17 in row 10, column 0"),
    ],
)
def test_bad_rows_are_refused(x: np.ndarray, problem: str) -> None:
    observer = Observer(3, name="the input")
    observer.update(np.zeros((10, 3), np.float32))
    with pytest.raises(InputError, match=re.escape(problem)):
        observer.update(x)


def test_nothing_seen_is_refused() -> None:
    observer = Observer(3)
    observer.update(np.zeros((0, 3), np.float32))
    with pytest.raises(InputError, match="no rows, expected at least one"):
        observer.statistics()


def test_drift_is_how_far_rows_moved() -> None:
    generator = np.random.default_rng(0)
    f, x = (generator.standard_normal((100, 6)).astype(np.float32) for _ in range(2))
    observer = Observer(6)
    for start in range(0, 100, 30):
        observer.update(x[start : start + 30], f[start : start + 30])
    drift = observer.statistics().drift
    assert drift is not None
    np.testing.assert_allclose(drift, (f - x).T.astype(np.float64) @ x / 100, atol=1e-6)
    plain = Observer(6)
    plain.update(x)
    assert plain.statistics().drift is None
