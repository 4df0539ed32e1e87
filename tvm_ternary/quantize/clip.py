"""Clip weights or activations before they are rounded, by as much as lowers the output error most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.quantize.levels import Floats

SHARES = tuple(float(share) for share in np.linspace(1.0, 0.4, 13))
PERCENTS = (100.0, 99.99, 99.95, 99.9, 99.5, 99.0, 98.0, 95.0)


@dataclass(frozen=True, eq=False)
class WeightClip:
    """What was found for weights.

    Attributes
    ----------
    weight : (N, K) float32
        Clipped.
    share : (N, G) float32
        Of each group's largest magnitude: where it was clipped. 1 where nothing gained.
    """

    weight: Floats
    share: Floats


@dataclass(frozen=True)
class ActivationClip:
    """What was found for activations.

    Attributes
    ----------
    percent : float
        Percentile of all magnitudes at which they are clipped; 100 where nothing gained.
    bound : float
        That magnitude.
    error, plain_error : float
        Mean squared output error over the mean square of the outputs: with it, and without.
    """

    percent: float
    bound: float
    error: float
    plain_error: float


def clip_weights(
    w: Floats,
    group_size: int,
    hessian: Floats,
    round_trip: Callable[[Floats], Floats],
    shares: Sequence[float] = SHARES,
) -> WeightClip:
    """Search for each group the clip that lowers its own output error most.

    The error of a group is d H_g d^T, with d its weights' errors and H_g its block on the diagonal of H: what its part
    of the output loses, by itself. Groups interact through the rest of H, so that is not quite the row's error; it is
    what can be searched group by group.

    Parameters
    ----------
    w : (N, K) float32
    group_size : int
        Columns that share a scale; the last group may be shorter.
    hessian : (K, K) float32
        Mean of x x^T.
    round_trip : callable
        Quantizes an (N, K) matrix and gives back what stands for it; groups must not depend on one another.
    shares : sequence of float
        0 to 1, of each group's largest magnitude; 1, no clip, is always tried first.

    Returns
    -------
    WeightClip

    References
    ----------
    Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978, whose weight clipping this is.
    """
    n, k = w.shape
    groups = max(1, -(-k // group_size))
    blocks = _diagonal_blocks(hessian, group_size, groups)
    padding = ((0, 0), (0, groups * group_size - k))
    grouped = np.pad(w, padding).reshape(n, groups, group_size)
    largest = np.abs(grouped).max(axis=2, initial=0.0)
    best = np.full((n, groups), np.inf, dtype=np.float64)
    chosen = np.ones((n, groups), dtype=np.float32)
    for share in dict.fromkeys((1.0, *shares)):
        bound = (np.float32(share) * largest)[:, :, None]
        clipped = np.clip(grouped, -bound, bound).reshape(n, -1)[:, :k]
        difference = np.pad(round_trip(clipped) - w, padding).reshape(n, groups, group_size).transpose(1, 0, 2)
        error = np.einsum("gnl,gnl->ng", difference @ blocks, difference, dtype=np.float64)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, np.float32(share), chosen)
    bound = (chosen * largest)[:, :, None]
    weight = np.clip(grouped, -bound, bound).reshape(n, -1)[:, :k]
    return WeightClip(np.ascontiguousarray(weight), chosen)


def _diagonal_blocks(hessian: Floats, size: int, groups: int) -> Floats:
    """(G, L, L), the last padded with zeros."""
    blocks = np.zeros((groups, size, size), dtype=np.float32)
    for g in range(groups):
        part = hessian[g * size : (g + 1) * size, g * size : (g + 1) * size]
        blocks[g, : len(part), : len(part)] = part
    return blocks


def clip_activations(
    x: Floats, w: Floats, group_size: int, fitted: Floats | None = None, percents: Sequence[float] = PERCENTS
) -> ActivationClip:
    """Search where activations of 8 bits are best clipped.

    A clipped row has a smaller largest value, so its other values are rounded less; the ones clipped are wrong by more.
    What is measured is x_q V^T against x W^T, with x_q the clipped inputs rounded as the kernels round them.

    Parameters
    ----------
    x : (M, K) float32
        A sample of inputs.
    w : (N, K) float32
    group_size : int
        Columns of a row that share a scale of the activations, as those of the weight do.
    fitted : (N, K) float32, optional
        V, what stands for ``w``; ``w`` itself if left out.
    percents : sequence of float
        Of all magnitudes in x; 100, no clip, is always tried first.

    Returns
    -------
    ActivationClip

    References
    ----------
    McKinstry et al., "Discovering Low-Precision Networks Close to Full-Precision Networks", arXiv:1809.04191, for
    percentiles as bounds.
    """
    fitted = w if fitted is None else fitted
    exact = x @ w.T
    size = float(np.mean(exact * exact, dtype=np.float64)) or 1.0
    magnitude = np.abs(x)
    found: list[ActivationClip] = []
    for percent in dict.fromkeys((100.0, *percents)):
        bound = float(np.percentile(magnitude, percent, method="higher")) if x.size else 0.0
        rounded = round_rows(np.clip(x, -np.float32(bound), np.float32(bound)), group_size)
        difference = rounded @ fitted.T - exact
        error = float(np.mean(difference * difference, dtype=np.float64)) / size if difference.size else 0.0
        found.append(ActivationClip(percent, bound, error, found[0].error if found else error))
    return min(found, key=lambda clip: clip.error)


def round_rows(x: Floats, group_size: int) -> Floats:
    """What int8 rows of the kernels stand for: each group rounded to multiples of its largest magnitude / 127."""
    m, k = x.shape
    groups = max(1, -(-k // group_size))
    grouped = np.pad(x, ((0, 0), (0, groups * group_size - k))).reshape(m, groups, group_size)
    largest: npt.NDArray[np.float32] = np.abs(grouped).max(axis=2, keepdims=True, initial=0.0)
    alive = largest > 0
    codes = np.rint(grouped * (np.float32(127) / np.where(alive, largest, 1)))
    return np.ascontiguousarray((codes * (largest / np.float32(127))).reshape(m, -1)[:, :k], dtype=np.float32)
