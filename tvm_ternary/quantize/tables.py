"""Embedding tables in 8 bits: a scale a row, since a row is what is read at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

MOST = 127
"""The largest code; -128 stays unused, so that a row and its negative have the same codes but for the sign."""
# Elements that are worked on at once, so that a table larger than memory's rest is no trouble.
_BLOCK = 1 << 20


def quantize_rows(table: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round each row to the nearest multiples of its largest element / 127.

    Parameters
    ----------
    table : (V, D) float32
        Finite; may be mapped from a file.

    Returns
    -------
    codes : (V, D) int8
        From -127 to 127.
    scale : (V, 1) float32
        ``codes * scale`` is the table, within half a scale of each element, or half and a rounding where float32 holds
        the scale only nearly. 0 for a row of zeros.
    """
    codes = np.empty(table.shape, np.int8)
    scale = np.zeros((table.shape[0], 1), np.float32)
    for rows in _blocks(table.shape):
        exact = table[rows].astype(np.float64)
        step = np.abs(exact).max(axis=1, keepdims=True, initial=0.0) / MOST
        scale[rows] = step
        codes[rows] = np.rint(exact / np.where(step > 0, step, 1.0))
    return codes, scale


def rows_error(table: npt.NDArray[np.float32], codes: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]) -> float:
    """The Frobenius norm of (codes * scale - table) over that of the table; 0 for a table of zeros."""
    lost = size = 0.0
    for rows in _blocks(table.shape):
        exact = table[rows].astype(np.float64)
        lost += float(((codes[rows] * scale[rows].astype(np.float64) - exact) ** 2).sum())
        size += float((exact**2).sum())
    return float(np.sqrt(lost / size)) if size else 0.0


def row_bits(width: int) -> float:
    """Bits an element of a row of so many takes, its scale counted."""
    return 8 + 32 / width


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(_BLOCK // max(shape[1], 1), 1)
    return (slice(first, first + rows) for first in range(0, shape[0], rows))
