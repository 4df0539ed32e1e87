"""Scale inputs so that what matters most in a weight is rounded least: activation-aware scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_ternary.errors import LayoutError
from tvm_ternary.quantize.compensate import row_errors
from tvm_ternary.quantize.levels import Floats
from tvm_ternary.quantize.observers import Statistics

# An input that is always nearly zero must not get a scale that overflows; scales stay within this of one another.
_RANGE = 1e4
_STEPS = 11


@dataclass(frozen=True, eq=False)
class Scaling:
    """What was found.

    Attributes
    ----------
    input_scale : (K,) float32
        What inputs are to be multiplied by, positive; columns of the weights are then to be divided by it. All ones
        where nothing was better.
    exponents : (float, float)
        a and b of `search_scaling`.
    error, plain_error : float
        tr(D H D^T) over that of zero weights, on the rows that were tried; with this scale, and without.
    """

    input_scale: Floats
    exponents: tuple[float, float]
    error: float
    plain_error: float


def search_scaling(
    weights: Sequence[Floats], statistics: Statistics, round_trip: Callable[[Floats], Floats], *, rows: int = 256
) -> Scaling:
    """Search the scale of an input with which its matrices lose least when rounded.

    Column k of every weight is multiplied by s_k = x_k^a / w_k^b before rounding, and the input divided by it. With a
    above 0, weights that meet large inputs are large in their groups, so that they are rounded with a smaller relative
    error; b > 0 evens out what is large in the weights themselves. All a from 0 to 1 in steps of 0.1 are tried with
    b = 0 and with b = 1 - a.

    Parameters
    ----------
    weights : sequence of (N_i, K) float32
        All matrices that read the input: they share its scale.
    statistics : Statistics
        Of the input, with a Hessian.
    round_trip : callable
        Quantizes a matrix (R, K) and gives back what stands for it; rows must not depend on one another.
    rows : int
        Of each matrix at most so many, spread evenly, are tried.

    Returns
    -------
    Scaling

    Raises
    ------
    LayoutError
        If a weight has another K.

    References
    ----------
    Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978, eq. (4) and (5), where x_k is the mean
    magnitude of an input; here it is the root of its mean square, which observers keep. The division by w_k, and the
    normalisation by sqrt(max(s) min(s)), are those of the authors' code.
    """
    assert statistics.hessian is not None
    hessian = statistics.hessian
    for w in weights:
        if w.shape[1] != len(hessian):
            raise LayoutError("weights", f"shape {w.shape}, expected {len(hessian)} columns as the input has")
    tried = np.concatenate([w[np.linspace(0, len(w) - 1, min(rows, len(w))).astype(np.intp)] for w in weights])
    size = float(row_errors(tried, hessian).sum()) or 1.0

    def error(scale: Floats) -> float:
        return float(row_errors(round_trip(tried * scale) / scale - tried, hessian).sum()) / size

    best = np.ones(len(hessian), dtype=np.float32)
    plain = least = error(best)
    exponents = (0.0, 0.0)
    inputs = np.sqrt(statistics.square)
    largest = np.max([np.abs(w).max(axis=0, initial=0.0) for w in weights], axis=0)
    for a in np.linspace(0, 1, _STEPS):
        for b in dict.fromkeys((0.0, round(1 - a, 12))):
            scale = _scale(inputs, largest, float(a), b)
            if (found := error(scale)) < least:
                best, least, exponents = scale, found, (float(a), b)
    return Scaling((1 / best).astype(np.float32), exponents, least, plain)


def _scale(inputs: Floats, largest: Floats, a: float, b: float) -> Floats:
    """x^a / w^b, normalised; 1 for columns without inputs or weights."""
    alive = (inputs > 0) & (largest > 0)
    if not alive.any():
        return np.ones_like(inputs)
    power = a * np.log(inputs[alive], dtype=np.float64) - b * np.log(largest[alive], dtype=np.float64)
    power -= (power.max() + power.min()) / 2
    scale = np.ones(len(inputs))
    scale[alive] = np.exp(np.clip(power, -np.log(_RANGE) / 2, np.log(_RANGE) / 2))
    return scale.astype(np.float32)
