"""Statistics of transformed inputs against those of inputs that were transformed, and when a transform is chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Scheme
from tvm_ternary.formats.transform import InputTransform
from tvm_ternary.quantize.fit import fit_matrix
from tvm_ternary.quantize.observers import Observer, Statistics
from tvm_ternary.quantize.recipe import Recipe
from tvm_ternary.quantize.transformed import choose_transform, transform_statistics

K = 40
SCALE = np.exp2(np.random.default_rng(1).integers(-3, 4, K)).astype(np.float32)
TRANSFORMS = (InputTransform(SCALE), InputTransform(None, 16), InputTransform(SCALE, 8))


def inputs(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((300, K)) @ generator.standard_normal((K, K)) + generator.standard_normal(K)
    x[:, 3] *= 50
    return x.astype(np.float32)


def observed(x: np.ndarray, original: np.ndarray | None = None) -> Statistics:
    observer = Observer(K)
    observer.update(x, original)
    return observer.statistics()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_are_those_of_transformed_inputs(transform: InputTransform) -> None:
    x, f = inputs(), inputs(1)
    got = transform_statistics(observed(x, f), transform)
    want = observed(transform.apply(x), transform.apply(f))
    for name in ("mean", "square", "hessian", "drift"):
        expected = getattr(want, name)
        np.testing.assert_allclose(getattr(got, name), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert got.count == want.count
    assert (got.absmax >= want.absmax * (1 - 1e-5)).all()
    if transform.rotation is None:
        np.testing.assert_allclose(got.absmax, want.absmax, rtol=1e-6)


def test_without_a_hessian_squares_spread_over_blocks() -> None:
    got = transform_statistics(replace(observed(inputs()), hessian=None), TRANSFORMS[1])
    assert np.ptp(got.square[:16]) <= 1e-3 * got.square[0]
    assert got.square.sum() == pytest.approx(observed(inputs()).square.sum(), rel=1e-4)


def test_nothing_is_chosen_unless_it_is_asked_for() -> None:
    w = np.random.default_rng(0).standard_normal((8, K)).astype(np.float32)
    assert choose_transform([w], Scheme.parse("t1a8g8"), Recipe(), observed(inputs())) is None
    assert choose_transform([w], Scheme.parse("t1a8g8"), Recipe(scaling=True), None) is None
    rotated = choose_transform([w], Scheme.parse("t1a8g8"), Recipe(rotation=8), None)
    assert rotated is not None
    assert (rotated.scale, rotated.rotation) == (None, 8)
    assert choose_transform([w], Scheme.parse("t1a8g8"), Recipe(rotation=64), None) is None, "longer than a row"


def test_a_scale_lowers_the_output_error_where_one_input_is_large() -> None:
    statistics, scheme, recipe = observed(inputs()), Scheme.parse("t2a8g8"), Recipe(scaling=True, compensate=False)
    w = np.random.default_rng(0).standard_normal((32, K)).astype(np.float32)
    transform = choose_transform([w], scheme, recipe, statistics)
    assert transform is not None
    assert transform.scale is not None
    assert (np.log2(transform.scale) % 1 == 0).all()
    scaled = fit_matrix(transform.weight(w), scheme, recipe, transform_statistics(statistics, transform))
    plain = fit_matrix(w, scheme, recipe, replace(statistics, square=np.ones(K, np.float32)))
    assert scaled.output_error < plain.output_error  # type: ignore[operator]
    weight = replace(scaled.weight, transform=transform)
    x = inputs(2)
    products = transform.apply(x) @ replace(weight, transform=None).dequantize().T
    np.testing.assert_allclose(x @ weight.dequantize().T, products, rtol=1e-3, atol=1e-3 * np.abs(products).max())


def test_a_rotation_that_is_no_power_of_two() -> None:
    with pytest.raises(OptionError, match="rotation"):
        Recipe(rotation=12)
