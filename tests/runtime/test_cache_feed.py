"""What a run is given of a cache: how many tokens there are, and its arrays, which stay the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tvm_ternary.errors import InputError
from tvm_ternary.runtime.cache_feed import CacheFeed
from tvm_ternary.runtime.manifest import CacheInfo, TensorSpec
from tvm_ternary.runtime.model_cache import ModelCache

INFO = CacheInfo("past", "value", "batch", "past", "new", 2, 8, 8, "ternary-keys-values", 2, 2, 64, False)


def given(feed: CacheFeed, batch: int, new: int) -> list[Any]:
    return feed.arguments([np.zeros((batch, new))], lambda array: array, tuple)


def test_arguments_are_the_length_the_counts_and_the_arrays() -> None:
    cache = ModelCache([INFO], 100)
    feed = CacheFeed(cache, INFO, [TensorSpec("x", "float64", ("batch", "new"))])
    length, counts, *arrays = given(feed, 3, 5)
    assert (length, counts.tolist(), len(arrays)) == ((0,), [0, 0, 0], len(cache.arrays[0]))
    feed.advance([np.zeros((3, 5))])
    again = given(feed, 3, 1)
    assert (again[0], again[1].tolist()) == ((5,), [5, 5, 5])
    assert all(one is other for one, other in zip(again[1:], [counts, *arrays], strict=True))
    with pytest.raises(InputError, match="has 5 tokens and room for 100; 96 more do not fit"):
        given(feed, 3, 96)
    cache.reset()
    # Other sequences have arrays of their own.
    assert given(feed, 2, 1)[1].tolist() == [0, 0]


def test_a_run_may_append_a_multiple_of_what_is_given() -> None:
    info = replace(INFO, length="pairs * 2")
    cache = ModelCache([info], 100)
    feed = CacheFeed(cache, info, [TensorSpec("x", "float64", ("batch", "pairs"))])
    given(feed, 1, 3)
    feed.advance([np.zeros((1, 3))])
    assert cache.length == 6


def test_what_runs_change_is_put_back() -> None:
    cache = ModelCache([INFO], 100)
    feed = CacheFeed(cache, INFO, [TensorSpec("x", "float64", ("batch", "new"))])
    given(feed, 1, 1)
    before = [array.copy() for array in cache.arrays[0]]

    def fails() -> None:
        for array in cache.tails():
            array += 1
        raise ValueError("in a run")

    with feed.as_it_was(), pytest.raises(ValueError, match="in a run"):
        fails()
    assert all(np.array_equal(array, copy) for array, copy in zip(cache.arrays[0], before, strict=True))
