"""Shapes of scales, and how rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Granularity, PerChannel, PerGroup, PerTensor, row_blocks

from .strategies import block_elements, columns, granularities, rows


@pytest.mark.parametrize(
    ("granularity", "n", "k", "scale_shape", "group_size"),
    [
        (PerTensor(), 5, 300, (1, 1), 300),
        (PerTensor(), 0, 0, (1, 1), 1),
        (PerChannel(), 5, 300, (5, 1), 300),
        (PerChannel(), 0, 0, (0, 1), 1),
        (PerGroup(128), 5, 300, (5, 3), 128),
        (PerGroup(128), 5, 256, (5, 2), 128),
        (PerGroup(128), 5, 0, (5, 1), 1),
        (PerGroup(128), 5, 100, (5, 1), 100),
        (PerGroup(1), 5, 300, (5, 300), 1),
    ],
)
def test_shapes(granularity: Granularity, n: int, k: int, scale_shape: tuple[int, int], group_size: int) -> None:
    assert granularity.scale_shape(n, k) == scale_shape
    assert granularity.groups(k) == scale_shape[1]
    assert granularity.group_size(k) == group_size


@pytest.mark.parametrize("size", [0, -1, 1.5, "128", True, None])
def test_a_group_size_is_a_positive_int(size: object) -> None:
    with pytest.raises(OptionError, match=r"PerGroup: size=.*expected a positive int; for example PerGroup\(128\)"):
        PerGroup(size)  # type: ignore[arg-type]


@given(granularities, columns)
def test_groups_cover_every_column_once(granularity: Granularity, k: int) -> None:
    groups, size = granularity.groups(k), granularity.group_size(k)
    assert groups >= 1
    assert size >= 1
    assert (groups - 1) * size < max(k, 1) <= groups * size


@given(granularities, rows, columns)
def test_spread_gives_each_column_the_scale_of_its_group(granularity: Granularity, n: int, k: int) -> None:
    shape = granularity.scale_shape(n, k)
    scale = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    spread = np.broadcast_to(granularity.spread(scale, k), (n, k))
    for (row, column), value in np.ndenumerate(spread):
        assert value == scale[min(row, shape[0] - 1), column // granularity.group_size(k)]


@given(rows, columns, st.sampled_from([1, 16]), st.sampled_from([1, 100, 5000]))
def test_row_blocks_cover_every_row_once(n: int, k: int, multiple: int, elements: int) -> None:
    with block_elements(elements):
        blocks = list(row_blocks(n, k, multiple))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(n))
    assert all((block.stop - block.start) % multiple == 0 for block in blocks[:-1])
    assert all((block.stop - block.start) * k <= max(elements, multiple * k) for block in blocks)
