"""Attention: out = softmax(scale q k^T + mask) v for every head, float32.

What is computed, and where the elements of its operands lie; how is `schedule.cpu.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

AXES = "bhld"
"""Batch, head, position, element of a head. An operand's layout is these letters in the order of its dimensions."""


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
        The axes that what is added to scores has really, of ``bhms``: batch, head, query and key. Empty where there is
        no mask. Its other dimensions are 1.
    joined : bool
        Whether keys and values are given in two parts, those of the past and new ones behind them. The joined ones are
        then results, too: the past of the next step.
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

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.kv_heads


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
