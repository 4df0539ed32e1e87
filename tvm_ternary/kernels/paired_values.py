"""Values of a prompt as 16-bit numbers, for dot products of pairs: what a block holds, and what it stands for.

A block of `BLOCK` tokens has one scale for each element of a head, its largest magnitude over `LARGEST_VALUE`; a value
is the nearest multiple of that, 12 bits. What they are multiplied with are weights of a softmax before it is divided by
their sum: relative to the largest of a query in the block they are multiples of 1 / `LARGEST_WEIGHT`, 14 bits, so that
the sum over a block fits in 32.

A word holds an element of two neighbouring tokens, the first in its low half; sixteen elements lie side by side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.ternary_keys import BLOCK

LARGEST_VALUE = 2047
LARGEST_WEIGHT = 16383

assert LARGEST_VALUE * LARGEST_WEIGHT * BLOCK < 2**31

SMALLEST = 2.0**-100
"""Elements that are smaller than this in all of a block are zero: one over their scale would be no float."""

Floats = npt.NDArray[np.float32]


def round_block(v: Floats) -> tuple[npt.NDArray[np.int16], Floats]:
    """Numbers and scales of blocks, in float32 as the kernels compute them.

    Parameters
    ----------
    v : (..., tokens, elements) float32

    Returns
    -------
    numbers : (..., tokens, elements) int16
    scale : (..., elements) float32
        NaN where v has a NaN or an infinity, whose numbers are 0: what is read of them is NaN.
    """
    most = np.abs(v).max(-2)
    finite, some = np.isfinite(most), most >= SMALLEST
    inverse = np.where(finite & some, np.float32(LARGEST_VALUE) / np.where(finite & some, most, 1), 0)
    numbers = np.rint(np.where(finite[..., None, :], v, 0) * inverse[..., None, :].astype(np.float32))
    scale = np.where(some, most * np.float32(1 / LARGEST_VALUE), 0)
    return numbers.astype(np.int16), np.where(finite, scale, np.nan).astype(np.float32)


def pair(numbers: npt.NDArray[np.int16]) -> npt.NDArray[np.int32]:
    """The words of blocks.

    Parameters
    ----------
    numbers : (..., tokens, elements) int16

    Returns
    -------
    (..., groups of elements, tokens / 2, 16) int32
    """
    *outer, tokens, elements = numbers.shape
    groups = word_shape(elements)[0]
    padded = np.zeros((*outer, tokens, groups * LANES), np.int32)
    padded[..., :elements] = numbers
    pairs = padded.reshape(*outer, tokens // 2, 2, groups, LANES)
    words = (pairs[..., 0, :, :] & 0xFFFF) | (pairs[..., 1, :, :] << 16)
    return np.ascontiguousarray(words.swapaxes(-3, -2))


def word_shape(elements: int) -> tuple[int, int, int]:
    """Groups of sixteen elements, pairs of tokens of a block, elements of a group."""
    return -(-elements // LANES), BLOCK // 2, LANES
