"""The packed layouts against their descriptions, element by element, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats import (
    BITS_BLOCK,
    CODES_BLOCK,
    LANES,
    Granularity,
    PerChannel,
    PerGroup,
    TernaryTensor,
    pack_bits,
    pack_codes,
    pack_scale,
    pad_groups,
    padded_k,
    unpack_bits,
    unpack_codes,
)

from .strategies import assert_same, block_elements, blocks, columns, granularities, grid, rows, tensors


def weights(tensor: TernaryTensor) -> Iterator[tuple[int, int, int, int, int]]:
    """Every weight: plane, row, group, k inside the group, trit."""
    size = tensor.granularity.group_size(tensor.shape[1])
    for (p, n, k), trit in np.ndenumerate(tensor.trits()):
        yield p, n, k // size, k % size, int(trit)


def check_codes(tensor: TernaryTensor, elements: int) -> None:
    """Compare codes with their description."""
    n_rows, k_columns = tensor.shape
    groups = tensor.granularity.groups(k_columns)
    group_words = -(-tensor.granularity.group_size(k_columns) // 16)
    shape = (tensor.num_planes, -(-n_rows // 16), groups * group_words, 16)
    expected = np.full(shape, 0x55555555, dtype=object)
    for p, n, group, local, trit in weights(tensor):
        s, j = divmod(local % 16, 4)
        expected[p, n // 16, group * group_words + local // 16, n % 16] += trit << (8 * j + 2 * s)
    with block_elements(elements):
        got = pack_codes(tensor)
    assert got.dtype == np.uint32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


def check_bits(tensor: TernaryTensor, elements: int) -> None:
    """Compare bits with their description."""
    n_rows, k_columns = tensor.shape
    groups = tensor.granularity.groups(k_columns)
    group_words = -(-tensor.granularity.group_size(k_columns) // 32)
    expected = np.zeros((tensor.num_planes, -(-n_rows // 16), groups * group_words, 2, 16), dtype=object)
    for p, n, group, local, trit in weights(tensor):
        word = group * group_words + local // 32
        expected[p, n // 16, word, 0, n % 16] |= (trit != 0) << (local % 32)
        expected[p, n // 16, word, 1, n % 16] |= (trit < 0) << (local % 32)
    with block_elements(elements):
        got = pack_bits(tensor)
    assert got.dtype == np.uint32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


def check_back(tensor: TernaryTensor, elements: int) -> None:
    """Pack, unpack and compare."""
    with block_elements(elements):
        for pack, unpack in ((pack_codes, unpack_codes), (pack_bits, unpack_bits)):
            assert_same(unpack(pack(tensor), tensor.shape, tensor.granularity, tensor.scale), tensor)


@pytest.mark.parametrize("check", [check_codes, check_bits, check_back])
@given(tensors(), blocks)
def test_layouts_of_any_tensor(
    check: Callable[[TernaryTensor, int], None], tensor: TernaryTensor, elements: int
) -> None:
    check(tensor, elements)


@pytest.mark.parametrize("check", [check_codes, check_bits, check_back])
def test_layouts_at_every_boundary(check: Callable[[TernaryTensor, int], None]) -> None:
    for tensor in grid():
        check(tensor, 1000)


@given(tensors())
def test_scale_reaches_every_row_and_no_padding(tensor: TernaryTensor) -> None:
    n_rows, k_columns = tensor.shape
    got = pack_scale(tensor)
    groups = tensor.granularity.groups(k_columns)
    assert got.dtype == np.float32
    assert got.shape == (tensor.num_planes, groups, -(-n_rows // 16) * 16)
    for (p, group, n), value in np.ndenumerate(got):
        expected = tensor.scale[p, min(n, tensor.scale.shape[1] - 1), group] if n < n_rows else 0
        assert value == expected


@given(granularities, columns, st.sampled_from([CODES_BLOCK, BITS_BLOCK]))
def test_padded_k_is_the_least_that_holds_a_group(granularity: Granularity, k: int, block: int) -> None:
    groups, padded = padded_k(k, granularity, block)
    assert groups == granularity.groups(k)
    assert padded % block == 0
    assert padded - block < granularity.group_size(k) <= padded


@given(granularities, rows, columns, st.sampled_from([CODES_BLOCK, BITS_BLOCK]), st.sampled_from(["int8", "float32"]))
def test_pad_groups_puts_each_group_before_its_zeros(
    granularity: Granularity, m: int, k: int, block: int, dtype: str
) -> None:
    x = np.random.default_rng(m * 1000 + k).integers(1, 100, (m, k)).astype(dtype)
    groups, padded = padded_k(k, granularity, block)
    size = granularity.group_size(k)
    expected = np.zeros((m, groups * padded), dtype=dtype)
    for row in range(m):
        for column in range(k):
            expected[row, column // size * padded + column % size] = x[row, column]
    got = pad_groups(x, granularity, block)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, expected)


@given(tensors(), st.integers(1, 3))
def test_codes_times_padded_activations_is_the_product(tensor: TernaryTensor, m: int) -> None:
    """What a dot-product kernel does: the sum of code * x less the sum of x."""
    x = np.random.default_rng(m).integers(-127, 128, (m, tensor.shape[1]))
    padded = pad_groups(x, tensor.granularity, CODES_BLOCK).reshape(m, -1, 4, 4)
    codes = pack_codes(tensor)
    shifted = np.stack([np.ascontiguousarray((codes >> 2 * s) & 0x03030303).view(np.uint8) for s in range(4)])
    codes_of = shifted.reshape(4, *codes.shape, 4).astype(np.int64)
    dot = np.einsum("mwsj,spbwlj->pmbl", padded, codes_of) - padded.sum(axis=(1, 2, 3))[None, :, None, None]
    dot = dot.reshape(tensor.num_planes, m, codes.shape[1] * LANES)[..., : tensor.shape[0]]
    np.testing.assert_array_equal(dot, np.einsum("mk,pnk->pmn", x, tensor.trits().astype(np.int64)))


def small() -> TernaryTensor:
    """Two planes of ones, ragged in rows, columns and groups."""
    trits = np.ones((2, 3, 50), dtype=np.int8)
    return TernaryTensor.from_trits(trits, np.ones((2, 3, 3), dtype=np.float32), PerGroup(20))


@pytest.mark.parametrize(
    ("index", "bit"),
    [((1, 0, 1, 0), 2), ((1, 0, 5, 0), 16), ((0, 0, 0, 3), 0)],
    ids=["past the group", "past K", "past N"],
)
def test_codes_with_weights_in_the_padding_are_refused(index: tuple[int, ...], bit: int) -> None:
    tensor = small()
    codes = pack_codes(tensor)
    codes[index] += np.uint32(1) << np.uint32(bit)
    with pytest.raises(LayoutError, match="codes: padding holds weights"):
        unpack_codes(codes, tensor.shape, tensor.granularity, tensor.scale)


def test_code_three_is_refused() -> None:
    tensor = small()
    codes = pack_codes(tensor)
    codes[0, 0, 0, 0] |= np.uint32(3)
    with pytest.raises(LayoutError, match="codes: holds code 3"):
        unpack_codes(codes, tensor.shape, tensor.granularity, tensor.scale)


@pytest.mark.parametrize(
    ("index", "bit"),
    [((1, 0, 0, 0, 0), 20), ((1, 0, 2, 0, 0), 10), ((0, 0, 0, 0, 3), 0)],
    ids=["past the group", "past K", "past N"],
)
def test_bits_with_weights_in_the_padding_are_refused(index: tuple[int, ...], bit: int) -> None:
    tensor = small()
    bits = pack_bits(tensor)
    bits[index] |= np.uint32(1) << np.uint32(bit)
    with pytest.raises(LayoutError, match="bits: padding holds weights"):
        unpack_bits(bits, tensor.shape, tensor.granularity, tensor.scale)


def test_a_minus_that_is_zero_is_refused() -> None:
    tensor = small()
    bits = pack_bits(tensor)
    bits[0, 0, 0, 1, 3] = 1
    with pytest.raises(LayoutError, match="bits: a zero trit is marked minus"):
        unpack_bits(bits, tensor.shape, tensor.granularity, tensor.scale)


@pytest.mark.parametrize(
    ("name", "pack", "unpack"), [("codes", pack_codes, unpack_codes), ("bits", pack_bits, unpack_bits)]
)
def test_arrays_that_do_not_fit_are_refused(name: str, pack, unpack) -> None:  # type: ignore[no-untyped-def]
    tensor = small()
    packed = pack(tensor)
    for wrong, shape, granularity in [
        (packed.astype(np.int32), tensor.shape, tensor.granularity),
        (packed[..., :8], tensor.shape, tensor.granularity),
        (packed[0], tensor.shape, tensor.granularity),
        (packed, (17, 50), tensor.granularity),
        (packed, tensor.shape, PerChannel()),
    ]:
        with pytest.raises(LayoutError, match=f"{name}: .* expected uint32 of shape"):
            unpack(wrong, shape, granularity, tensor.scale)
    with pytest.raises(LayoutError, match="scale: "):
        unpack(packed, tensor.shape, tensor.granularity, tensor.scale[:1])
