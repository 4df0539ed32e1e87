"""What the property tests of this folder draw from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import strategies as st

from tvm_ternary.formats import Granularity, PerChannel, PerGroup, PerTensor, TernaryTensor, granularity

rows = st.integers(0, 40)
columns = st.integers(0, 150)
granularities: st.SearchStrategy[Granularity] = st.one_of(
    st.builds(PerGroup, st.integers(1, 60)),
    st.builds(PerGroup, st.integers(1, 200)),
    st.just(PerTensor()),
    st.just(PerChannel()),
)
# One row at a time, a few rows, everything at once.
blocks = st.sampled_from([1, 2048, granularity.BLOCK_ELEMENTS])


def make_tensor(n: int, k: int, kind: Granularity, planes: int, seed: int) -> TernaryTensor:
    """Make a tensor of random trits and scales."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (planes, n, k), dtype=np.int8)
    scale = rng.standard_normal((planes, *kind.scale_shape(n, k)), dtype=np.float32)
    return TernaryTensor.from_trits(trits, scale, kind)


@st.composite
def tensors(draw: st.DrawFn) -> TernaryTensor:
    """Draw a tensor of any shape, granularity and number of planes."""
    return make_tensor(
        draw(rows), draw(columns), draw(granularities), draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1))
    )


def grid() -> Iterator[TernaryTensor]:
    """Tensors on both sides of every boundary: lanes, blocks of 16 and 32, words of 64, groups, and nothing at all."""
    kinds = [PerTensor(), PerChannel(), *map(PerGroup, (1, 15, 16, 17, 32, 33, 128))]
    shapes = itertools.product((0, 1, 15, 16, 17, 33), (0, 1, 15, 16, 17, 31, 32, 33, 64, 65, 130))
    for seed, (kind, (n, k)) in enumerate(itertools.product(kinds, shapes)):
        yield make_tensor(n, k, kind, 1 + seed % 4, seed)


@contextmanager
def block_elements(count: int) -> Iterator[None]:
    """Let `row_blocks` cut blocks of ``count`` elements, so that small matrices span several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(granularity, "BLOCK_ELEMENTS", count)
        yield


def assert_same(got: TernaryTensor, expected: TernaryTensor) -> None:
    """Compare two tensors bit by bit."""
    assert got.shape == expected.shape
    assert got.granularity == expected.granularity
    np.testing.assert_array_equal(got.planes, expected.planes)
    np.testing.assert_array_equal(got.scale, expected.scale)
