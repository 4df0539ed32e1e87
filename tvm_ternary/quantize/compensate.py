"""Choose trits so that a matrix's outputs, not its weights, change least.

With H = mean of x x^T over what a matrix W (N, K) multiplies, its mean squared output error is tr(D H D^T), where
D = V - W and V is what stands for W. Rows are independent; within a row all columns are coupled through H. Starting
from scales that fit the weights, three steps lower that error:

- `first_trits`: columns are rounded one after the other, each taking up what rounding did before it (GPTQ);
- `sweep`: each weight in turn is set to the level that is best while all others stay (coordinate descent);
- `refit`: the scales of a row are solved together for fixed trits (least squares in the metric of H).

The last two never raise the error, so that they can be repeated.

References
----------
Frantar et al., "GPTQ", arXiv:2210.17323, algorithm 1; Behdin et al., "QuantEase", arXiv:2309.01885, eq. (11), for
coordinate descent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tvm_ternary.quantize.levels import Levels

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Metric:
    """The damped second moment of a matrix's inputs, and what is computed from it once for all rows.

    Parameters
    ----------
    hessian : (K, K) float32
        Symmetric, with a positive diagonal.
    order : (K,) int
        In which columns are rounded.
    inverse : (K, K) float32
        Upper triangular Cholesky factor U of the inverse, H^-1 = U^T U, rows and columns in ``order``.
    damping : float
        What was added to the diagonal to make it positive definite, as a share of its mean.
    shift : (K, K) float32 or None
        What is to be added to W, as W shift, so that it makes up for a drift of its inputs.
    """

    hessian: Floats
    order: npt.NDArray[np.intp]
    inverse: Floats
    damping: float
    shift: Floats | None = None

    @classmethod
    def of(cls, hessian: Floats, *, damping: float = 0.01, act_order: bool = True) -> Metric:
        """Damp and factor.

        Parameters
        ----------
        hessian : (K, K) float32
            Mean of x x^T, symmetric and positive semidefinite. An input that is always zero has a zero row and column;
            its weight is then rounded to the nearest level.
        damping : float
            Share of the mean diagonal that is added to it; raised tenfold for as long as the factorization fails.
        act_order : bool
            Whether columns of large inputs are rounded first (GPTQ's ``act_order``), else in their own order.
        """
        diagonal = np.diag(hessian).astype(np.float64)
        mean = float(diagonal.mean()) if diagonal.any() else 1.0
        order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
        share = damping
        while True:
            damped = hessian + np.diag(share * mean + np.where(diagonal > 0, 0.0, mean)).astype(np.float32)
            try:
                inverse = _inverse_factor(damped[np.ix_(order, order)])
                return cls(damped.astype(np.float32), order, inverse, share)
            except np.linalg.LinAlgError:
                share = max(10 * share, 1e-4)


def with_shift(metric: Metric, drift: Floats, share: float) -> Metric:
    """Make up for what quantizing other matrices did to the inputs.

    Where the float model has f, this one has x. The weights V that bring V x nearest to W f solve
    V H = W (mean of f x^T), and so V = W + W drift H^-1 with drift = mean of (f - x) x^T.

    Parameters
    ----------
    metric : Metric
    drift : (K, K) float32
    share : float
        0 to 1, how far to go there. The whole way fits the sample too closely.

    References
    ----------
    Li et al., "GPTAQ", arXiv:2504.02692, eq. (6), for the objective.
    """
    ordered = (drift[:, metric.order] @ metric.inverse.T) @ metric.inverse
    shift = np.empty_like(drift)
    shift[:, metric.order] = np.float32(share) * ordered
    return replace(metric, shift=shift)


def _inverse_factor(hessian: npt.NDArray[np.floating]) -> Floats:
    """U, upper triangular, with H^-1 = U^T U: the inverse of the factor of H taken from its last row upwards."""
    flipped = np.linalg.cholesky(hessian[::-1, ::-1].astype(np.float64))
    # H = B B^T with B = the flipped factor, upper triangular; then H^-1 = B^-T B^-1 and U = B^-1.
    inverse = _inverse_of_lower(flipped)[::-1, ::-1]
    if not np.isfinite(inverse).all():
        raise np.linalg.LinAlgError
    return np.ascontiguousarray(inverse, dtype=np.float32)


def _inverse_of_lower(factor: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The inverse of a lower triangular matrix by halves: a sixth of the operations of a general solution."""
    if len(factor) <= 64:
        return np.tril(np.linalg.solve(factor, np.eye(len(factor))))
    half = len(factor) // 2
    top, bottom = _inverse_of_lower(factor[:half, :half]), _inverse_of_lower(factor[half:, half:])
    inverse = np.zeros_like(factor)
    inverse[:half, :half], inverse[half:, half:] = top, bottom
    inverse[half:, :half] = -bottom @ (factor[half:, :half] @ top)
    return inverse


def round_to(levels: Levels, w: Floats) -> npt.NDArray[np.uint8]:
    """Round each weight of (N, K) to its nearest level: (N, K) uint8."""
    chosen = np.empty(w.shape, dtype=np.uint8)
    for column in range(w.shape[1]):
        chosen[:, column], _ = levels.nearest(np.ascontiguousarray(w[:, column]), column)
    return chosen


def first_trits(w: Floats, levels: Levels, metric: Metric, block: int = 128) -> npt.NDArray[np.uint8]:
    """Round columns in ``metric.order``, each with the errors of those before it made up for.

    Parameters
    ----------
    w : (N, K) float32
    levels : Levels
    metric : Metric
    block : int
        Columns whose errors reach the columns behind them by one product.

    Returns
    -------
    (N, K) uint8
        The chosen level of each weight.
    """
    n, k = w.shape
    chosen = np.empty((n, k), dtype=np.uint8)
    # Transposed, so that a column is contiguous.
    rest = np.ascontiguousarray(w.T[metric.order])
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = np.empty((stop - start, n), dtype=np.float32)
        for j in range(start, stop):
            column = metric.order[j]
            chosen[:, column], value = levels.nearest(rest[j], column)
            errors[j - start] = (rest[j] - value) / metric.inverse[j, j]
            ahead = metric.inverse[j, j + 1 : stop]
            rest[j + 1 : stop] -= ahead[:, None] * errors[j - start]
        rest[stop:] -= metric.inverse[start:stop, stop:].T @ errors
    return chosen


def sweep(w: Floats, levels: Levels, chosen: npt.NDArray[np.uint8], metric: Metric, block: int = 128) -> int:
    """Set each weight in turn to its best level, all others fixed, in place.

    With D the present error, the output error as a function of weight j alone has its minimum at
    v_j - (D H)_j / H_jj, and the nearest level to that is the best one.

    Returns
    -------
    int
        How many weights changed.
    """
    h = metric.hessian
    _, k = w.shape
    value = levels.values(chosen)
    error = np.ascontiguousarray((value - w).T)
    changed = 0
    for start in range(0, k, block):
        stop = min(start + block, k)
        slope = h[start:stop] @ error
        for j in range(start, stop):
            now = error[j] + w[:, j]
            best, target = levels.nearest(now - slope[j - start] / h[j, j], j)
            step = target - now
            moved = best != chosen[:, j]
            if not moved.any():
                continue
            step *= moved
            changed += int(np.count_nonzero(moved))
            chosen[:, j] = np.where(moved, best, chosen[:, j])
            error[j] += step
            slope += h[start:stop, j, None] * step
    return changed


def refit(w: Floats, levels: Levels, chosen: npt.NDArray[np.uint8], metric: Metric) -> Levels:
    """Solve for the scales of each row in the metric of H, trits fixed.

    The value of a row is linear in its scales, V = sum over u of s_u B_u with B_u the trits (or whole levels) that
    scale u multiplies; the minimum of tr(D H D^T) solves (B_u H B_v) s = B_u H w.

    Returns
    -------
    Levels
        With the new scales where they lower a row's error, the old ones elsewhere.
    """
    basis = levels.basis(chosen)
    units, n, k = basis.shape
    groups = levels.groups
    size = levels.group_size
    gram = np.empty((n, units, groups, units, groups), dtype=np.float64)
    edges = np.arange(0, k, size)
    for g in range(groups):
        part = slice(g * size, min((g + 1) * size, k))
        for u in range(units):
            reach = basis[u][:, part].astype(np.float32) @ metric.hessian[part]
            for v in range(units):
                gram[:, u, g, v] = np.add.reduceat(reach * basis[v], edges, axis=1)
    weighted = w @ metric.hessian
    target = np.stack([np.add.reduceat(weighted * b, edges, axis=1) for b in basis], axis=1).astype(np.float64)
    normal = gram.reshape(n, units * groups, units * groups)
    diagonal = np.einsum("nii->ni", normal)
    diagonal += np.where(diagonal > 0, 1e-6 * diagonal, 1.0)
    solved = np.linalg.solve(normal, target.reshape(n, -1, 1)).reshape(n, units, groups)
    fitted = levels.with_scales(np.ascontiguousarray(solved.transpose(1, 0, 2), dtype=np.float32))
    before, after = (row_errors(one.values(chosen) - w, metric.hessian) for one in (levels, fitted))
    return fitted.where(np.isfinite(after) & (after < before), levels)


def row_errors(difference: Floats, hessian: Floats) -> npt.NDArray[np.float64]:
    """The mean squared output error of each row, diag(D H D^T): (N,) float64."""
    return np.asarray(np.einsum("nk,nk->n", difference @ hessian, difference, dtype=np.float64))
