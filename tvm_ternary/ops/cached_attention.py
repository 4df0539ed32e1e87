"""Attention of one layer that remembers: ternary keys and values of the past, compiled for this host."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.runtime.arrays import aligned, aligned_empty
from tvm_ternary.runtime.kv_cache import CacheShape, KVCache
from tvm_ternary.schedule.cpu.attention.append import append_tokens
from tvm_ternary.schedule.cpu.attention.packed import Packed, attention_step
from tvm_ternary.schedule.cpu.kernel import build_kernel
from tvm_ternary.schedule.intrinsics import BYTE_DOTS
from tvm_ternary.target import Target, resolve

Floats = npt.NDArray[np.float32]
_TRITS, _BYTES, _FLOATS = 1, 8, 32
"""What ``activation_bits`` may be."""


class CachedAttention:
    """softmax(q k^T / sqrt(size)) v over all tokens so far; made by `cached_attention`.

    Attributes
    ----------
    cache : KVCache
        What it remembers: cut it, reset it, ask how large it is.
    """

    def __init__(self, shape: CacheShape, heads: int, scale: float, activation_bits: int, target: Target) -> None:
        self.heads = heads
        attention = Attention(heads, shape.kv_heads, shape.size, shape.value_size, scale, key="bhld", value="bhld")
        dot = None if activation_bits == _FLOATS else BYTE_DOTS[target.tier]
        packed = Packed(shape.key_planes, shape.value_planes, dot, trits=activation_bits == _TRITS)
        known = (shape.batch, None, shape.blocks, shape.room)
        append = build_kernel(partial(append_tokens, attention, packed, shape.window, known), target)
        self._attend = build_kernel(partial(attention_step, attention, packed, known), target)
        self.cache = KVCache(shape, append, tvm_ffi.from_dlpack)

    def __call__(self, q: Floats, k: Floats, v: Floats) -> Floats:
        """Append tokens to every sequence, and let them attend to all that came before and to themselves.

        Many tokens are done a window at a time, so that each sees those right before it in float. What they see of
        older ones may have been packed a few tokens earlier than if they came one by one.

        Parameters
        ----------
        q : (batch, tokens, heads, size) float32
        k : (batch, tokens, kv_heads, size) float32
        v : (batch, tokens, kv_heads, value_size) float32

        Returns
        -------
        (batch, tokens, heads, value_size) float32

        Raises
        ------
        InputError
            If an array is of another dtype or shape, or a sequence is full; nothing is appended then.
        """
        shape = self.cache.shape
        tokens = q.shape[1] if q.ndim == 4 else 0
        if q.dtype != np.float32 or q.shape != (shape.batch, tokens, self.heads, shape.size) or not tokens:
            wanted = f"expected float32 [{shape.batch}, tokens, {self.heads}, {shape.size}]"
            raise InputError("attention q", f"is {q.dtype} {list(q.shape)}; {wanted}")
        if k.ndim != 4 or k.shape[1] != tokens:
            raise InputError("attention k", f"has shape {list(k.shape)}; expected {tokens} tokens, as q has")
        self.cache.check_room(k, v)
        out = aligned_empty((shape.batch, tokens, self.heads, shape.value_size), np.dtype(np.float32))
        at_once = max(shape.window, 1)
        for start in range(0, tokens, at_once):
            part = np.s_[:, start : start + at_once]
            self.cache.append_block(k[part], v[part])
            result = aligned(out[part])
            query = tvm_ffi.from_dlpack(aligned(q[part]))
            self._attend(query, *self.cache.arguments(shape), tvm_ffi.from_dlpack(result))
            out[part] = result
        return out


def cached_attention(
    heads: int,
    size: int,
    capacity: int,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    value_size: int | None = None,
    planes: int | tuple[int, int] = 2,
    window: int = 64,
    scale: float | None = None,
    activation_bits: int = 8,
    target: str | Mapping[str, Any] = "native",
) -> CachedAttention:
    """Compile attention with a cache of ternary keys and values. All memory is taken here.

    Parameters
    ----------
    heads, size : int
        Of the queries, and elements of each.
    capacity : int
        Tokens that any sequence may have.
    batch : int
        Sequences, each of its own length.
    kv_heads : int, optional
        Heads of keys and values, a divisor of ``heads``. None: as many.
    value_size : int, optional
        Elements of a value's head. None: ``size``.
    planes : int or (int, int)
        Ternary planes, 1 to 3, of keys and of values. Of values 0: they stay float.
    window : int
        Last tokens that stay in float32, a multiple of 64.
    scale : float, optional
        Of the scores. None: 1 / sqrt(size).
    activation_bits : int
        8 rounds queries and weights to bytes, by one scale a row and block; 1 rounds queries to trits, and weights to
        bytes; 32 keeps them.
    target : str or mapping
        As in `tvm_ternary.compile`; it must be a CPU, one that this host can run.

    Returns
    -------
    CachedAttention
        ``y = attention(q, k, v)``; its ``cache`` has ``truncate``, ``reset``, ``lengths``, ``bytes`` and ``stats()``.

    Raises
    ------
    OptionError
        If an option is none of these.
    HostError
        If this host cannot run the target's code.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise OptionError(f"kv_heads {kv_heads}", f"does not divide the {heads} heads of the queries")
    if activation_bits not in (_TRITS, _BYTES, _FLOATS):
        raise OptionError(f"activation_bits {activation_bits}", "does not exist here; expected 1, 8 or 32")
    both = (planes, planes) if isinstance(planes, int) else planes
    if len(both) != 2:
        raise OptionError(f"planes {planes}", "are not for keys and values; expected one number or two")
    of_keys, of_values = both
    values = size if value_size is None else value_size
    shape = CacheShape(batch, kv_heads, size, values, capacity, of_keys, of_values, window)
    resolved = resolve(target)
    if resolved.kind == "cuda":
        raise OptionError(f"target {resolved.name}", "is no CPU; attention with a cache runs on CPUs so far")
    return CachedAttention(shape, heads, size**-0.5 if scale is None else scale, activation_bits, resolved)
