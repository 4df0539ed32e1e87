"""Fit one matrix to a scheme by a recipe, with what calibration gathered about its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats.factors import with_shared_scales
from tvm_ternary.formats.granularity import PerTensor
from tvm_ternary.formats.scheme import SHARED_SCALES, Scheme
from tvm_ternary.formats.ternary import TernaryTensor
from tvm_ternary.quantize.compensate import Metric, first_trits, refit, round_to, row_errors, sweep, with_shift
from tvm_ternary.quantize.exact import recognise
from tvm_ternary.quantize.levels import Floats, Levels
from tvm_ternary.quantize.observers import Statistics
from tvm_ternary.quantize.quantizer import check_matrix, quantization_error, quantize
from tvm_ternary.quantize.recipe import LEVELS, Recipe
from tvm_ternary.quantize.start import start_levels


@dataclass(frozen=True)
class Fit:
    """What a matrix became.

    Attributes
    ----------
    weight : TernaryTensor
    error : float
        Frobenius norm of (ternary - float) over that of float.
    output_error : float or None
        The same of the products with the calibration data, where inputs have drifted against those of the matrix that
        makes up for it; None without data, or where all products are zero.
    plain_output_error : float or None
        What the same scheme gives without compensation; None without.
    notes : tuple of str
        What a user should know.
    """

    weight: TernaryTensor
    error: float
    output_error: float | None = None
    plain_output_error: float | None = None
    notes: tuple[str, ...] = ()


def metric_of(statistics: Statistics, recipe: Recipe) -> Metric:
    """What matrices that share an input share: the damped, factored second moment.

    Parameters
    ----------
    statistics : Statistics
        With a Hessian.
    recipe : Recipe
    """
    assert statistics.hessian is not None
    metric = Metric.of(statistics.hessian, damping=recipe.damping, act_order=recipe.act_order)
    if statistics.drift is None or not recipe.correct_inputs:
        return metric
    return with_shift(metric, statistics.drift, recipe.correct_inputs)


def fit_matrix(
    w: npt.NDArray[np.floating],
    scheme: Scheme,
    recipe: Recipe,
    statistics: Statistics | None = None,
    *,
    metric: Metric | None = None,
    name: str = "matrix",
) -> Fit:
    """Fit a matrix.

    One that is ternary already at the scheme's granularity comes back bit-exact with one plane. Otherwise its levels
    are fitted to the weights, each column weighted by the mean square of its input where that is known; and with
    calibration data and ``recipe.compensate``, trits and scales are chosen for the smallest output error. Should
    compensation end above what plain rounding reaches, which only rounding noise can bring about, the plain result is
    kept and a note says so. With the drift of the inputs known, what is fitted is the matrix that makes up for it.

    Parameters
    ----------
    w : (N, K) float
    scheme : Scheme
    recipe : Recipe
    statistics : Statistics, optional
        Of the inputs, (K,) and (K, K).
    metric : Metric, optional
        `metric_of` the statistics, to share it between matrices.
    name : str
        What errors call the matrix.

    Raises
    ------
    ModelError
        If it is not a matrix, or an element is NaN, infinite or beyond float32.
    """
    check_matrix(np.asarray(w), name)
    exact = recognise(w, (scheme.granularity,))
    if exact is not None:
        note = "all weights are equal in size or zero" if w.size and np.ptp(w) == 0 else "was ternary already"
        return Fit(_shared(exact, scheme), 0.0, 0.0 if statistics is not None else None, notes=(note,))
    w = np.ascontiguousarray(w, dtype=np.float32)
    hessian = statistics.hessian if statistics is not None else None
    if recipe.method != LEVELS:
        plain = quantize(w, scheme, recipe.method)
        return Fit(plain, quantization_error(w, plain), _output_error(w, plain, hessian))
    levels = _start(w, scheme, statistics)
    plain = _tensor(levels, round_to(levels, w), scheme)
    # The one scale of a matrix is no row's own to solve for.
    if statistics is None or hessian is None or not recipe.compensate or isinstance(scheme.granularity, PerTensor):
        return Fit(plain, quantization_error(w, plain), _output_error(w, plain, hessian))
    metric = metric or metric_of(statistics, recipe)
    target = w if metric.shift is None else np.asarray(w + w @ metric.shift, dtype=np.float32)
    fitted = _tensor(*_compensated(target, levels, recipe, metric), scheme)
    before, after = (_output_error(target, weight, hessian) for weight in (plain, fitted))
    notes = _notes(metric, recipe, statistics)
    if before is not None and after is not None and after > before:
        return Fit(plain, quantization_error(w, plain), before, before, (*notes, "compensation brought nothing"))
    return Fit(fitted, quantization_error(w, fitted), after, before, notes)


def _start(w: Floats, scheme: Scheme, statistics: Statistics | None) -> Levels:
    """Levels fitted to the weights; the kernels of some activations take planes with scales of their own."""
    importance = None if statistics is None else _importance(statistics)
    levels = start_levels(w, scheme.planes, scheme.granularity, importance)
    return levels if scheme.activation_bits in SHARED_SCALES else levels.apart()


def _importance(statistics: Statistics) -> Floats:
    """Mean squares of the inputs; what no sample reached counts a little, for a user's data may reach it."""
    square = statistics.square.astype(np.float32)
    mean = float(square.mean()) if square.size else 0.0
    return np.maximum(square, 1e-6 * mean) if mean > 0 else np.ones_like(square)


def _compensated(w: Floats, levels: Levels, recipe: Recipe, metric: Metric) -> tuple[Levels, npt.NDArray[np.uint8]]:
    chosen = first_trits(w, levels, metric)
    for _ in range(recipe.sweeps):
        levels = refit(w, levels, chosen, metric)
        if not sweep(w, levels, chosen, metric):
            break
    return refit(w, levels, chosen, metric), chosen


def _tensor(levels: Levels, chosen: npt.NDArray[np.uint8], scheme: Scheme) -> TernaryTensor:
    scale = levels.plane_scales
    if isinstance(scheme.granularity, PerTensor):
        scale = scale[:, :1]
    weight = TernaryTensor.from_trits(levels.trits(chosen), np.ascontiguousarray(scale), scheme.granularity)
    return _shared(weight, scheme)


def _shared(weight: TernaryTensor, scheme: Scheme) -> TernaryTensor:
    return with_shared_scales(weight) if scheme.activation_bits in SHARED_SCALES else weight


def _output_error(w: Floats, weight: TernaryTensor, hessian: Floats | None) -> float | None:
    """Relative error of the products, None where there are none to compare."""
    if hessian is None:
        return None
    products = float(row_errors(w, hessian).sum())
    # In rows of blocks would save a copy of the matrix; the job's bound of four layers counts it.
    errors = float(row_errors(weight.dequantize() - w, hessian).sum())
    return math.sqrt(max(errors, 0.0) / products) if products > 0 else None


def _notes(metric: Metric, recipe: Recipe, statistics: Statistics) -> tuple[str, ...]:
    notes = []
    if metric.damping > recipe.damping:
        notes.append(f"its inputs are linearly dependent: damped by {metric.damping:g} instead of {recipe.damping:g}")
    if statistics.count < len(statistics.square):
        notes.append(f"only {statistics.count} rows of calibration data for {len(statistics.square)} inputs")
    return tuple(notes)
