"""Five trits a byte, 1.6 bits a weight, in a form that takes no division to read.

The trits of a byte, plus 1, are the digits d[0] .. d[4] of a number v in base 3, d[0] the highest, from 0 to 242. The
byte is v / 243 as a fraction of 256, rounded up: q = ceil(256 v / 243). Then 3 q has d[0] above its eight bits, and in
them the byte of the other digits: a digit is (3 q) >> 8, and q becomes (3 q) & 255. Rounding up makes this exact: q is
above 256 v / 243 by less than 1, and after four steps by less than 81, when the next digit is 256 / 3 away.

llama.cpp's TQ1_0 stores its bytes in this form too (``dequantize_row_tq1_0`` in ggml-quants.c).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.granularity import Granularity, row_blocks
from tvm_ternary.formats.layouts import (
    DENSE_BLOCK,
    LANES,
    check_array,
    crop,
    from_lanes,
    lane_blocks,
    pad_groups,
    padded_k,
    to_lanes,
)
from tvm_ternary.formats.planes import pack_planes, plane_words, unpack_planes
from tvm_ternary.formats.ternary import TernaryTensor

DIGITS = 5
"""Trits of a byte."""
_BYTES = 4
_NUMBERS = 3**DIGITS

_BYTE_OF = ((256 * np.arange(_NUMBERS) + _NUMBERS - 1) // _NUMBERS).astype(np.uint8)
# -1 where a byte stands for no number.
_NUMBER_OF = np.full(256, -1, np.int16)
_NUMBER_OF[_BYTE_OF] = np.arange(_NUMBERS)
_TRITS_OF = (_NUMBER_OF[:, None] // 3 ** np.arange(DIGITS - 1, -1, -1) % 3 - 1).astype(np.int8)

# Four bytes of five zero trits (v = 121).
ZERO_DENSE = 0x80808080


def pack_dense(tensor: TernaryTensor) -> npt.NDArray[np.uint32]:
    """Pack trits five to a byte, for dot-product instructions.

    A word holds 20 consecutive k of one row: local k = 4 * s + j (s from 0 to 4, j from 0 to 3) is digit s of byte j.
    Taking digit s off all four bytes gives four consecutive k in four bytes.

    Returns
    -------
    (P, ceil(N / 16), padded K / 20, 16) uint32, K padded as `padded_k` says
        The last axis is n % 16. Padding has zero trits.
    """
    n, k = tensor.shape
    groups, padded = padded_k(k, tensor.granularity, DENSE_BLOCK)
    width = groups * padded
    out = np.empty((tensor.num_planes, -(-n // LANES), width // DENSE_BLOCK, LANES), dtype=np.uint32)
    for p in range(tensor.num_planes):
        for rows in row_blocks(n, width, LANES):
            trits = pad_groups(unpack_planes(tensor.planes[p, :, rows], k), tensor.granularity, DENSE_BLOCK)
            digits = (trits + np.int8(1)).view(np.uint8).reshape(-1, width // DENSE_BLOCK, DIGITS, _BYTES)
            numbers = digits[:, :, 0]
            for s in range(1, DIGITS):
                numbers = numbers * np.uint8(3) + digits[:, :, s]
            words = _BYTE_OF[numbers].view("<u4")[..., 0]
            out[p, lane_blocks(rows)] = to_lanes(words, ZERO_DENSE)
    return out


def unpack_dense(
    dense: npt.NDArray[np.uint32],
    shape: tuple[int, int],
    granularity: Granularity,
    scale: npt.NDArray[np.float32],
) -> TernaryTensor:
    """Read `pack_dense`'s layout back.

    Parameters
    ----------
    dense : (P, ceil(N / 16), padded K / 20, 16) uint32, K padded as `padded_k` says
    shape : (int, int)
        N and K.
    granularity : Granularity
    scale : (P, rows, groups) float32

    Raises
    ------
    LayoutError
        If the array's dtype or shape does not fit, a byte stands for no five trits, or padding is not zero.
    """
    n, k = shape
    groups, padded = padded_k(k, granularity, DENSE_BLOCK)
    width = groups * padded
    check_array("dense", dense, (-(-n // LANES), width // DENSE_BLOCK, LANES))
    planes = np.empty((dense.shape[0], 2, n, plane_words(k)), dtype=np.uint64)
    for p in range(dense.shape[0]):
        for rows in row_blocks(n, width, LANES):
            packed = from_lanes(dense[p, lane_blocks(rows)]).view(np.uint8).reshape(-1, width // DENSE_BLOCK, _BYTES)
            unknown = packed[_NUMBER_OF[packed] < 0]
            if unknown.size:
                problem = f"holds byte {unknown[0]}, expected ceil(256 v / 243) with v from 0 to 242"
                raise LayoutError("dense", problem, "pack with pack_dense")
            padded_trits = np.ascontiguousarray(_TRITS_OF[packed].swapaxes(-1, -2)).reshape(-1, width)
            trits = crop("dense", padded_trits, rows, k, granularity, DENSE_BLOCK)
            planes[p, :, rows] = pack_planes(trits > 0, trits < 0)
    return TernaryTensor(planes, scale, shape, granularity)
