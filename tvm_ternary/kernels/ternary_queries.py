"""Queries as trits: what their scores with packed keys are, in numpy, without a kernel's help.

With each block of keys a query is rounded anew, times the block's scales: an element is zero if it is at most half of
the mean magnitude, and the mean magnitude of the others is what a trit stands for, as for ternary activations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def round_to_trits(x: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int8], Doubles]:
    """Trits of rows, and what one stands for.

    Parameters
    ----------
    x : (..., elements)

    Returns
    -------
    trits : (..., elements) int8
    step : (...)
    """
    size = np.abs(np.asarray(x, np.float64))
    some = size > size.mean(-1, keepdims=True) / 2
    step = np.where(some, size, 0).sum(-1) / np.maximum(some.sum(-1), 1)
    return (np.sign(x) * some).astype(np.int8), step


def ternary_scores(
    q: npt.NDArray[np.floating], codes: npt.NDArray[np.int8], key_scale: npt.NDArray[np.floating], scale: float
) -> Doubles:
    """The scores of queries with packed keys.

    Parameters
    ----------
    q : (batch, heads, queries, size)
    codes : (batch, kv heads, blocks, tokens, size)
        Numbers of keys.
    key_scale : (batch, kv heads, blocks, size)
    scale : float
        Of scores.

    Returns
    -------
    (batch, heads, queries, blocks * tokens)
    """
    group = q.shape[1] // codes.shape[1]
    codes, key_scale = (np.repeat(x, group, axis=1) for x in (codes.astype(np.int64), key_scale))
    trits, step = round_to_trits(scale * q[:, :, None] * key_scale[:, :, :, None].astype(np.float64))
    found = (trits.astype(np.int64) @ codes.swapaxes(-1, -2)) * step[..., None]  # (b, h, blocks, queries, tokens)
    return np.asarray(found.swapaxes(2, 3).reshape(*q.shape[:3], -1), np.float64)
