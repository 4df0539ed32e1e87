"""Trit planes one after the other, each for what those before it left over."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tvm_ternary.quantize.methods import Floats, Result
from tvm_ternary.quantize.refit import refit_scales


def stack_planes(
    groups: Floats, planes: int, ternarize: Callable[[Floats], Result]
) -> tuple[npt.NDArray[np.int8], Floats]:
    """Ternarize groups, then what is left over, ...; then fit the scales of several planes together.

    Parameters
    ----------
    groups : (R, L) float32
    planes : int
        P, at least 1.
    ternarize : callable
        A method, its options bound.

    Returns
    -------
    trits : (P, R, L) int8
    scale : (P, R) float32

    References
    ----------
    Kundu et al., "Ternary Residual Networks", arXiv:1707.04679.
    """
    trits = np.empty((planes, *groups.shape), dtype=np.int8)
    scale = np.empty((planes, len(groups)), dtype=np.float32)
    residual = groups
    for p in range(planes):
        trits[p], scale[p] = ternarize(residual)
        if p + 1 < planes:
            residual = residual - scale[p][:, None] * trits[p]
    return (trits, refit_scales(groups, trits, scale)) if planes > 1 else (trits, scale)
