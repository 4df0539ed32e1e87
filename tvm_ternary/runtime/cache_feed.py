"""A model's cache as its runs take it: what lies between inputs and weights, and how many tokens they append."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.runtime.arrays import aligned_empty
from tvm_ternary.runtime.inputs import size_of
from tvm_ternary.runtime.manifest import CacheInfo, TensorSpec
from tvm_ternary.runtime.model_cache import ModelCache


@dataclass(frozen=True)
class _Tensors:
    """The arrays of a cache as tensors, the number of tokens of each sequence before them."""

    arrays: list[list[npt.NDArray[Any]]]
    counts: npt.NDArray[np.int32]
    tensors: list[Any]


class CacheFeed:
    """Gives a cache to runs of a model.

    Parameters
    ----------
    cache : ModelCache
    info : CacheInfo
        Of any of its layers: which dimensions of the inputs are its sequences and what a run appends.
    inputs : sequence of TensorSpec
    """

    def __init__(self, cache: ModelCache, info: CacheInfo, inputs: Sequence[TensorSpec]) -> None:
        self._cache, self._info, self._inputs = cache, info, inputs
        self._now: _Tensors | None = None

    def arguments(
        self,
        arrays: Sequence[npt.NDArray[Any]],
        to_tensor: Callable[[npt.NDArray[Any]], Any],
        to_shape: Callable[[tuple[int, ...]], Any],
    ) -> list[Any]:
        """What `Manifest.caches` says lies between inputs and weights, once there is room for what these append.

        Parameters
        ----------
        arrays : sequence of arrays
            The inputs.
        to_tensor, to_shape : callable
            Make TVM's tensor of an array, and its shape of a tuple. The tensor has to share the array's memory.

        Raises
        ------
        InputError, OptionError
            As of `ModelCache.begin`.
        """
        cache = self._cache
        batch = self._size(self._info.batch, arrays)
        cache.begin(batch, self._new_tokens(arrays))
        if self._now is None or self._now.arrays is not cache.arrays:
            counts = aligned_empty((batch,), np.dtype(np.int32))
            tensors = [to_tensor(array) for one in ([counts], *cache.arrays) for array in one]
            self._now = _Tensors(cache.arrays, counts, tensors)
        self._now.counts.fill(cache.length)
        return [to_shape((cache.length,)), *self._now.tensors]

    def advance(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Count what a run with these inputs has appended."""
        self._cache.advance(self._new_tokens(arrays))

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Runs in here leave the cache as it is: each appends the same tokens again, which are then forgotten."""
        tails = self._cache.tails()
        before = [array.copy() for array in tails]
        try:
            yield
        finally:
            for array, copy in zip(tails, before, strict=True):
                array[...] = copy

    def _new_tokens(self, arrays: Sequence[npt.NDArray[Any]]) -> int:
        return self._size(self._info.length, arrays)

    def _size(self, dim: int | str, arrays: Sequence[npt.NDArray[Any]]) -> int:
        size = size_of(dim, self._inputs, [array.shape for array in arrays])
        assert size is not None, f"a model whose inputs do not say {dim} is not compiled"
        return size
