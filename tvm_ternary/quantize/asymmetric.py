"""Ternary weights about a mean, w = m + s t, and what of them the format can carry.

A group's mean adds m times the sum of its inputs to an output. A `TernaryTensor` has no such term, so:

- with two planes or more it needs none: a plane of ones with scale m is the mean, exactly (`as_planes`). That plane's
  trits are free to be something else, so that two fitted planes are never worse (`fit_planes` starts from here, too);
- with one plane, what can be kept is what the mean adds on average, as a bias: m times the mean sum of the inputs
  (`as_bias`). What is lost is m^2 times the variance of that sum. Where inputs vary about zero this is nearly all of
  it, and the symmetric fit is the better one; `covariance` gives the metric in which trits are chosen with that bias in
  mind, which covers the mean of a group and any other part of a weight's error that inputs turn into a constant.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_ternary.quantize.levels import Floats
from tvm_ternary.quantize.methods import METHODS

Trits = npt.NDArray[np.int8]
Doubles = npt.NDArray[np.float64]


class AsymmetricFit(NamedTuple):
    """Groups as mean + scale * trits.

    Attributes
    ----------
    trits : (R, L) int8
    scale, mean : (R,) float32
    """

    trits: Trits
    scale: Floats
    mean: Floats


def fit_asymmetric(groups: Floats, *, steps: int = 30) -> AsymmetricFit:
    """Fit mean, scale and trits by turns.

    For given trits, mean and scale solve two equations; for given mean and scale, the best trits are
    clip(round((w - m) / s), -1, 1). Starts are the optimal symmetric fit, with mean 0, and the optimal fit about the
    group's mean; a group goes on from its better one and keeps what lowers its error, so that no group ends above the
    symmetric fit.

    Parameters
    ----------
    groups : (R, L) float32
        Finite.
    steps : int
        At most.

    References
    ----------
    Yan et al., "PT2-LLM: Post-Training Ternarization for Large Language Models", arXiv:2510.03267: the asymmetric
    ternary quantizer and its iterative ternary fitting.
    """
    w = groups.astype(np.float64)
    centre = w.sum(axis=1) / max(1, w.shape[1])
    best = _start(w, np.zeros(len(w)))
    best = _better(w, best, _start(w, centre))
    for _ in range(steps):
        trits, scale, mean = best
        new_scale, new_mean = solve_grid(w, trits, scale, mean)
        found = _round(w, new_scale, new_mean), new_scale, new_mean
        gained = _error(w, *found) < _error(w, *best)
        if not gained.any():
            break
        best = _better(w, best, found)
    trits, scale, mean = best
    limit = float(np.finfo(np.float32).max)
    return AsymmetricFit(
        trits, np.clip(scale, -limit, limit).astype(np.float32), np.clip(mean, -limit, limit).astype(np.float32)
    )


def solve_grid(w: Doubles, trits: Trits, scale: Doubles, mean: Doubles) -> tuple[Doubles, Doubles]:
    """Scale and mean with the least squared error for given trits; the present ones where all trits are the same.

    With n weights: s = (n sum(w t) - sum(t) sum(w)) / (n sum(t^2) - sum(t)^2), and m = (sum(w) - s sum(t)) / n.
    """
    n = w.shape[1]
    ones, squares = trits.sum(axis=1, dtype=np.int64), np.count_nonzero(trits, axis=1)
    total, product = w.sum(axis=1), np.einsum("rl,rl->r", w, trits.astype(np.float64))
    spread = n * squares - ones * ones
    solved = (n * product - ones * total) / np.where(spread > 0, spread, 1)
    scale = np.where(spread > 0, solved, scale)
    return scale, np.where(spread > 0, (total - scale * ones) / max(1, n), mean)


def as_planes(fit: AsymmetricFit) -> tuple[Trits, Floats]:
    """The same as two trit planes, the second all ones: trits (2, R, L) int8 and scale (2, R) float32."""
    return np.stack([fit.trits, np.ones_like(fit.trits)]), np.stack([fit.scale, fit.mean])


def as_bias(mean: Floats, group_size: int, inputs: Floats) -> Floats:
    """What the means of a matrix's groups add to its outputs on average.

    Parameters
    ----------
    mean : (N, G) float32
        Of each group.
    group_size : int
        Columns of a group; the last may be shorter.
    inputs : (K,) float32
        Mean of the inputs.

    Returns
    -------
    (N,) float32
    """
    edges = np.arange(0, len(inputs), group_size)
    return np.asarray(mean.astype(np.float64) @ np.add.reduceat(inputs.astype(np.float64), edges)).astype(np.float32)


def _start(w: Doubles, mean: Doubles) -> tuple[Trits, Doubles, Doubles]:
    # About a mean, a weight may leave float32's range by a factor of 2.
    limit = float(np.finfo(np.float32).max)
    trits, scale = METHODS["optimal"](np.clip(w - mean[:, None], -limit, limit).astype(np.float32))
    return trits, scale.astype(np.float64), mean


def _round(w: Doubles, scale: Doubles, mean: Doubles) -> Trits:
    ratio = (w - mean[:, None]) / np.where(scale != 0, scale, np.inf)[:, None]
    return np.clip(np.rint(ratio), -1, 1).astype(np.int8)


def _error(w: Doubles, trits: Trits, scale: Doubles, mean: Doubles) -> Doubles:
    difference = w - mean[:, None] - scale[:, None] * trits
    return np.asarray(np.einsum("rl,rl->r", difference, difference))


def _better(
    w: Doubles, one: tuple[Trits, Doubles, Doubles], other: tuple[Trits, Doubles, Doubles]
) -> tuple[Trits, Doubles, Doubles]:
    """Of each group the one with less error, the first if equal."""
    taken = _error(w, *other) < _error(w, *one)
    trits = np.where(taken[:, None], other[0], one[0])
    return trits, np.where(taken, other[1], one[1]), np.where(taken, other[2], one[2])
