"""Five trits a byte, against the description, element by element, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats import (
    DENSE_BLOCK,
    Granularity,
    PerChannel,
    PerGroup,
    TernaryTensor,
    group_segments,
    pack_dense,
    padded_k,
    unpack_dense,
)

from .strategies import assert_same, block_elements, blocks, columns, granularities, grid, make_tensor, tensors

LARGEST_SEGMENT = 512


def byte_of(digits: tuple[int, ...]) -> int:
    """ceil(256 v / 243) with v the number of these digits, exactly."""
    v = int("".join(map(str, digits)), 3)
    return -(-256 * v // 243)


def check_description(tensor: TernaryTensor, elements: int) -> None:
    n_rows, k_columns = tensor.shape
    groups, padded = padded_k(k_columns, tensor.granularity, 20)
    size = tensor.granularity.group_size(k_columns)
    digits = np.ones((tensor.num_planes, -(-n_rows // 16) * 16, groups * padded // 20, 5, 4), dtype=int)
    for (p, n, k), trit in np.ndenumerate(tensor.trits()):
        word, local = divmod(k // size * padded + k % size, 20)
        digits[p, n, word, local // 4, local % 4] = trit + 1
    with block_elements(elements):
        got = pack_dense(tensor)
    assert got.dtype == np.uint32
    assert got.flags.c_contiguous
    assert got.shape == (tensor.num_planes, -(-n_rows // 16), groups * padded // 20, 16)
    for p, block, word, lane in np.ndindex(got.shape):
        for j, byte in enumerate(int(got[p, block, word, lane]).to_bytes(4, "little")):
            assert byte == byte_of(tuple(digits[p, 16 * block + lane, word, :, j]))


def check_back(tensor: TernaryTensor, elements: int) -> None:
    with block_elements(elements):
        assert_same(unpack_dense(pack_dense(tensor), tensor.shape, tensor.granularity, tensor.scale), tensor)


@given(tensors(), blocks)
def test_any_tensor_comes_back(tensor: TernaryTensor, elements: int) -> None:
    check_back(tensor, elements)


def test_tensors_at_every_boundary_come_back() -> None:
    for tensor in grid():
        check_back(tensor, 1000)


@pytest.mark.parametrize(
    ("n", "k", "kind"),
    [
        (1, 1, PerChannel()),
        (17, 41, PerGroup(20)),
        (16, 63, PerGroup(21)),
        (20, 40, PerChannel()),
        (0, 0, PerChannel()),
    ],
)
def test_bytes_are_as_described(n: int, k: int, kind: Granularity) -> None:
    for elements in (1, 1 << 20):
        check_description(make_tensor(n, k, kind, 2, seed=k), elements)


def test_multiplying_by_three_takes_every_number_apart() -> None:
    """What the kernels rely on: (3 q) >> 8 is the next digit and (3 q) & 255 holds the others."""
    for digits in np.ndindex((3,) * 5):
        q = byte_of(digits)
        for digit in digits:
            assert (3 * q) >> 8 == digit
            q = (3 * q) & 255


@given(granularities, columns)
def test_segments_hold_a_group_and_are_short_enough_to_sum(kind: Granularity, k: int) -> None:
    for size in (kind.group_size(k), 37 * kind.group_size(k)):
        count, words = group_segments(size, DENSE_BLOCK)
        assert count * words * 20 >= size
        assert words * 20 <= LARGEST_SEGMENT
        assert count == 1 or (count - 1) * words * 20 < size


def small() -> TernaryTensor:
    """17 rows, 50 columns, groups of 30: padding in all directions."""
    return make_tensor(17, 50, PerGroup(30), 2, seed=0)


@pytest.mark.parametrize(
    ("index", "byte"),
    [((1, 0, 1, 0), 3), ((1, 0, 3, 0), 0), ((0, 1, 0, 3), 0)],
    ids=["past the group", "past K", "past N"],
)
def test_weights_in_the_padding_are_refused(index: tuple[int, ...], byte: int) -> None:
    tensor = small()
    dense = pack_dense(tensor)
    kept = int(dense[index]) & ~(0xFF << 8 * byte)
    for digits in ((1, 1, 1, 1, 2), (1, 1, 1, 1, 0)):
        dense[index] = kept | byte_of(digits) << 8 * byte
        with pytest.raises(LayoutError, match="dense: padding holds weights"):
            unpack_dense(dense, tensor.shape, tensor.granularity, tensor.scale)


def test_a_byte_that_stands_for_no_trits_is_refused() -> None:
    tensor = small()
    known = {byte_of(digits) for digits in np.ndindex((3,) * 5)}
    assert len(known) == 243
    for byte in sorted(set(range(256)) - known):
        dense = pack_dense(tensor)
        dense[0, 0, 0, 0] = int(dense[0, 0, 0, 0]) & 0xFFFFFF00 | byte
        with pytest.raises(LayoutError, match=f"dense: holds byte {byte}, expected"):
            unpack_dense(dense, tensor.shape, tensor.granularity, tensor.scale)


def test_arrays_that_do_not_fit_are_refused() -> None:
    tensor = small()
    packed = pack_dense(tensor)
    for wrong, shape, granularity in [
        (packed.astype(np.int32), tensor.shape, tensor.granularity),
        (packed[..., :8], tensor.shape, tensor.granularity),
        (packed[0], tensor.shape, tensor.granularity),
        (packed, (17, 70), tensor.granularity),
        (packed, tensor.shape, PerChannel()),
    ]:
        with pytest.raises(LayoutError, match=r"dense: .* expected uint32 of shape"):
            unpack_dense(wrong, shape, granularity, tensor.scale)
