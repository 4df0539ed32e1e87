"""Ternarization methods: which weights of a group are kept, and the scale that stands for them.

Every method is a pure function ``f(groups, **options) -> (trits, scale)``:

groups : (R, L) float32, finite
    R quantization groups of L weights each.
trits : (R, L) int8
    The sign of each weight kept, 0 for the others.
scale : (R,) float32
    Not negative. A group whose scale is 0 in float32 (all weights are zero, or all but denormal) has zero trits only.

Sums run in float64, so that huge weights do not overflow. Most methods differ in the threshold only and take for the
scale the mean of the kept magnitudes, which is optimal in the least-squares sense for any choice of them: Li, Zhang and
Liu, "Ternary Weight Networks", arXiv:1605.04711, eq. (5).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError

Floats = npt.NDArray[np.float32]
Result = tuple[npt.NDArray[np.int8], Floats]
Method = Callable[..., Result]


def absmean(groups: Floats) -> Result:
    """Round weights to multiples of their mean magnitude: scale = mean|w|, trit = clip(round(w / scale), -1, 1).

    References
    ----------
    Ma et al., "The Era of 1-bit LLMs", arXiv:2402.17764, eq. (1) to (3). Rounding to nearest even makes a trit of
    exactly those weights above half the scale; the paper's epsilon only guards a division that is not made here.
    """
    magnitude = np.abs(groups)
    scale = _mean(magnitude)
    return _assemble(groups, magnitude > 0.5 * scale[:, None], scale)


def twn(groups: Floats) -> Result:
    """Keep weights above 0.7 mean|w|; the scale is the mean magnitude of those kept.

    References
    ----------
    Li, Zhang and Liu, "Ternary Weight Networks", arXiv:1605.04711, section 2: eq. (3) with the rule of thumb for the
    threshold, and eq. (5).
    """
    magnitude = np.abs(groups)
    keep = magnitude > 0.7 * _mean(magnitude)[:, None]
    return _assemble(groups, keep, _mean_kept(magnitude, keep))


def absmax(groups: Floats, *, fraction: float = 0.5) -> Result:
    """Keep weights of at least a fraction of the largest magnitude; the scale is the mean magnitude of those kept.

    Parameters
    ----------
    groups : (R, L) float32
    fraction : float
        0 (keep all but zeros) to 1 (keep the largest only).

    References
    ----------
    Zhu et al., "Trained Ternary Quantization", arXiv:1612.01064, eq. (9), for the threshold.
    """
    _check_option("fraction", fraction, 0.0, 1.0)
    magnitude = np.abs(groups)
    return _keep_from(groups, magnitude, fraction * _largest(magnitude))


def percentile(groups: Floats, *, percent: float = 46.0) -> Result:
    """Keep weights from a percentile of the magnitudes on; the scale is the mean magnitude of those kept.

    Parameters
    ----------
    groups : (R, L) float32
    percent : float
        0 to 100: about this share of each group becomes zero. The default is the share that the least-squares threshold
        of a normal distribution, 0.612 standard deviations, leaves out.

    References
    ----------
    Zhu et al., "Trained Ternary Quantization", arXiv:1612.01064, section 4 (constant sparsity), for the threshold; Max,
    "Quantizing for minimum distortion", IRE Transactions on Information Theory 6(1), 1960, table I (three levels), for
    the default.
    """
    _check_option("percent", percent, 0.0, 100.0)
    magnitude = np.abs(groups)
    if magnitude.size == 0:
        return _keep_from(groups, magnitude, _largest(magnitude))
    return _keep_from(groups, magnitude, np.percentile(magnitude, percent, axis=1).astype(np.float64))


def meanstd(groups: Floats, *, k: float = -0.3) -> Result:
    """Keep weights from mean|w| + k * std|w| on; the scale is the mean magnitude of those kept.

    Parameters
    ----------
    groups : (R, L) float32
    k : float
        Standard deviations of the magnitude above its mean. The default puts the threshold of normally distributed
        weights at the least-squares optimum: 0.612 = 0.798 - 0.3 * 0.603 standard deviations of the weight.

    References
    ----------
    The threshold in standard deviations follows Han et al., "Learning both Weights and Connections for Efficient Neural
    Networks", arXiv:1506.02626, section 3; Max 1960, as for `percentile`, for the default.
    """
    _check_option("k", k, -math.inf, math.inf)
    magnitude = np.abs(groups)
    mean = _mean(magnitude)
    squares = np.einsum("rl,rl->r", magnitude, magnitude, dtype=np.float64) / max(1, magnitude.shape[1])
    # Rounding can put the difference a little below zero where all magnitudes are equal.
    deviation = np.sqrt(np.maximum(squares - mean**2, 0.0))
    return _keep_from(groups, magnitude, mean + k * deviation)


def optimal(groups: Floats) -> Result:
    """Keep what leaves the smallest ||w - s t|| that any scale s and trits t can.

    For given trits the best scale leaves ||w||^2 - (sum of kept |w|)^2 / (number kept), so the best k to keep are the k
    largest, and the best k is where (sum of the k largest)^2 / k has its maximum. One sort finds it, in O(L log L).

    References
    ----------
    Li, Zhang and Liu, "Ternary Weight Networks", arXiv:1605.04711, eq. (5) for the scale and (6) for the maximum.
    """
    magnitude = np.abs(groups)
    if magnitude.size == 0:
        return _keep_from(groups, magnitude, _largest(magnitude))
    ordered = np.sort(magnitude, axis=1)[:, ::-1]
    gain = np.cumsum(ordered, axis=1, dtype=np.float64)
    gain *= gain
    gain /= np.arange(1, gain.shape[1] + 1)
    smallest = np.take_along_axis(ordered, gain.argmax(axis=1)[:, None], axis=1)[:, 0]
    return _keep_from(groups, magnitude, smallest.astype(np.float64))


# What `quantize(method=...)` and the command line accept.
METHODS: dict[str, Method] = {
    "absmean": absmean,
    "twn": twn,
    "absmax": absmax,
    "percentile": percentile,
    "meanstd": meanstd,
    "optimal": optimal,
}


def find_method(name: str) -> Method:
    """Look a method up.

    Raises
    ------
    OptionError
        If there is none of this name; the message lists them.
    """
    if name not in METHODS:
        raise OptionError(f"method {name!r}", f"unknown, expected one of {', '.join(METHODS)}", "the default is twn")
    return METHODS[name]


def _mean(magnitude: Floats) -> npt.NDArray[np.float64]:
    return np.asarray(magnitude.sum(axis=1, dtype=np.float64) / max(1, magnitude.shape[1]))


def _mean_kept(magnitude: Floats, keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    total = (magnitude * keep).sum(axis=1, dtype=np.float64)
    return np.asarray(total / np.maximum(1, np.count_nonzero(keep, axis=1)))


def _largest(magnitude: Floats) -> npt.NDArray[np.float64]:
    return np.asarray(magnitude.max(axis=1, initial=0.0), dtype=np.float64)


def _keep_from(groups: Floats, magnitude: Floats, threshold: npt.NDArray[np.float64]) -> Result:
    """Keep nonzero weights from a threshold on, the largest in any case, with their mean magnitude for the scale."""
    # A group of equal magnitudes, or a threshold above all, would otherwise lose everything.
    threshold = np.minimum(threshold, _largest(magnitude))
    keep = (magnitude >= threshold[:, None]) & (magnitude > 0)
    return _assemble(groups, keep, _mean_kept(magnitude, keep))


def _assemble(groups: Floats, keep: npt.NDArray[np.bool_], scale: npt.NDArray[np.float64]) -> Result:
    """Give kept weights their sign, and groups whose scale vanishes in float32 no trits."""
    rounded = scale.astype(np.float32)
    trits = (keep & (rounded != 0)[:, None]).astype(np.int8)
    np.negative(trits, out=trits, where=groups < 0)
    return trits, rounded


def _check_option(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high):
        wanted = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
        raise OptionError(f"option {name}", f"{value!r}, expected {wanted}", "leave it out for the default")
