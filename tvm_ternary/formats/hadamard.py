"""The Walsh-Hadamard transform of rows in blocks: it spreads an outlier over its block and keeps all products.

References
----------
Fino and Algazi, "Unified Matrix Treatment of the Fast Walsh-Hadamard Transform", 1976 (the butterflies); QuaRot
(Ashkboos et al. 2024) and QuIP# (Tseng et al. 2024) for what it does to weights and activations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError

MOST_BLOCK = 4096


def require_block(block: int) -> None:
    """Check a block's size.

    Raises
    ------
    OptionError
        If it is no power of two from 2 to `MOST_BLOCK`.
    """
    if type(block) is not int or not 2 <= block <= MOST_BLOCK or block & (block - 1):
        raise OptionError(f"rotation {block!r}", f"expected a power of two from 2 to {MOST_BLOCK}", "64 suits most")


def hadamard(x: npt.NDArray[np.floating], block: int) -> npt.NDArray[np.floating]:
    """Multiply each whole block of the last axis by the orthonormal matrix (-1)^popcount(i & j) / sqrt(block).

    The matrix is symmetric and its own inverse: twice is the identity, and for matrices x (M, K) and w (N, K) the
    products ``hadamard(x) @ hadamard(w).T`` are those of x and w.

    Parameters
    ----------
    x : (..., K) float
    block : int
        A power of two. What of K is behind the last whole block stays as it is.

    Returns
    -------
    (..., K) float
        Of the same dtype, in which it is computed, in log2(block) additions an element.

    Raises
    ------
    OptionError
        See `require_block`.
    """
    require_block(block)
    result = np.array(x)
    k = result.shape[-1]
    whole = k - k % block
    values = result[..., :whole].reshape(-1, block) * result.dtype.type(block**-0.5)
    half = block // 2
    while half:
        pairs = values.reshape(-1, 2, half)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        half //= 2
    result[..., :whole] = values.reshape(*result.shape[:-1], whole)
    return result


def hadamard_matrix(size: int) -> npt.NDArray[np.float64]:
    """The matrix itself, (size, size) float64."""
    require_block(size)
    index = np.arange(size)
    bits = index[:, None] & index
    odd = np.zeros_like(bits)
    while bits.any():
        odd ^= bits & 1
        bits >>= 1
    return np.asarray((1.0 - 2.0 * odd) * size**-0.5)
