"""Take the mean of a matrix's output error out of it, where a bias can carry that."""

from __future__ import annotations

import numpy as np

from tvm_ternary.quantize.levels import Floats


def correct_bias(w: Floats, fitted: Floats, mean: Floats) -> Floats:
    """What to add to the outputs so that their mean over the calibration data is that of the float matrix.

    The error of an output is D x with D = fitted - w, its mean D m; -D m takes that away.

    Parameters
    ----------
    w, fitted : (N, K) float32
    mean : (K,) float32
        m, of the inputs.

    Returns
    -------
    (N,) float32

    References
    ----------
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721,
    section 4.2.
    """
    return np.asarray((w - fitted).astype(np.float64) @ mean.astype(np.float64)).astype(np.float32)


def covariance(hessian: Floats, mean: Floats) -> Floats:
    """The second moment of inputs about their mean: H - m m^T, (K, K) float32.

    With the bias corrected the mean squared output error is tr(D (H - m m^T) D^T). So where there is a bias, this is
    the metric to choose trits in: whatever part of an error is the same for all inputs costs nothing then.

    Parameters
    ----------
    hessian : (K, K) float32
        Mean of x x^T.
    mean : (K,) float32
    """
    wide = mean.astype(np.float64)
    centred = hessian - np.outer(wide, wide)
    # An input that never changes has no variance; rounding must not make it a little negative.
    np.fill_diagonal(centred, np.maximum(np.diag(centred), 0.0))
    return np.asarray(centred, dtype=np.float32)
