"""The packed layouts that kernels read, and the way back.

All of them put `LANES` rows side by side in the last axis, so that one vector register holds the same stretch of K for
`LANES` outputs, and start every quantization group at a new block of K, so that a kernel can apply a scale between
blocks. Rows and groups are padded with zero trits, which change no sum.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.factors import share_scales
from tvm_ternary.formats.granularity import Granularity, row_blocks
from tvm_ternary.formats.planes import pack_planes, plane_words, unpack_planes
from tvm_ternary.formats.ternary import TernaryTensor

_T = TypeVar("_T", bound=np.generic)

LANES = 16
CODES_BLOCK = 16
DENSE_BLOCK = 20
BITS_BLOCK = 32

# Trits are summed in stretches of at most this many k's: a tile's stay in a first-level cache once decoded to bytes,
# and what they sum to is a whole number that float32 holds.
SEGMENT = 512

# Sixteen codes of a zero trit (0b01).
ZERO_CODES = 0x55555555


def group_segments(group_size: int, block: int) -> tuple[int, int]:
    """Divide a group into segments, the stretches of K that a kernel sums at once.

    Parameters
    ----------
    group_size : int
    block : int
        k's of a packed word: `CODES_BLOCK`, `DENSE_BLOCK` or `BITS_BLOCK`; a group of bits is one segment.

    Returns
    -------
    count, blocks : int
        Segments of a group and blocks of a segment, in the number that needs the least padding. Where there are several
        of codes, blocks are a multiple of 4 (the 64 k's that AMX multiplies at a time).
    """
    blocks, most = -(-group_size // block), SEGMENT // block
    if block == BITS_BLOCK or blocks <= most:
        return 1, blocks
    least, step = -(-blocks // most), 4 if block == CODES_BLOCK else 1
    choices = ((count, step * -(-blocks // (step * count))) for count in range(least, 2 * least))
    return min(choices, key=lambda choice: (choice[0] * choice[1], choice[0]))


def padded_k(k: int, granularity: Granularity, block: int) -> tuple[int, int]:
    """Count the groups along K and the width each is padded to.

    Parameters
    ----------
    k : int
    granularity : Granularity
    block : int
        k's of a packed word.

    Returns
    -------
    groups, padded_group : int
        A packed row holds ``groups * padded_group`` weights; both are at least 1.
    """
    count, blocks = group_segments(granularity.group_size(k), block)
    return granularity.groups(k), count * blocks * block


def pad_groups(x: npt.NDArray[_T], granularity: Granularity, block: int) -> npt.NDArray[_T]:
    """Put a row-major matrix into the order of packed weights: each group followed by its zeros.

    Parameters
    ----------
    x : (M, K) of any dtype
        Activations (or trits).
    granularity : Granularity
    block : int
        k's of a packed word.

    Returns
    -------
    (M, groups * padded_group) of the same dtype
    """
    rows, k = x.shape
    groups, padded = padded_k(k, granularity, block)
    size = granularity.group_size(k)
    out = np.zeros((rows, groups, padded), dtype=x.dtype)
    whole = k // size
    out[:, :whole, :size] = x[:, : whole * size].reshape(rows, whole, size)
    if whole < groups:
        out[:, whole, : k - whole * size] = x[:, whole * size :]
    return out.reshape(rows, groups * padded)


def pack_codes(tensor: TernaryTensor) -> npt.NDArray[np.uint32]:
    """Pack trits as 2-bit codes, trit + 1, for dot-product instructions.

    A word holds 16 consecutive k of one row: local k = 4 * s + j (s and j from 0 to 3) stands at bit 8 * j + 2 * s.
    Seen as four bytes, shifting right by 2 * s and masking with 3 gives the codes of four consecutive k in four bytes.

    Returns
    -------
    (P, ceil(N / 16), padded K / 16, 16) uint32, K padded as `padded_k` says
        The last axis is n % 16. Padding has code 1.
    """
    n, k = tensor.shape
    groups, padded = padded_k(k, tensor.granularity, CODES_BLOCK)
    width = groups * padded
    out = np.empty((tensor.num_planes, -(-n // LANES), width // CODES_BLOCK, LANES), dtype=np.uint32)
    for p in range(tensor.num_planes):
        for rows in row_blocks(n, width, LANES):
            codes = pad_groups(unpack_planes(tensor.planes[p, :, rows], k), tensor.granularity, CODES_BLOCK)
            codes += np.int8(1)
            # A uint32 of four code bytes is four k; shifted codes stay inside their byte because a code is at most 2.
            quads = codes.view("<u4").reshape(-1, width // CODES_BLOCK, 4)
            words = quads[..., 0].copy()
            for s in (1, 2, 3):
                words |= quads[..., s] << np.uint32(2 * s)
            out[p, lane_blocks(rows)] = to_lanes(words, ZERO_CODES)
    return out


def unpack_codes(
    codes: npt.NDArray[np.uint32],
    shape: tuple[int, int],
    granularity: Granularity,
    scale: npt.NDArray[np.float32],
) -> TernaryTensor:
    """Read `pack_codes`' layout back.

    Parameters
    ----------
    codes : (P, ceil(N / 16), padded K / 16, 16) uint32, K padded as `padded_k` says
    shape : (int, int)
        N and K.
    granularity : Granularity
    scale : (P, rows, groups) float32

    Raises
    ------
    LayoutError
        If the array's dtype or shape does not fit, a code is 3, or padding is not zero.
    """
    n, k = shape
    groups, padded = padded_k(k, granularity, CODES_BLOCK)
    width = groups * padded
    check_array("codes", codes, (-(-n // LANES), width // CODES_BLOCK, LANES))
    planes = np.empty((codes.shape[0], 2, n, plane_words(k)), dtype=np.uint64)
    for p in range(codes.shape[0]):
        for rows in row_blocks(n, width, LANES):
            words = from_lanes(codes[p, lane_blocks(rows)])
            quads = np.empty((*words.shape, 4), dtype="<u4")
            for s in range(4):
                quads[..., s] = (words >> np.uint32(2 * s)) & np.uint32(0x03030303)
            padded_trits = quads.view(np.int8).reshape(-1, width) - np.int8(1)
            if (padded_trits == 2).any():
                raise LayoutError("codes", "holds code 3, expected 0, 1 or 2", "pack with pack_codes")
            trits = crop("codes", padded_trits, rows, k, granularity, CODES_BLOCK)
            planes[p, :, rows] = pack_planes(trits > 0, trits < 0)
    return TernaryTensor(planes, scale, shape, granularity)


def pack_bits(tensor: TernaryTensor) -> npt.NDArray[np.uint32]:
    """Pack trits as nonzero and minus bits, for popcount kernels.

    Returns
    -------
    (P, ceil(N / 16), padded K / 32, 2, 16) uint32, K padded as `padded_k` says
        ``[..., 0, :]`` says where the trit is not zero, ``[..., 1, :]`` where it is -1; bit i of a word is local k = i;
        the last axis is n % 16. Padding is zero.
    """
    n, k = tensor.shape
    groups, padded = padded_k(k, tensor.granularity, BITS_BLOCK)
    width = groups * padded
    out = np.empty((tensor.num_planes, -(-n // LANES), width // BITS_BLOCK, 2, LANES), dtype=np.uint32)
    for p in range(tensor.num_planes):
        for rows in row_blocks(n, width, LANES):
            trits = pad_groups(unpack_planes(tensor.planes[p, :, rows], k), tensor.granularity, BITS_BLOCK)
            for half, bits in enumerate((trits != 0, trits < 0)):
                words = np.packbits(bits, axis=-1, bitorder="little").view("<u4")
                out[p, lane_blocks(rows), :, half] = to_lanes(words, 0)
    return out


def unpack_bits(
    bits: npt.NDArray[np.uint32],
    shape: tuple[int, int],
    granularity: Granularity,
    scale: npt.NDArray[np.float32],
) -> TernaryTensor:
    """Read `pack_bits`' layout back.

    Parameters
    ----------
    bits : (P, ceil(N / 16), padded K / 32, 2, 16) uint32, K padded as `padded_k` says
    shape : (int, int)
        N and K.
    granularity : Granularity
    scale : (P, rows, groups) float32

    Raises
    ------
    LayoutError
        If the array's dtype or shape does not fit, a zero trit is marked minus, or padding is not zero.
    """
    n, k = shape
    groups, padded = padded_k(k, granularity, BITS_BLOCK)
    width = groups * padded
    check_array("bits", bits, (-(-n // LANES), width // BITS_BLOCK, 2, LANES))
    if (bits[..., 1, :] & ~bits[..., 0, :]).any():
        raise LayoutError("bits", "a zero trit is marked minus, expected minus only where nonzero", "use pack_bits")
    planes = np.empty((bits.shape[0], 2, n, plane_words(k)), dtype=np.uint64)
    for p in range(bits.shape[0]):
        for rows in row_blocks(n, width, LANES):
            block = bits[p, lane_blocks(rows)]
            nonzero, minus = (
                np.unpackbits(from_lanes(block[:, :, half]).view(np.uint8), axis=-1, bitorder="little").view(np.int8)
                for half in (0, 1)
            )
            trits = crop("bits", nonzero - 2 * minus, rows, k, granularity, BITS_BLOCK)
            planes[p, :, rows] = pack_planes(trits > 0, trits < 0)
    return TernaryTensor(planes, scale, shape, granularity)


def pack_scale(tensor: TernaryTensor) -> npt.NDArray[np.float32]:
    """Give every row its scale, with rows contiguous as kernels read them.

    Returns
    -------
    (P, groups, 16 * ceil(N / 16)) float32
        Zero in padding rows.
    """
    return _for_rows(tensor, tensor.scale)


def pack_shared(tensor: TernaryTensor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """As `pack_scale`, with one scale for all planes and a whole factor for each (see `share_scales`).

    Returns
    -------
    factors : (P, groups, 16 * ceil(N / 16)) int8
    scale : (groups, 16 * ceil(N / 16)) float32
    """
    shared, factors = share_scales(tensor.scale)
    return _for_rows(tensor, factors), _for_rows(tensor, shared[None])[0]


def _for_rows(tensor: TernaryTensor, scale: npt.NDArray[_T]) -> npt.NDArray[_T]:
    n, _ = tensor.shape
    planes, _, groups = scale.shape
    out = np.zeros((planes, groups, -(-n // LANES) * LANES), dtype=scale.dtype)
    out[:, :, :n] = np.broadcast_to(scale, (planes, n, groups)).transpose(0, 2, 1)
    return out


def lane_blocks(rows: slice) -> slice:
    """The blocks of `LANES` rows that hold rows, which start at a multiple of `LANES`."""
    return slice(rows.start // LANES, -(-rows.stop // LANES))


def to_lanes(words: npt.NDArray[np.uint32], fill: int) -> npt.NDArray[np.uint32]:
    """(R, W) words to (ceil(R / 16), W, 16), the missing rows filled."""
    rows, width = words.shape
    missing = -rows % LANES
    if missing:
        words = np.concatenate([words, np.full((missing, width), fill, dtype=words.dtype)])
    return words.reshape(-1, LANES, width).transpose(0, 2, 1)


def from_lanes(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """(B, W, 16) words to (16 * B, W), little endian; the inverse of `to_lanes` but for the padding rows."""
    blocks, width, _ = words.shape
    return np.ascontiguousarray(words.transpose(0, 2, 1), dtype="<u4").reshape(blocks * LANES, width)


def check_array(name: str, array: npt.NDArray[np.uint32], expected: tuple[int, ...]) -> None:
    """Refuse a packed array of another dtype, or whose axes behind the planes are not ``expected``."""
    if array.dtype != np.uint32 or array.ndim != len(expected) + 1 or array.shape[1:] != expected:
        wanted = f"uint32 of shape (planes, {', '.join(map(str, expected))})"
        problem = f"{array.dtype} of shape {array.shape}, expected {wanted}"
        raise LayoutError(name, problem, "check shape and granularity")


def crop(
    name: str, trits: npt.NDArray[np.int8], rows: slice, k: int, granularity: Granularity, block: int
) -> npt.NDArray[np.int8]:
    """Drop padding rows and columns from (R, width) trits; refuse padding that holds weights."""
    groups, padded = padded_k(k, granularity, block)
    size = granularity.group_size(k)
    count = rows.stop - rows.start
    kept = trits[:count].reshape(count, groups, padded)[:, :, :size].reshape(count, groups * size)[:, :k]
    if np.count_nonzero(kept) != np.count_nonzero(trits):
        raise LayoutError(name, "padding holds weights, expected zero trits there", "check shape and granularity")
    return kept
