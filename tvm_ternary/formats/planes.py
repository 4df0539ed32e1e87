"""Trits to bit planes and back: the canonical form of a ternary matrix."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WORD_BITS = 64


def plane_words(k: int) -> int:
    """64-bit words in a row of K bits."""
    return -(-k // WORD_BITS)


def pack_planes(plus: npt.NDArray[np.bool_], minus: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Pack two boolean matrices into bit planes.

    Parameters
    ----------
    plus, minus : (..., N, K) bool
        Where the trit is +1 and where it is -1.

    Returns
    -------
    (..., 2, N, ceil(K / 64)) uint64
        Plus, then minus; bit i of word j is k = 64 * j + i; bits past K are zero.
    """
    *outer, n, k = plus.shape
    bytes_ = np.zeros((*outer, 2, n, plane_words(k) * WORD_BITS // 8), dtype=np.uint8)
    used = -(-k // 8)
    bytes_[..., 0, :, :used] = np.packbits(plus, axis=-1, bitorder="little")
    bytes_[..., 1, :, :used] = np.packbits(minus, axis=-1, bitorder="little")
    return bytes_.view("<u8").astype(np.uint64, copy=False)


def unpack_planes(planes: npt.NDArray[np.uint64], k: int) -> npt.NDArray[np.int8]:
    """Read trits out of bit planes; the inverse of `pack_planes`.

    Parameters
    ----------
    planes : (..., 2, N, ceil(K / 64)) uint64
    k : int

    Returns
    -------
    (..., N, K) int8
        -1, 0 or 1.
    """
    bytes_ = np.ascontiguousarray(planes).astype("<u8", copy=False).view(np.uint8)
    bits = np.unpackbits(bytes_, axis=-1, count=k, bitorder="little").view(np.int8)
    return np.subtract(bits[..., 0, :, :], bits[..., 1, :, :])
