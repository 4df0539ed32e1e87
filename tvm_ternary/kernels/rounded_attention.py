"""What attention gives over keys and values that a cache has rounded, for all queries of a text in one pass.

A measure of accuracy in numpy, no kernel. Where attention is causal, a query sees what the cache holds once its own
token is in: older blocks packed, the last tokens in float (`runtime.kv_cache`). What is packed so differs from query to
query, and one pass gives what feeding the tokens one by one gives. Where a query sees later keys too, as in an encoder,
the cache is that of the whole text for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats.hadamard import hadamard
from tvm_ternary.kernels.ternary_keys import BLOCK, dequantize_block, quantize_block

HIDDEN = -1e4
"""Masks from here down hide a key; some exporters add no more than this for it."""

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rounding:
    """How keys and values are kept.

    Parameters
    ----------
    key_planes, value_planes : int
        Ternary planes, 0 for float.
    window : int
        Last tokens that stay in float, a multiple of `BLOCK`. Where attention is not causal, without a window the last
        tokens are packed as a block of fewer: most texts of encoders are shorter than one.
    rotated : bool
        Whether heads are turned by a Hadamard matrix before they are rounded: of the largest power of two that divides
        their size.
    """

    key_planes: int
    value_planes: int
    window: int = BLOCK
    rotated: bool = False


@dataclass(frozen=True)
class Sight:
    """Which keys the queries of a sequence see, and in which state.

    Attributes
    ----------
    keys : (S,) bool
        Those that any query sees: the sequence. Padding is not of it.
    packed : (M,) int
        How many of these, from the first on, are packed for a query.
    visible : (H or 1, M, keys seen) bool
    """

    keys: npt.NDArray[np.bool_]
    packed: npt.NDArray[np.int64]
    visible: npt.NDArray[np.bool_]

    @property
    def pairs(self) -> tuple[int, int]:
        """Of queries and keys they see: those with a packed key, and all."""
        packed = self.visible & (np.arange(self.visible.shape[-1]) < self.packed[:, None])
        return int(packed.sum()), int(self.visible.sum())


def sight(mask: Floats | None, queries: int, keys: int, window: int) -> Sight:
    """Read off a mask what is seen, and of it follow when a cache packs.

    Parameters
    ----------
    mask : (H or 1, M or 1, S or 1), optional
        Added to scores.
    queries, keys : int
        M and S; the queries are the last M tokens where attention is causal.
    window : int
    """
    shown = np.ones((1, queries, keys), bool)
    if mask is not None:
        shown = np.broadcast_to(mask > HIDDEN, (mask.shape[0], queries, keys))
    own = np.arange(queries) + keys - queries
    causal = queries <= keys and not (shown & (np.arange(keys) > own[:, None])).any()
    seen = np.asarray(shown.any((0, 1)))
    tokens = np.cumsum(seen)[own] if causal else np.full(queries, seen.sum())
    packed = np.maximum(tokens - window, 0) // BLOCK * BLOCK if causal or window else tokens
    return Sight(seen, np.asarray(packed, np.int64), shown[..., seen])


def rounded_attention(
    q: Floats, k: Floats, v: Floats, scale: float, mask: Floats | None, rounding: Rounding, seen: Sight
) -> Doubles:
    """softmax(scale q k^T + mask) v of one sequence, where some keys and values are what their planes stand for.

    Parameters
    ----------
    q : (H, M, D)
    k : (H / group, S, D)
    v : (H / group, S, Dv)
    scale : float
    mask : broadcastable to (H, M, S), optional
    rounding : Rounding
    seen : Sight
        Of this mask and the rounding's window.

    Returns
    -------
    (H, M, Dv)
        A query that sees no key gives zeros.
    """
    group = q.shape[0] // k.shape[0]
    q, k, v = (np.asarray(x, np.float32) for x in (q, k[:, seen.keys], v[:, seen.keys]))
    if rounding.rotated:
        q, k, v = map(_turned, (q, k, v))
    shape = len(q), q.shape[1], k.shape[1]
    added = (
        None if mask is None else np.where(seen.visible, mask[..., seen.keys] if mask.shape[-1] > 1 else mask, -np.inf)
    )
    rounded = _rounded(k, rounding.key_planes, -2), _rounded(v, rounding.value_planes, -1)
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for packed in np.unique(seen.packed):
        # All queries that find the cache in one state.
        at = np.flatnonzero(seen.packed == packed)
        keys, values = (
            np.repeat(np.concatenate([of[:, :packed], x[:, packed:]], axis=1, dtype=np.float64), group, axis=0)
            for of, x in zip(rounded, (k, v), strict=True)
        )
        scores = (scale * q[:, at].astype(np.float64)) @ keys.swapaxes(-1, -2)
        if added is not None:
            scores += np.broadcast_to(added, shape)[:, at]
        weights, total = _unnormalized(scores)
        out[:, at] = weights @ values / total
    return np.asarray(_turned(out) if rounding.rotated else out, np.float64)


def _unnormalized(scores: Doubles) -> tuple[Doubles, Doubles]:
    """exp(scores - their largest), in the scores' place, and its sums; 1 where no key is seen."""
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    scores -= np.where(np.isneginf(peak), 0.0, peak)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    return scores, np.where(total == 0, 1.0, total)


def _rounded(x: npt.NDArray[np.float32], planes: int, axis: int) -> Floats:
    """Tokens (heads, tokens, elements) block by block; the last block may be short."""
    if not planes or not x.shape[1]:
        return x
    blocks = np.split(x, range(BLOCK, x.shape[1], BLOCK), axis=1)
    return np.concatenate([dequantize_block(*quantize_block(one, planes, axis), axis) for one in blocks], axis=1)


def _turned(x: Floats) -> Floats:
    """Heads times a Hadamard matrix, which is its own inverse; those of an odd size stay."""
    block = x.shape[-1] & -x.shape[-1]
    return hadamard(x, block) if block > 1 else x
