"""The keys and values that a module keeps from run to run: memory for all layers, and how many tokens are in it.

The library's own functions fill the arrays (`tvm_ternary.runtime.manifest.Manifest.caches`). They are told with every
run how many tokens there are, and cut what is beyond; so to cut or to forget is to change a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.runtime.arrays import aligned_empty
from tvm_ternary.runtime.kv_cache import BLOCK, CacheShape
from tvm_ternary.runtime.linear import read_linear
from tvm_ternary.runtime.manifest import CacheInfo, Manifest

DEFAULT_TOKENS = 4096
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True)
class LayerCacheStats:
    """What one attention keeps.

    Attributes
    ----------
    name : str
        The model's input that held its past keys.
    mode : str
    key_planes, value_planes : int
        Of tokens older than the window.
    window : int
        Last tokens that stay in float.
    float_tokens, packed_tokens : int
        Of a sequence, now.
    bytes, float_bytes : int
        Memory taken for all tokens that there may be, and what they would take in float32.
    reason : str
        Why it is as it is.
    """

    name: str
    mode: str
    key_planes: int
    value_planes: int
    window: int
    float_tokens: int
    packed_tokens: int
    bytes: int
    float_bytes: int
    reason: str


@dataclass(frozen=True)
class ModuleCacheStats:
    """What a module keeps.

    Attributes
    ----------
    batch, tokens, capacity : int
        Sequences, 0 before the first run; tokens of each, now and at most.
    bytes, float_bytes : int
        As of the layers, all together.
    layers : tuple of LayerCacheStats
    """

    batch: int
    tokens: int
    capacity: int
    bytes: int
    float_bytes: int
    layers: tuple[LayerCacheStats, ...]


class ModelCache:
    """All caches of a module. Its memory is taken when the first run says how many sequences there are.

    Parameters
    ----------
    infos : sequence of CacheInfo
        At least one.
    tokens : int
        That a sequence may have.
    window : int, optional
        Last tokens that stay in float, a multiple of 64, in place of what the layers say that do not keep all so.
    memory : int or str, optional
        Bytes that all caches may take: a number, or one with ``KiB``, ``MiB`` or ``GiB``. Layers of mode ``adaptive``
        keep as many tokens in float as fit.

    Raises
    ------
    OptionError
        If an option is none of these.
    """

    def __init__(
        self, infos: Sequence[CacheInfo], tokens: int, window: int | None = None, memory: int | str | None = None
    ) -> None:
        if tokens < 1:
            raise OptionError(f"kv_tokens {tokens}", "is too small; expected at least 1")
        if window is not None and (window < 0 or window % BLOCK):
            raise OptionError(f"kv_window {window}", f"is no multiple of {BLOCK}")
        self.capacity = tokens
        self._infos = tuple(
            info if window is None or info.window is None else replace(info, window=window) for info in infos
        )
        self._memory = None if memory is None else read_bytes(memory)
        self._batch, self._length = 0, 0
        self._shapes: list[CacheShape] = []
        self.arrays: list[list[npt.NDArray[Any]]] = []
        batch = infos[0].batch
        self._plan(batch if isinstance(batch, int) else 1)

    @property
    def length(self) -> int:
        """Tokens that each sequence has."""
        return self._length

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first run."""
        return self._batch

    def bytes(self, batch: int = 1) -> int:
        """Memory that all caches take for so many sequences, whatever is in them."""
        return sum(map(_bytes, self._plan(batch)))

    def begin(self, batch: int, tokens: int) -> None:
        """Check that a run may append so many tokens to so many sequences, and take the memory before the first one.

        Raises
        ------
        InputError
            If there are other sequences in it, or no room. It is as before then.
        OptionError
            If so many sequences do not fit into the memory that was given.
        """
        if self._length and batch != self._batch:
            problem = f"has {self._batch} sequences; these inputs have {batch}"
            raise InputError("cache", problem, "call cache.reset() to begin new ones")
        if self._length + tokens > self.capacity:
            problem = f"has {self._length} tokens and room for {self.capacity}; {tokens} more do not fit"
            raise InputError("cache", problem, "reset or truncate it, or load the model with a larger kv_tokens")
        if batch != self._batch:
            self._shapes, self.arrays = self._plan(batch), []
            for shape in self._shapes:
                self.arrays.append([aligned_empty(extents, np.dtype(dtype)) for extents, dtype in shape.arrays])
                for array in self.arrays[-1]:
                    # Also makes the system give the memory now.
                    array.fill(0)
            self._batch = batch

    def advance(self, tokens: int) -> None:
        """Count tokens that a run has appended."""
        self._length += tokens

    def truncate(self, tokens: int) -> None:
        """Keep the first tokens of each sequence.

        Packed blocks stay packed. Where the cut is within one, its tokens up to there become float again in the next
        run, with the values they had been rounded to.

        Raises
        ------
        InputError
            If there are fewer.
        """
        if not isinstance(tokens, int | np.integer) or not 0 <= tokens <= self._length:
            raise InputError("cache", f"cannot be cut to {tokens} tokens; expected 0 to {self._length}")
        self._length = int(tokens)

    def reset(self) -> None:
        """Forget all tokens. The next run may have another number of sequences."""
        self._length = 0

    def tails(self) -> list[npt.NDArray[Any]]:
        """What a run changes of the tokens that were there before: those in float, and the counts."""
        return [array for arrays in self.arrays for array in arrays[-4:]]

    def stats(self) -> ModuleCacheStats:
        """What it holds now, and what was decided for each layer."""
        shapes = self._shapes or self._plan(1)
        layers = tuple(self._layer(info, shape) for info, shape in zip(self._infos, shapes, strict=True))
        total, floats = sum(one.bytes for one in layers), sum(one.float_bytes for one in layers)
        return ModuleCacheStats(self._batch, self._length, self.capacity, total, floats, layers)

    def _layer(self, info: CacheInfo, shape: CacheShape) -> LayerCacheStats:
        # The kernel packs a block as soon as a window and a block are full.
        packed = max(0, self._length - shape.window) // BLOCK * BLOCK
        floats = 4 * shape.batch * shape.kv_heads * (shape.size + shape.value_size) * self.capacity
        return LayerCacheStats(
            info.name,
            info.mode,
            info.key_planes,
            info.value_planes,
            shape.window,
            self._length - packed,
            packed,
            _bytes(shape),
            floats,
            _why(info, shape, self._memory),
        )

    def _plan(self, batch: int) -> list[CacheShape]:
        """The shapes of all caches for so many sequences."""
        shapes = [self._shape(info, batch, info.window) for info in self._infos]
        if self._memory is None:
            return shapes
        least = sum(map(_bytes, shapes))
        if least > self._memory:
            problem = (
                f"is {self._memory} bytes; a batch of {batch} with {self.capacity} tokens each takes {least} at least"
            )
            raise OptionError("kv_memory", problem, "give more, or fewer kv_tokens, or a smaller kv_window")
        # The more tokens stay in float, the more memory: the last window that fits is found by halving.
        low, high = 0, -(-self.capacity // BLOCK)
        while low < high:
            middle = (low + high + 1) // 2
            if sum(map(_bytes, self._widened(batch, middle * BLOCK))) <= self._memory:
                low = middle
            else:
                high = middle - 1
        return self._widened(batch, low * BLOCK)

    def _widened(self, batch: int, window: int) -> list[CacheShape]:
        """With at least this window where a layer leaves it open."""
        windows = [
            max(window, info.window) if info.mode == "adaptive" and info.window is not None else info.window
            for info in self._infos
        ]
        return [self._shape(info, batch, one) for info, one in zip(self._infos, windows, strict=True)]

    def _shape(self, info: CacheInfo, batch: int, window: int | None) -> CacheShape:
        most = -(-self.capacity // BLOCK) * BLOCK
        return CacheShape(
            batch,
            info.kv_heads,
            info.size,
            info.value_size,
            self.capacity,
            info.key_planes,
            info.value_planes,
            most if window is None else min(window, most),
        )


def _bytes(shape: CacheShape) -> int:
    return sum(math.prod(extents) * np.dtype(dtype).itemsize for extents, dtype in shape.arrays)


def _why(info: CacheInfo, shape: CacheShape, memory: int | None) -> str:
    said = info.reason or "as asked for"
    if info.mode == "adaptive" and memory is not None:
        return f"{said}; the memory given keeps {min(shape.window, shape.capacity)} tokens in float"
    return said


def make_cache(
    manifest: Manifest, tokens: int | None, window: int | None, memory: int | str | None
) -> ModelCache | None:
    """The cache of a library, None for one that keeps nothing.

    Raises
    ------
    OptionError
        As of `ModelCache`, or if something is given for a library that keeps nothing, or more tokens than its model
        allows.
    """
    given = {"kv_tokens": tokens, "kv_window": window, "kv_memory": memory}
    if not manifest.caches:
        for name, value in given.items():
            if value is not None:
                problem = f"is for a model that keeps keys and values; {manifest.model.name} does not"
                raise OptionError(name, problem, "compile with --attention ternary-keys-values")
        return None
    past, length = manifest.caches[0].past, str(manifest.caches[0].length)
    most = min((most for dim, most in manifest.bounds.items() if _is_total(dim, past, length)), default=None)
    if tokens is not None and most is not None and tokens > most:
        raise OptionError(f"kv_tokens {tokens}", f"is more than the model allows: {most}")
    return ModelCache(manifest.caches, tokens or most or DEFAULT_TOKENS, window, memory)


def _is_total(dim: str, past: str, length: str) -> bool:
    """Whether a dimension is all tokens: the past and the new ones."""
    formula = read_linear(dim)
    return formula is not None and formula.factors.keys() == {past, length} and formula.offset == 0


def read_bytes(size: int | str) -> int:
    """A size in bytes: a number, or text such as ``512MiB``.

    Raises
    ------
    OptionError
        If it is neither, or not above zero.
    """
    match = _SIZE.fullmatch(str(size).strip())
    found = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
    if found < 1:
        raise OptionError(f"kv_memory {size}", "is no size; expected bytes, or such as 512MiB or 2GiB")
    return found
