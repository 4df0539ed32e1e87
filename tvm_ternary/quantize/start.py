"""The levels that compensation starts from: one scale and small whole factors a group, nearest to its weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats.granularity import Granularity, PerChannel, row_blocks
from tvm_ternary.quantize.levels import Floats, Levels, combinations

FACTORS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,),),
    2: ((1, 3), (2, 3), (9, 26), (20, 29), (9, 14)),
    3: ((1, 3, 9), (2, 6, 9), (4, 6, 9), (8, 22, 25), (5, 7, 8)),
    4: ((1, 3, 9, 27), (2, 6, 18, 27), (4, 6, 18, 27), (6, 9, 14, 27)),
}
"""What the planes of a group may count, at most 63 in sum (`formats.factors`).

Powers of three give evenly spaced levels. The others lie closer together around zero, as weights do: 2 and 3 make 0, 1,
2, 3 and 5. They were chosen one after the other, each as the tuple that lowers the error of 432 groups of 64 from the
matrices of MiniLM-L6 most; together they leave 8, 16 and 18 percent less error than tuples near the powers of three.
"""

_CLIPS = {1: (0.2, 0.9), 2: (0.4, 1.0), 3: (0.5, 1.0), 4: (0.6, 1.0)}
_STEPS = 12


def start_levels(w: Floats, planes: int, granularity: Granularity, importance: Floats | None = None) -> Levels:
    """Fit a scale and factors to each group, by search over where the largest level lies.

    For every tuple of `FACTORS` and each of some shares of the group's largest magnitude that the largest level may
    reach, weights are rounded to the nearest level and the scale is solved for: s = sum(d w q) / sum(d q q), with q the
    whole levels and d the importance. What leaves the smallest sum(d (w - s q)^2) is taken.

    Parameters
    ----------
    w : (N, K) float32
    planes : int
        1 to 4.
    granularity : Granularity
        With `PerTensor` all rows are one group.
    importance : (K,) float32, optional
        Weight of each column's squared error, for example the diagonal of the inputs' second moment; 1 if left out.

    Returns
    -------
    Levels
        With shared scales (1, N, G) and factors (P, N, G).
    """
    n, k = w.shape
    rows, groups = granularity.scale_shape(n, k)
    if rows != n:
        one = start_levels(
            w.reshape(1, -1), planes, PerChannel(), None if importance is None else np.tile(importance, n)
        )
        assert one.factors is not None
        factors = np.broadcast_to(one.factors, (planes, n, 1))
        return Levels(np.broadcast_to(one.scale, (1, n, 1)), factors, planes, max(k, 1))
    size = granularity.group_size(k)
    padding = ((0, 0), (0, groups * size - k))
    weight = np.pad(np.ones((1, k), np.float32) if importance is None else importance[None], padding)
    scale, chosen = np.empty((n, groups), np.float32), np.empty((n, groups), np.intp)
    for part in row_blocks(n, groups * size):
        block = np.pad(w[part], padding).reshape(-1, groups, size)
        scale[part], chosen[part] = _search(block, weight.reshape(1, groups, size), planes)
    factors = np.moveaxis(np.array(FACTORS[planes], dtype=np.int8)[chosen], 2, 0)
    return Levels(scale[None], np.ascontiguousarray(factors), planes, size)


def _search(x: Floats, weight: Floats, planes: int) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Scale and index of the factors of each group of x (R, G, L)."""
    largest = np.abs(x).max(axis=2, initial=0.0)
    best = np.full(largest.shape, np.inf, dtype=np.float32)
    scale, chosen = np.zeros(largest.shape, np.float32), np.zeros(largest.shape, np.intp)
    # In units of the group's largest, so that no square over- or underflows.
    unit = np.where(largest > 0, largest, 1)
    x = np.asarray(x / unit[:, :, None], dtype=np.float32)
    weighted = x * weight
    for index, factors in enumerate(FACTORS[planes]):
        levels = np.unique(combinations(planes) @ np.array(factors)).astype(np.float32)
        for clip in np.linspace(*_CLIPS[planes], _STEPS, dtype=np.float32):
            q = _round(x * (levels[-1] / clip), levels)
            squares = np.einsum("rgl,rgl,zgl->rg", q, q, weight, optimize=True)
            fitted = np.einsum("rgl,rgl->rg", weighted, q) / np.where(squares > 0, squares, 1)
            # The group's own squares, the same for all, are left out.
            error = -fitted * fitted * squares
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, fitted, scale)
            chosen = np.where(better, index, chosen)
    return scale.astype(np.float32) * unit, chosen


def _round(x: Floats, levels: Floats) -> Floats:
    """The nearest of ascending levels."""
    if len(levels) == 2 * levels[-1] + 1:
        return np.clip(np.rint(x), -levels[-1], levels[-1])
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
