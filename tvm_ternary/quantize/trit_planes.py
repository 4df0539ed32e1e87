"""All planes of a group together: w = sum over p of s_p t_p, by turns the best trits and the best scales.

For given scales a weight's best trits are those of the nearest of the 3^P levels, whatever its importance; for given
trits the best scales solve P equations. Neither step can raise the error, so the two converge.

Levels lie symmetric about zero, so magnitudes are enough; and once a group's are in order, the weights of a level are a
range whose count and sum are differences of prefix sums. A step then costs P 3^P log L a group instead of 3^P L.

References
----------
Xiao et al., "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models", arXiv:2509.16989: rows in
groups, the scales by ridge regression, A = S^T S + lambda I with lambda raised where A is ill-conditioned, and trits by
search of all combinations. There are two planes there, up to four here. For whole factors the same holds with one
unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_ternary.quantize.asymmetric import fit_asymmetric
from tvm_ternary.quantize.levels import Floats
from tvm_ternary.quantize.magnitudes import Doubles, Magnitudes, Moments, half_combinations
from tvm_ternary.quantize.methods import METHODS
from tvm_ternary.quantize.stack import stack_planes
from tvm_ternary.quantize.start import FACTORS

_RIDGE = 1e-12
_CONDITION = 1e10
_TOLERANCE = 1e-5
"""Relative gain of a step below which a group counts as converged."""
# Where the largest level of a start may lie, as shares of the largest weight.
_REACH = {planes: np.linspace(low, 1, 9) for planes, low in {1: 0.3, 2: 0.5, 3: 0.5, 4: 0.7}.items()}
# Weights that are worked on at once: their sorted magnitudes and sums stay in a core's cache.
_BLOCK = 1 << 16

Solve = Callable[[Moments, Doubles], Doubles]
"""New scales (R, P) from moments and the present scales."""


class PlaneFit(NamedTuple):
    """Planes fitted to groups.

    Attributes
    ----------
    trits : (P, R, L) int8
    scale : (P, R) float32
    objective : (T,) float64
        Sum over all groups of importance * (w - fitted)^2, at the start and after each step; it never rises.
    """

    trits: npt.NDArray[np.int8]
    scale: Floats
    objective: Doubles


def fit_planes(
    groups: Floats, planes: int, *, importance: Floats | None = None, whole: bool = False, steps: int = 40
) -> PlaneFit:
    """Fit the planes of each group.

    Starts are the greedy fits of `stack_planes` by ``twn`` and ``optimal``, some widths of each tuple of `FACTORS` and,
    for two planes, a ternary plane about a mean; each group goes on from its best one. Hence no group ends above what
    those leave, up to the rounding of scales to float32.

    Parameters
    ----------
    groups : (R, L) float32
        Finite.
    planes : int
        P, 1 to 4.
    importance : (L,) or (R, L) float32, optional
        Weight of each squared error, not negative; for example the mean square of a column's input. 1 if left out.
    whole : bool
        Whether the scales of a group must be one scale times one of the tuples `FACTORS`, as kernels of integers want
        (`formats.factors`). Starts are then those of `FACTORS` only.
    steps : int
        At most; a group stops where it gains less than 1e-5 of its error.

    Returns
    -------
    PlaneFit
    """
    trits = np.empty((planes, *groups.shape), dtype=np.int8)
    scale = np.empty((planes, len(groups)), dtype=np.float32)
    objective = np.zeros(steps + 1)
    last = 0
    whole = whole and planes > 1  # One plane has one scale.
    count = max(1, _BLOCK // max(1, groups.shape[1]))
    for start in range(0, len(groups), count):
        rows = slice(start, start + count)
        weight = importance if importance is None or importance.ndim == 1 else importance[rows]
        ordered = Magnitudes.of(groups[rows], weight)
        first = _whole_start(ordered, planes) if whole else _free_start(groups[rows], ordered, planes)
        fitted, history = _alternate(ordered, first, _along if whole else _ridge, steps)
        objective += np.pad(history, (0, steps + 1 - len(history)), mode="edge")
        last = max(last, len(history))
        # Trits are those of the rounded scales.
        scale[:, rows] = fitted.T
        trits[:, rows] = ordered.trits(scale[:, rows].T.astype(np.float64))
    return PlaneFit(trits, scale, objective[: max(last, 1)])


def _free_starts(groups: Floats, ordered: Magnitudes, planes: int) -> Iterator[Doubles]:
    for method in ("twn", "optimal"):
        _, scale = stack_planes(groups, planes, METHODS[method])
        yield scale.T.astype(np.float64)
    if planes == 2:
        about_mean = fit_asymmetric(groups)
        yield np.stack([about_mean.scale, about_mean.mean], axis=1).astype(np.float64)
    yield _whole_start(ordered, planes)


def _free_start(groups: Floats, ordered: Magnitudes, planes: int) -> Doubles:
    """For each group the start with the least error, each moved to its best multiple: what counts is its shape."""
    best = np.full(len(groups), np.inf)
    scale = np.zeros((len(groups), planes))
    for start in _free_starts(groups, ordered, planes):
        moments = ordered.moments(start)
        moved = _along(moments, start)
        error = moments.error(moved)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better[:, None], moved, scale)
    return scale


def _whole_start(ordered: Magnitudes, planes: int) -> Doubles:
    """The same over widths of all tuples."""
    best = np.full(len(ordered.sorted), -1.0)
    scale = np.zeros((len(best), planes))
    for factors in FACTORS[planes]:
        shape = np.array(factors, dtype=np.float64)
        levels = np.unique(np.abs(half_combinations(planes) @ shape))
        for reach in _REACH[planes]:
            moved, gain = ordered.best_multiple(levels, reach / levels[-1] * ordered.largest)
            better = gain > best
            best, scale = np.where(better, gain, best), np.where(better[:, None], moved[:, None] * shape, scale)
    return scale


def _alternate(ordered: Magnitudes, scale: Doubles, solve: Solve, steps: int) -> tuple[Doubles, Doubles]:
    """Take turns until no group gains: scales (R, P) and the sum of errors before and after each step."""
    moments = ordered.moments(scale)
    error = moments.error(scale)
    history = [error.sum()]
    rows = np.arange(len(scale))
    for _ in range(steps):
        old = scale[rows]
        new = solve(moments, old)
        solved = moments.error(new)
        # Ridge and rounding can make a solution worse than what it starts from; beyond float32 there is no scale.
        taken = (solved < error[rows]) & (np.abs(new).max(axis=1) <= np.finfo(np.float32).max)
        rows, new = rows[taken], new[taken]
        moments = ordered.moments(new, rows)
        gained = np.minimum(moments.error(new), solved[taken])
        going = gained < error[rows] * (1 - _TOLERANCE)
        scale[rows], error[rows] = new, gained
        history.append(error.sum())
        rows, moments = rows[going], moments.take(going)
        if not len(rows):
            break
    return scale, np.array(history)


def _along(moments: Moments, scale: Doubles) -> Doubles:
    """The best multiple of the present scales: f (f t) / (f G f)."""
    square = np.einsum("rp,rpq,rq->r", scale, moments.gram, scale)
    ratio = np.einsum("rp,rp->r", scale, moments.target) / np.where(square > 0, square, 1.0)
    return scale * np.where(square > 0, ratio, 1.0)[:, None]


def _ridge(moments: Moments, scale: Doubles) -> Doubles:
    """Solve (G + lambda I) s = t, lambda raised for as long as the condition is above 1e10 (equal or empty planes)."""
    planes = scale.shape[1]
    size = np.trace(moments.gram, axis1=1, axis2=2) / planes
    eye = np.eye(planes)
    damping = _RIDGE * np.where(size > 0, size, 1.0)
    while True:
        damped = moments.gram + damping[:, None, None] * eye
        inverse = np.linalg.inv(damped)
        condition = np.linalg.norm(damped, axis=(1, 2)) * np.linalg.norm(inverse, axis=(1, 2))
        poor = condition > _CONDITION
        if not poor.any():
            return np.asarray(np.einsum("rpq,rq->rp", inverse, moments.target))
        damping = np.where(poor, damping * np.maximum(10.0, np.sqrt(condition / _CONDITION)), damping)
