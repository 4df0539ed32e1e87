"""The ternary keys and values of one layer: memory that is all there before the first token, and what fills it.

Tokens that are older than a window lie in packed blocks, the others in float in a tail. Compiled functions do the work:
one that appends (and cuts) in place, and one that reads the whole in a step of decoding, with `KVCache.arguments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.runtime.arrays import aligned, aligned_empty, can_be_read_in_place

BLOCK = 64
"""Tokens of a packed block."""

_LANES = 16
_PLANES = {"key_planes": (1, 2, 3), "value_planes": (0, 1, 2, 3)}
_FULL = "cut it to fewer tokens, or make a cache of a larger capacity"


@dataclass(frozen=True)
class CacheShape:
    """What a cache holds, and what functions must be compiled for to work on it.

    Parameters
    ----------
    batch : int
        Sequences.
    kv_heads, size, value_size : int
        Heads of keys and values, elements of a key's and of a value's.
    capacity : int
        Tokens that any sequence may have.
    key_planes, value_planes : int
        1 to 3: ternary planes of a number. Values may have none: then they stay float in blocks, too.
    window : int
        Tokens that stay in float, a multiple of `BLOCK`.

    Raises
    ------
    OptionError
        If a number is none of these.
    """

    batch: int
    kv_heads: int
    size: int
    value_size: int
    capacity: int
    key_planes: int = 2
    value_planes: int = 2
    window: int = BLOCK

    def __post_init__(self) -> None:
        for name in ("batch", "kv_heads", "size", "value_size", "capacity"):
            if getattr(self, name) < 1:
                raise OptionError(f"cache {name} {getattr(self, name)}", "is too small; expected at least 1")
        for name, planes in _PLANES.items():
            if getattr(self, name) not in planes:
                expected = f"expected {planes[0]} to {planes[-1]}"
                raise OptionError(f"cache {name} {getattr(self, name)}", f"does not exist; {expected}")
        if self.window < 0 or self.window % BLOCK:
            raise OptionError(f"cache window {self.window}", f"is no multiple of {BLOCK}")

    @property
    def blocks(self) -> int:
        """The most packed blocks of a sequence; at least one, so that no array is empty."""
        return max(1, (self.capacity - self.window) // BLOCK)

    @property
    def room(self) -> int:
        """Tokens in float that a sequence has memory for."""
        return self.window + BLOCK

    @property
    def arrays(self) -> list[tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of the arguments: key words, their scale, value words, theirs, both tails, both counts.

        Values without planes are one array in place of words and scale.
        """
        outer = (self.batch, self.kv_heads)
        blocks = (*outer, self.blocks)
        keys = _words(BLOCK, self.size, self.key_planes)
        values = _words(self.value_size, BLOCK, self.value_planes)
        return [
            *(((*blocks, *words), "uint32") for words in keys),
            ((*blocks, self.size), "float32"),
            *(((*blocks, *words), "uint32") for words in values),
            ((*blocks, BLOCK) if self.value_planes else (*blocks, BLOCK, self.value_size), "float32"),
            ((*outer, self.room, self.size), "float32"),
            ((*outer, self.room, self.value_size), "float32"),
            *[((self.batch,), "int32")] * 2,
        ]


def _words(rows: int, terms: int, planes: int) -> list[tuple[int, int, int]]:
    """A word has 16 terms of one plane, or 8 of two."""
    in_words = [*([16] if planes % 2 else []), *([8] if planes > 1 else [])]
    return [(-(-rows // _LANES), -(-terms // count), _LANES) for count in in_words]


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds.

    Attributes
    ----------
    tokens, blocks, recent : tuple of int
        Of each sequence: all tokens, packed blocks, and tokens in float.
    capacity : int
        Tokens that a sequence may have.
    bytes : int
        Memory taken, whatever is in it.
    used_bytes : int
        Of it, what blocks, their scales and tokens in float take.
    float_bytes : int
        What the same tokens take in float32.
    """

    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    recent: tuple[int, ...]
    capacity: int
    bytes: int
    used_bytes: int
    float_bytes: int


class KVCache:
    """The keys and values of one layer for a batch of sequences, each of its own length.

    Not for use by two threads at once.

    Parameters
    ----------
    shape : CacheShape
    append : callable
        The compiled function ``(k, v, past, *arguments)`` of `schedule.cpu.attention.append.append_tokens`, for tails
        of the layout ``bhld`` and new tokens of ``blhd``.
    tensor : callable
        A numpy array -> a tensor on the same memory, which the function takes: ``tvm_ffi.from_dlpack``.
    """

    def __init__(self, shape: CacheShape, append: Callable[..., Any], tensor: Callable[..., Any]) -> None:
        self.shape, self._append, self._tensor = shape, append, tensor
        self._arrays = [aligned_empty(extents, np.dtype(dtype)) for extents, dtype in shape.arrays]
        for array in self._arrays:
            # Also makes the system give the memory now.
            array.fill(0)
        self._full, self._recent = self._arrays[-2:]
        self._tensors = [tensor(array) for array in self._arrays]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.asarray(self._full.astype(np.int64) * BLOCK + self._recent, np.int64)

    @property
    def bytes(self) -> int:
        """Memory taken; it does not grow."""
        return sum(array.nbytes for array in self._arrays)

    def arguments(self, shape: CacheShape) -> list[Any]:
        """The tensors for a function that was compiled for caches of a shape, in the order of `CacheShape.arrays`.

        Raises
        ------
        InputError
            If this cache is of another.
        """
        if shape != self.shape:
            raise InputError("cache", f"is {self.shape}; expected {shape}", "make a cache of that shape")
        return list(self._tensors)

    def append(self, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> None:
        """Append one token to each sequence.

        Parameters
        ----------
        k, v : (batch, kv_heads, size), (batch, kv_heads, value_size) float32

        Raises
        ------
        InputError
            If an array is of another dtype or shape, or a sequence is full. The cache is as before then.
        """
        shape = self.shape
        self._check("k", k, (shape.batch, shape.kv_heads, shape.size))
        self._check("v", v, (shape.batch, shape.kv_heads, shape.value_size))
        self._call(k[:, None], v[:, None], self.lengths)

    def append_block(self, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> None:
        """Append some tokens to each sequence: what appending one after another leaves, bit for bit.

        Parameters
        ----------
        k, v : (batch, tokens, kv_heads, size), (batch, tokens, kv_heads, value_size) float32

        Raises
        ------
        InputError
            As of `append`.
        """
        self.check_room(k, v)
        self._call(k, v, self.lengths)

    def check_room(self, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> None:
        """Refuse what `append_block` would, and append nothing."""
        shape, tokens = self.shape, k.shape[1] if k.ndim == 4 else 0
        self._check("k", k, (shape.batch, tokens, shape.kv_heads, shape.size))
        self._check("v", v, (shape.batch, tokens, shape.kv_heads, shape.value_size))
        self._fits(self.lengths, tokens)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first tokens of each sequence.

        Packed blocks stay packed. Where a length ends within one, its tokens up to there become float again, with the
        values they had been rounded to.

        Raises
        ------
        InputError
            If there is not one length for each sequence, or one is below zero or above what the sequence has.
        """
        have = self.lengths
        keep = np.asarray(lengths)
        if keep.shape != have.shape or keep.dtype.kind not in "iu":
            raise InputError("cache lengths", f"are {lengths}; expected {self.shape.batch} whole numbers")
        for b, (got, most) in enumerate(zip(keep.tolist(), have.tolist(), strict=True)):
            if not 0 <= got <= most:
                raise InputError(f"cache sequence {b}", f"cannot be cut to {got} tokens; expected 0 to {most}")
        self._call(_no_tokens(self.shape, self.shape.size), _no_tokens(self.shape, self.shape.value_size), keep)

    def reset(self, sequence: int | None = None) -> None:
        """Forget the tokens of one sequence, or of all.

        Raises
        ------
        InputError
            If there is no such sequence.
        """
        if sequence is not None and not 0 <= sequence < self.shape.batch:
            raise InputError(f"cache sequence {sequence}", f"does not exist; expected 0 to {self.shape.batch - 1}")
        for counts in (self._full, self._recent):
            counts[slice(None) if sequence is None else sequence] = 0

    def stats(self) -> CacheStats:
        """What it holds now."""
        shape, lengths = self.shape, self.lengths
        # One block of one sequence, all heads: words and scales are what comes before the tails and counts.
        block = sum(array.nbytes for array in self._arrays[:-4]) // (shape.batch * shape.blocks)
        token = 4 * shape.kv_heads * (shape.size + shape.value_size)
        return CacheStats(
            tuple(lengths.tolist()),
            tuple(self._full.tolist()),
            tuple(self._recent.tolist()),
            shape.capacity,
            self.bytes,
            int(self._full.sum()) * block + int(self._recent.sum()) * token,
            int(lengths.sum()) * token,
        )

    def _call(self, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32], keep: npt.NDArray[Any]) -> None:
        tokens = k.shape[1]
        self._fits(keep, tokens)
        new = [x if can_be_read_in_place(x) or not tokens else aligned(x) for x in (k, v)]
        self._append(*map(self._tensor, [*new, aligned(keep.astype(np.int32))]), *self._tensors)

    def _fits(self, lengths: npt.NDArray[Any], tokens: int) -> None:
        for b, past in enumerate(lengths.tolist()):
            if past + tokens > self.shape.capacity:
                problem = f"has {past} tokens and room for {self.shape.capacity}; {tokens} more do not fit"
                raise InputError(f"cache sequence {b}", problem, _FULL)

    def _check(self, name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
        if array.dtype != np.float32 or array.shape != shape:
            expected = f"expected float32 {list(shape)}"
            raise InputError(f"cache {name}", f"is {array.dtype} {list(array.shape)}; {expected}")


def _no_tokens(shape: CacheShape, size: int) -> npt.NDArray[np.float32]:
    """With the strides that compiled code takes for compact; those of numpy have a 0 counted as 1."""
    extents, row = (shape.batch, 0, shape.kv_heads, size), 4 * shape.kv_heads * size
    empty = aligned_empty(extents, np.dtype(np.float32))
    return np.lib.stride_tricks.as_strided(empty, extents, (0, row, 4 * size, 4))
