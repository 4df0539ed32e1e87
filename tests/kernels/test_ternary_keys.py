"""Blocks of keys and values: numbers, planes and words, and how near they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.kernels.ternary_keys import (
    BLOCK,
    STEPS,
    bytes_a_token,
    dequantize_block,
    digits,
    pack,
    packed_words,
    quantize_block,
    trits,
    unpack,
)

PLANES = tuple(STEPS)
# Mean squared error of the best uniform quantizer of a normal distribution with 3, 9 and 27 levels.
NORMAL_ERROR = {1: 0.1902, 2: 0.0307, 3: 0.0047}


@given(
    planes=st.sampled_from(PLANES),
    rows=st.integers(1, 70),
    terms=st.integers(1, 70),
    outer=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_loses_nothing(planes: int, rows: int, terms: int, outer: list[int], seed: int) -> None:
    largest = (3**planes - 1) // 2
    codes = np.random.default_rng(seed).integers(-largest, largest + 1, (*outer, rows, terms)).astype(np.int8)
    packed = pack(codes, planes)
    for field, words in zip(digits(planes), packed, strict=True):
        assert words.shape == (*outer, *packed_words(rows, terms, field))
    np.testing.assert_array_equal(unpack(packed, rows, terms, planes), codes)


@pytest.mark.parametrize("planes", PLANES)
def test_planes_are_digits(planes: int) -> None:
    largest = (3**planes - 1) // 2
    codes = np.arange(-largest, largest + 1, dtype=np.int8)
    planar = trits(codes, planes)
    assert planar.shape == (planes, 3**planes)
    assert set(np.unique(planar)) == {-1, 0, 1}
    weights = 3 ** np.arange(planes)[::-1]
    np.testing.assert_array_equal(np.tensordot(weights, planar, 1), codes)
    assert sum(field.count for field in digits(planes)) == planes


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("planes", PLANES)
def test_normal_numbers_are_as_near_as_the_best_quantizer_has_them(planes: int, axis: int) -> None:
    random = np.random.default_rng(planes)
    x = random.standard_normal((200, BLOCK, 128)) * random.lognormal(0, 1, (200, 1, 1))
    back = dequantize_block(*quantize_block(x, planes, axis), axis)
    error = np.mean((back - x) ** 2 / np.mean(x**2, axis=axis, keepdims=True))
    assert error == pytest.approx(NORMAL_ERROR[planes], rel=0.06)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(planes: int, bad: float) -> None:
    x = np.random.default_rng(0).standard_normal((BLOCK, 8)).astype(np.float32)
    x[3, 5] = bad
    for axis, place in ((-2, np.s_[:, 5]), (-1, np.s_[3])):
        back = dequantize_block(*quantize_block(x, planes, axis), axis)
        assert np.isnan(back[place]).all()
        assert np.isnan(back).sum() == back[place].size


@pytest.mark.parametrize("planes", PLANES)
def test_zeros_and_signs(planes: int) -> None:
    for nearly in (0, 1e-42):
        zeros = np.resize(np.array([nearly, 0], np.float32), (BLOCK, 9))
        assert not dequantize_block(*quantize_block(zeros, planes, -2), -2).any()
    x = np.random.default_rng(1).standard_normal((BLOCK, 8))
    codes, scale = quantize_block(x, planes, -2)
    opposite, same = quantize_block(-x, planes, -2)
    np.testing.assert_array_equal(opposite, -codes)
    np.testing.assert_array_equal(same, scale)


@pytest.mark.parametrize(("planes", "least"), [(1, 12), (2, 6), (3, 4)])
@pytest.mark.parametrize("size", [64, 128])
def test_bytes(planes: int, least: float, size: int) -> None:
    """Counted from the arrays, and how many times smaller than float32 they are."""
    codes = np.zeros((BLOCK, size), np.int8)
    words = sum(array.nbytes for part in (codes, codes.T) for array in pack(part, planes))
    counted = (words + 4 * size + 4 * BLOCK) / BLOCK
    assert counted == bytes_a_token(size, size, planes)
    assert 8 * size / counted >= least


def test_no_such_number_of_planes() -> None:
    with pytest.raises(ValueError, match="4 planes of keys or values; expected 1 to 3"):
        digits(4)
