"""Embedding tables of 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tvm_ternary.quantize import tables
from tvm_ternary.quantize.tables import quantize_rows, row_bits, rows_error

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
TABLES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=7), elements=FINITE)


@given(TABLES)
def test_no_element_is_off_by_more_than_half_a_step(table: np.ndarray) -> None:
    codes, scale = quantize_rows(table)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (np.int8, table.shape, np.float32, (len(table), 1))
    assert (codes > -128).all()
    # The scale is rounded to float32, or to its smallest number; 127 of them are as far off.
    slack = 127 * (scale.astype(np.float64) * 2.0**-24 + 2.0**-150)
    assert (np.abs(codes * scale.astype(np.float64) - table) <= 0.5 * scale + slack).all()


def test_each_row_has_the_step_of_its_largest() -> None:
    codes, scale = quantize_rows(np.array([[127, -64, 0.4], [0, 0, 0], [-1.27, 0.635, 0.02]], np.float32))
    np.testing.assert_array_equal(codes, [[127, -64, 0], [0, 0, 0], [-127, 64, 2]])
    np.testing.assert_allclose(scale[:, 0], [1, 0, 0.01], rtol=1e-7)


def test_a_large_table_is_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).standard_normal((100, 7)).astype(np.float32)
    codes, scale = quantize_rows(table)
    error = rows_error(table, codes, scale)
    monkeypatch.setattr(tables, "_BLOCK", 64)
    np.testing.assert_array_equal(quantize_rows(table)[0], codes)
    np.testing.assert_array_equal(quantize_rows(table)[1], scale)
    assert rows_error(table, codes, scale) == pytest.approx(error, rel=1e-12)


def test_the_error_is_that_of_rounding_to_steps() -> None:
    """Evenly spread values: an error of step / sqrt(12) where the values' own size is 127 steps / sqrt(3)."""
    table = np.random.default_rng(1).uniform(-1, 1, (200, 300)).astype(np.float32)
    assert rows_error(table, *quantize_rows(table)) == pytest.approx(1 / 254, rel=0.02)
    assert rows_error(np.zeros((2, 3), np.float32), *quantize_rows(np.zeros((2, 3), np.float32))) == 0


def test_scales_count() -> None:
    assert row_bits(384) == pytest.approx(8.0833, abs=1e-4)
