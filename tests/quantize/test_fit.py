"""A matrix fitted as a whole: what comes out, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_ternary.errors import ModelError, OptionError
from tvm_ternary.formats import Scheme, TernaryTensor, with_shared_scales
from tvm_ternary.quantize import quantization_error
from tvm_ternary.quantize.fit import fit_matrix, metric_of
from tvm_ternary.quantize.observers import Observer, Statistics
from tvm_ternary.quantize.recipe import Recipe


def statistics_of(k: int, rows: int = 400, seed: int = 0, rank: int | None = None) -> Statistics:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, rank or k)) @ generator.standard_normal((rank or k, k))
    x *= np.exp(generator.standard_normal(k))
    observer = Observer(k)
    observer.update(x.astype(np.float32))
    return observer.statistics()


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def slow_output_error(w: np.ndarray, weight: TernaryTensor, h: np.ndarray) -> float:
    d, h = weight.dequantize().astype(np.float64) - w, h.astype(np.float64)
    return float(np.sqrt(np.trace(d @ h @ d.T) / np.trace(w @ h @ w.T.astype(np.float64))))


@pytest.mark.parametrize("text", ["t1a8g16", "t2a8g64", "t3a8", "t2a32g16", "t4a16g32", "t2a1g64", "t1a32", "t2a8pt"])
@pytest.mark.parametrize("shape", [(24, 96), (7, 50), (3, 130)])
def test_compensation_beats_plain_fitting(text: str, shape: tuple[int, int]) -> None:
    w, scheme, statistics = weights(*shape), Scheme.parse(text), statistics_of(shape[1])
    assert statistics.hessian is not None
    plain = fit_matrix(w, scheme, Recipe(compensate=False), statistics)
    fit = fit_matrix(w, scheme, Recipe(), statistics)
    assert fit.weight.granularity == scheme.granularity
    assert fit.weight.num_planes == scheme.planes
    assert fit.output_error == pytest.approx(slow_output_error(w, fit.weight, statistics.hessian), rel=1e-3)
    assert fit.error == quantization_error(w, fit.weight)
    if text.endswith("pt"):
        assert fit.output_error == plain.output_error
    else:
        assert fit.plain_output_error == plain.output_error
        assert fit.output_error < 0.9 * plain.output_error  # type: ignore[operator]
    if scheme.activation_bits in (8, 16):
        same = with_shared_scales(fit.weight)
        np.testing.assert_allclose(same.scale, fit.weight.scale, rtol=1e-6)


def test_a_shared_metric_changes_nothing() -> None:
    w, scheme, statistics = weights(8, 64), Scheme.parse("t2a8g16"), statistics_of(64)
    one = fit_matrix(w, scheme, Recipe(), statistics)
    other = fit_matrix(w, scheme, Recipe(), statistics, metric=metric_of(statistics, Recipe()))
    np.testing.assert_array_equal(one.weight.planes, other.weight.planes)
    np.testing.assert_array_equal(one.weight.scale, other.weight.scale)


def test_without_data_weights_are_fitted() -> None:
    fit = fit_matrix(weights(8, 64), Scheme.parse("t2a8g16"), Recipe())
    assert fit.output_error is None
    assert fit.error < 0.25


def test_a_method_of_its_own() -> None:
    w = weights(8, 64)
    fit = fit_matrix(w, Scheme.parse("t1a8g16"), Recipe(method="absmean"), statistics_of(64))
    assert fit.output_error is not None
    assert fit.error > fit_matrix(w, Scheme.parse("t1a8g16"), Recipe()).error


def test_ternary_matrices_come_through_bit_exact() -> None:
    w = np.random.default_rng(0).integers(-1, 2, (8, 64)).astype(np.float32) * np.float32(0.37)
    fit = fit_matrix(w, Scheme.parse("t3a8g16"), Recipe(), statistics_of(64))
    np.testing.assert_array_equal(fit.weight.dequantize(), w)
    assert (fit.error, fit.output_error, fit.weight.num_planes) == (0.0, 0.0, 1)
    assert "ternary already" in fit.notes[0]


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constant_matrices_say_so(value: float) -> None:
    w = np.full((4, 32), value, np.float32)
    fit = fit_matrix(w, Scheme.parse("t2a8g16"), Recipe(), statistics_of(32))
    np.testing.assert_array_equal(fit.weight.dequantize(), w)
    assert "equal" in fit.notes[0]


def test_singular_statistics_are_damped_and_told() -> None:
    statistics = statistics_of(64, rows=10)
    fit = fit_matrix(weights(8, 64), Scheme.parse("t2a8g16"), Recipe(damping=0.0), statistics)
    assert any("damped" in note for note in fit.notes)
    assert any("only 10 rows" in note for note in fit.notes)


def test_inputs_that_are_always_zero() -> None:
    zero = Observer(64)
    zero.update(np.zeros((5, 64), np.float32))
    fit = fit_matrix(weights(8, 64), Scheme.parse("t2a8g16"), Recipe(), zero.statistics())
    assert fit.output_error is None
    assert fit.error < 0.25


def test_one_weight_that_is_not_finite_is_named() -> None:
    w = weights(8, 64)
    w[3, 5] = np.nan
    with pytest.raises(ModelError, match=r"layers\.3: value nan at \[3, 5\]"):
        fit_matrix(w, Scheme.parse("t2a8g16"), Recipe(), name="layers.3")


@pytest.mark.parametrize(
    ("option", "value"), [("method", "best"), ("damping", -1.0), ("damping", float("nan")), ("sweeps", -1)]
)
def test_recipes_out_of_range(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=option):
        Recipe(**{option: value})  # type: ignore[arg-type]
