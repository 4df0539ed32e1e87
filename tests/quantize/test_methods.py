"""Ternarization methods against numbers worked out by hand and against their definitions."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import OptionError
from tvm_ternary.quantize import METHODS

# Every method, at its default and at the ends of its options.
VARIANTS: list[tuple[str, dict[str, float]]] = [
    ("absmean", {}),
    ("twn", {}),
    *(("absmax", {"fraction": fraction}) for fraction in (0.0, 0.5, 1.0)),
    *(("percentile", {"percent": percent}) for percent in (0.0, 46.0, 100.0)),
    *(("meanstd", {"k": k}) for k in (-0.3, 0.0, 1e6, -1e6)),
    ("optimal", {}),
]
variants = pytest.mark.parametrize(("method", "options"), VARIANTS)


@st.composite
def group_arrays(draw: st.DrawFn) -> np.ndarray:
    """Draw groups of normal, equal, sparse or mixed weights over many orders of magnitude."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(0, 6)), draw(st.integers(0, 40))
    kind = draw(st.sampled_from(["normal", "equal", "sparse", "integers"]))
    base = {
        "normal": lambda: rng.standard_normal(shape),
        "equal": lambda: np.where(rng.random(shape) < 0.5, -0.1, 0.1),
        "sparse": lambda: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
        "integers": lambda: rng.integers(-3, 4, shape),
    }[kind]()
    return (base * 10.0 ** draw(st.sampled_from([-30, -3, 0, 3, 30]))).astype(np.float32)


@pytest.mark.parametrize(
    ("method", "options", "weights", "trits", "scale"),
    [
        # mean 2: the ones lie exactly at half the scale and round to even, 0.
        ("absmean", {}, [4, -2, 1, -1], [1, -1, 0, 0], 2.0),
        # mean 2, threshold 1.4, mean of 4 and 2.
        ("twn", {}, [4, -2, 1, -1], [1, -1, 0, 0], 3.0),
        # mean 1, threshold 0.7: all are kept.
        ("twn", {}, [1, -1, 1, 1], [1, -1, 1, 1], 1.0),
        ("absmax", {}, [4, -2, 1, -1], [1, -1, 0, 0], 3.0),
        ("absmax", {"fraction": 1.0}, [4, -2, 1, -4], [1, 0, 0, -1], 4.0),
        ("absmax", {"fraction": 0.0}, [4, -2, 0, -1], [1, -1, 0, -1], 7 / 3),
        # magnitudes 0 1 2 3 4: the median is 2, a quarter of the way is 1.
        ("percentile", {"percent": 50.0}, [1, -2, 3, -4, 0], [0, -1, 1, -1, 0], 3.0),
        ("percentile", {"percent": 25.0}, [1, -2, 3, -4, 0], [1, -1, 1, -1, 0], 2.5),
        ("percentile", {"percent": 100.0}, [1, -2, 3, -4, 0], [0, 0, 0, -1, 0], 4.0),
        # mean 2, standard deviation sqrt(1.5).
        ("meanstd", {"k": 0.0}, [4, -2, 1, -1], [1, -1, 0, 0], 3.0),
        ("meanstd", {"k": 1.0}, [4, -2, 1, -1], [1, 0, 0, 0], 4.0),
        ("meanstd", {"k": -1.0}, [4, -2, 1, -1], [1, -1, 1, -1], 2.0),
        # (4, 6, 7, 8)^2 / (1, 2, 3, 4) = 16, 18, 16.3, 16.
        ("optimal", {}, [4, -2, 1, -1], [1, -1, 0, 0], 3.0),
        ("optimal", {}, [4, -1, 1, -1], [1, 0, 0, 0], 4.0),
        # Equal ones are kept together.
        ("optimal", {}, [2, -1, 1, 1], [1, -1, 1, 1], 1.25),
    ],
)
def test_hand_examples(
    method: str, options: dict[str, float], weights: list[float], trits: list[int], scale: float
) -> None:
    # Two groups, the second ten times the first, upside down: groups do not see one another.
    groups = np.array([weights, [-10 * w for w in weights]], dtype=np.float32)
    got_trits, got_scale = METHODS[method](groups, **options)
    assert got_trits.dtype == np.int8
    assert got_scale.dtype == np.float32
    np.testing.assert_array_equal(got_trits, [trits, [-t for t in trits]])
    np.testing.assert_allclose(got_scale, [scale, 10 * scale], rtol=1e-7)


@given(group_arrays())
def test_absmean_is_round_and_clip(groups: np.ndarray) -> None:
    trits, scale = METHODS["absmean"](groups)
    for row in range(len(groups)):
        wide = groups[row].astype(np.float64)
        mean = np.abs(wide).sum() / max(1, wide.size)
        assert scale[row] == pytest.approx(mean, rel=1e-6)
        expected = np.clip(np.round(wide / mean), -1, 1) if mean else np.zeros_like(wide)
        near_half = mean * 0.5
        decided = np.abs(np.abs(wide) - near_half) > 1e-12 * near_half
        np.testing.assert_array_equal(trits[row][decided], expected[decided])


@variants
@given(groups=group_arrays())
def test_trits_are_a_threshold_and_the_scale_is_their_mean(
    method: str, options: dict[str, float], groups: np.ndarray
) -> None:
    trits, scale = METHODS[method](groups, **options)
    assert trits.shape == groups.shape
    assert scale.shape == (len(groups),)
    magnitude = np.abs(groups)
    for row in range(len(groups)):
        kept = trits[row] != 0
        np.testing.assert_array_equal(trits[row][kept], np.sign(groups[row][kept]))
        if not groups[row].any():
            assert not kept.any()
            assert scale[row] == 0
            continue
        assert kept[np.argmax(magnitude[row])], "the largest weight is always kept"
        if not kept.all():
            assert magnitude[row][kept].min() > magnitude[row][~kept].max()
        if method != "absmean":
            assert scale[row] == pytest.approx(magnitude[row][kept].mean(dtype=np.float64), rel=1e-6)


@variants
@given(groups=group_arrays())
def test_no_method_makes_the_error_larger_than_zero_weights(
    method: str, options: dict[str, float], groups: np.ndarray
) -> None:
    trits, scale = METHODS[method](groups, **options)
    wide = groups.astype(np.float64)
    error = ((wide - scale[:, None].astype(np.float64) * trits) ** 2).sum(axis=1)
    assert (error <= (wide**2).sum(axis=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_error_on_normal_weights_is_that_of_the_closed_form(method: str) -> None:
    groups = np.random.default_rng(0).standard_normal((1, 200_000)).astype(np.float32)
    trits, scale = METHODS[method](groups)
    error = float(((groups - scale[:, None] * trits) ** 2).mean())
    mean, deviation = math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)
    threshold = {
        "absmean": 0.5 * mean,
        "twn": 0.7 * mean,
        "absmax": 0.5 * float(np.abs(groups).max()),
        "percentile": 0.6128,  # P(|x| < 0.6128) = 0.46
        "meanstd": mean - 0.3 * deviation,
        "optimal": 0.6120,  # Max 1960, table I
    }[method]
    # With t the threshold: E[|x|; |x| > t] = 2 phi(t) and P(|x| > t) = erfc(t / sqrt 2).
    kept, above = 2 * math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi), math.erfc(threshold / math.sqrt(2))
    level = mean if method == "absmean" else kept / above
    expected = 1 - 2 * level * kept + level**2 * above
    # Squared errors have a standard deviation below 1, so their mean over 200,000 one below 1 / sqrt(200,000) = 0.0022.
    assert error == pytest.approx(expected, abs=2 * 0.0022)
    if method in ("percentile", "meanstd", "optimal"):
        # Max 1960, table I: no three levels do better than 0.1902; these defaults are within 1 % of it.
        assert 0.1902 - 1e-4 < expected < 0.1902 * 1.01


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.booleans())
def test_nothing_is_better_than_optimal(seed: int, length: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(-3, 4, (4, length)) if whole else rng.standard_normal((4, length))
    groups = groups.astype(np.float32)
    trits, scale = METHODS["optimal"](groups)
    wide = groups.astype(np.float64)
    error = ((wide - scale[:, None].astype(np.float64) * trits) ** 2).sum(axis=1)
    every = np.array(list(itertools.product((-1, 0, 1), repeat=length)), dtype=np.float64)
    fitted = (wide @ every.T) ** 2 / np.maximum((every**2).sum(axis=1), 1)
    least = (wide**2).sum(axis=1) - fitted.max(axis=1)
    np.testing.assert_allclose(error, least, rtol=1e-6, atol=1e-12 * length)


@variants
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_groups(method: str, options: dict[str, float], shape: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trits, scale = METHODS[method](np.zeros(shape, np.float32), **options)
    assert trits.shape == shape
    np.testing.assert_array_equal(scale, np.zeros(shape[0]))


@variants
@pytest.mark.parametrize("size", [1e-45, 1e-40, 3.4028235e38])
def test_the_ends_of_float32(method: str, options: dict[str, float], size: float) -> None:
    groups = np.zeros((3, 1000), dtype=np.float32)
    groups[0] = size
    groups[1, ::2] = -size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trits, scale = METHODS[method](groups, **options)
    assert np.isfinite(scale).all()
    np.testing.assert_array_equal(trits[0], np.ones(1000))
    assert scale[0] == np.float32(size)
    np.testing.assert_array_equal(trits[2], np.zeros(1000))
    if method == "absmean":
        assert scale[1] == np.float32(0.5 * np.float64(np.float32(size)))
        assert np.count_nonzero(trits[1]) == (500 if scale[1] else 0)
    else:
        assert scale[1] == np.float32(size)
        np.testing.assert_array_equal(trits[1], np.tile([-1, 0], 500))


@pytest.mark.parametrize(
    ("method", "options", "problem"),
    [
        ("absmax", {"fraction": -0.1}, "option fraction: -0.1, expected a number from 0 to 1"),
        ("absmax", {"fraction": 1.1}, "option fraction: 1.1"),
        ("absmax", {"fraction": math.nan}, "option fraction: nan"),
        ("absmax", {"fraction": "0.5"}, "option fraction: '0.5'"),
        ("percentile", {"percent": 101}, "option percent: 101, expected a number from 0 to 100"),
        ("meanstd", {"k": math.inf}, "option k: inf, expected a finite number"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        METHODS[method](np.zeros((1, 1), np.float32), **options)
