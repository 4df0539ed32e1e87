"""Fit the scales of several trit planes together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Relative to each diagonal entry of the normal equations: far above float64 rounding, so that two equal planes can be
# solved, and far below float32 rounding, so that the solution does not move.
_RIDGE = 1e-10


def refit_scales(
    groups: npt.NDArray[np.float32], trits: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Choose the scales that bring a sum of trit planes nearest to the weights, trits unchanged.

    Solves (T T' + ridge) s = T w for each group, T the (P, L) trits.

    Parameters
    ----------
    groups : (R, L) float32
        Weights.
    trits : (P, R, L) int8
    scale : (P, R) float32
        What to improve on.

    Returns
    -------
    (P, R) float32
        For each group the solution where it lowers the squared error, else ``scale``. Entries can be negative.

    References
    ----------
    Guo et al., "Network Sketching", arXiv:1706.02021, section 4 (refinement), with ternary instead of binary planes.
    """
    planes, rows, _ = trits.shape
    gram = np.empty((rows, planes, planes), dtype=np.float64)
    target = np.empty((rows, planes), dtype=np.float64)
    for p in range(planes):
        target[:, p] = np.einsum("rl,rl->r", trits[p], groups, dtype=np.float64, casting="same_kind")
        for q in range(p + 1):
            gram[:, p, q] = gram[:, q, p] = (trits[p] * trits[q]).sum(axis=1, dtype=np.int64)
    diagonal = np.einsum("rpp->rp", gram)
    ridge = np.where(diagonal > 0, _RIDGE * diagonal, 1.0)[:, :, None] * np.eye(planes)
    solved = np.linalg.solve(gram + ridge, target[:, :, None])[:, :, 0]
    # A solution beyond float32 becomes infinite; its error is not a number, so it is not taken.
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = solved.astype(np.float32)
        better = _error(gram, target, fitted) < _error(gram, target, scale.T)
    return np.where(better, fitted.T, scale)


def _error(
    gram: npt.NDArray[np.float64], target: npt.NDArray[np.float64], scale: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Squared error of each group, less the sum of squared weights that all scales share: s'Gs - 2 s'T w."""
    s = scale.astype(np.float64)
    return np.asarray(np.einsum("rp,rpq,rq->r", s, gram, s) - 2.0 * np.einsum("rp,rp->r", s, target))
