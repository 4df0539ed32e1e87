"""Attention: out = softmax(scale q k^T + mask) v for every head, float32.

What is computed, and where the elements of its operands lie; how is `schedule.cpu.attention`.

A mask is what is added to scores, or bits, which say of every key whether a query sees it: 64 keys are a word, the
first of them its lowest bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

AXES = "bhld"
"""Batch, head, position, element of a head. An operand's layout is these letters in the order of its dimensions."""

WORD = 64
"""Keys of a word of a mask of bits. Words are int64, for of that TVM has all constants."""


@dataclass(frozen=True)
class Attention:
    """A family of attentions: the same for any batch and lengths.

    Parameters
    ----------
    heads, kv_heads : int
        Heads of the queries, and of the keys and values; each of the latter serves ``heads / kv_heads`` neighbours.
    size, value_size : int
        Elements of a head of queries and keys, and of values.
    scale : float
        What scores are multiplied by.
    query, key, value, out : str
        Layouts, each a permutation of `AXES`.
    mask : str
        The axes that a mask has really, of ``bhms``: batch, head, query and key. Empty where there is no mask. Its
        other dimensions are 1.
    joined : bool
        Whether keys and values are given in two parts, those of the past and new ones behind them. The joined ones are
        then results, too: the past of the next step.
    hidden : float or None
        None where the mask is float32 and added to scores. Else it is `pack_mask`'s words, ``s`` is among its axes, and
        this negative number is added to the scores of keys whose bits are 0.
    """

    heads: int
    kv_heads: int
    size: int
    value_size: int
    scale: float
    query: str = "blhd"
    key: str = "blhd"
    value: str = "blhd"
    out: str = "blhd"
    mask: str = ""
    joined: bool = False
    hidden: float | None = None

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.kv_heads


def pack_mask(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """A mask as bits.

    Parameters
    ----------
    seen : (..., S) bool
        Which keys are seen.

    Returns
    -------
    (..., ceil(S / 64)) int64
        Key s is bit ``s % 64`` of word ``s // 64``; bits behind the last key are 0.
    """
    padded = np.pad(seen, [(0, 0)] * (seen.ndim - 1) + [(0, -seen.shape[-1] % WORD)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<i8").astype(np.int64)


def reference_attention(
    q: npt.NDArray[np.floating],
    k: npt.NDArray[np.floating],
    v: npt.NDArray[np.floating],
    scale: float,
    mask: npt.NDArray[np.floating] | None = None,
) -> npt.NDArray[np.float64]:
    """The definition, in float64.

    Parameters
    ----------
    q : (B, H, M, D)
    k : (B, H / group, S, D)
    v : (B, H / group, S, Dv)
    scale : float
    mask : broadcastable to (B, H, M, S), optional
        Added to the scores. A query all of whose keys have -inf gives zeros.

    Returns
    -------
    (B, H, M, Dv)

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, equation 1.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = scale * q.astype(np.float64) @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = scores + mask.astype(np.float64)
    peak = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(peak), 0.0, peak))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / np.where(total == 0, 1.0, total) @ v)
