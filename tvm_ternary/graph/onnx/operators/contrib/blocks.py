"""Weights in codes of 2, 4 or 8 bits with a scale for each block: what they stand for, and whether that is ternary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats import PerGroup, TernaryTensor
from tvm_ternary.formats.granularity import row_blocks

BITS = (2, 4, 8)
"""Widths of a code that divide a byte."""


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes along the last axis, the first in the low bits of a byte: (..., n) to (..., n * 8 / bits)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def dequantize(
    codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.floating], zero: npt.NDArray[np.generic], block: int
) -> npt.NDArray[np.float32]:
    """(code - zero) * scale, each of which serves a block of the last axis.

    Parameters
    ----------
    codes : (N, K) integer
    scale, zero : (N, ceil(K / block))
    block : int

    Returns
    -------
    (N, K) float32
    """
    out = np.empty(codes.shape, np.float32)
    for rows in row_blocks(*codes.shape):
        origin, step = (np.repeat(part[rows].astype(np.float32), block, axis=1) for part in (zero, scale))
        np.subtract(codes[rows], origin[:, : codes.shape[1]], out=out[rows], dtype=np.float32)
        out[rows] *= step[:, : codes.shape[1]]
    return out


def ternary_planes(
    codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.floating], zero: npt.NDArray[np.generic], block: int
) -> TernaryTensor | None:
    """The same weights as trit planes, where one or two of them hold every weight exactly.

    One plane does where no code is more than 1 from its zero point, and two, worth 1 and 2, where none is more than 3,
    as codes of 2 bits always are. A zero point between two codes is one over half the scale.

    Returns
    -------
    TernaryTensor or None
        ``dequantize()`` equal to that of the codes in every element.
    """
    halves = bool((zero.astype(np.float32) % 1).any())
    fine = 2 if halves else 1
    step = scale.astype(np.float32) / np.float32(fine)
    if (zero.astype(np.float32) * fine % 1).any() or not (np.isfinite(step).all() and (step * fine == scale).all()):
        return None
    spread = np.repeat(zero.astype(np.float32) * fine, block, axis=1)[:, : codes.shape[1]].astype(np.int16)
    whole = codes.astype(np.int16) * fine - spread
    largest = int(np.abs(whole).max(initial=0))
    if largest > 3:
        return None
    granularity = PerGroup(block)
    if largest <= 1:
        return TernaryTensor.from_trits(whole.astype(np.int8)[None], step[None], granularity)
    # 3 = 2 + 1, 2 = 2 + 0, 1 = 0 + 1.
    coarse = np.sign(whole) * (np.abs(whole) > 1)
    trits = np.stack([coarse, whole - 2 * coarse]).astype(np.int8)
    return TernaryTensor.from_trits(trits, np.stack([2 * step, step]), granularity)
