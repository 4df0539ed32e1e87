"""The ternary block types of GGUF, bit by bit.

======  ==================  =========================================================================================
type    bytes a block       which trits are where
======  ==================  =========================================================================================
TQ1_0   54 a 256 weights    five in a byte: 32 bytes for the first 160, 16 for the next 80; four in each of 4 bytes for
                            the last 16; then the block's scale, float16
TQ2_0   66 a 256 weights    2 bits each: 32 bytes for 128 weights, twice; then the block's scale, float16
I2_S    32 a 128 weights    2 bits each, the first 32 weights in the highest; behind all blocks one scale, float32
======  ==================  =========================================================================================

Within a run of B bytes, the trits of byte b are B weights apart: b, B + b, 2 B + b, ... TQ1_0's byte q is a fraction in
base 3, whose next trit is 1 less than the whole part of 3 q / 256. Other codes are 1 more than the trit.

I2_S is what bitnet.cpp writes on x86, and what the public ``bitnet-b1.58-2B-4T`` file holds. bitnet.cpp built for other
machines, or with other options, writes the same type number over another order, which a file does not tell.

References
----------
ggml's ``block_tq1_0`` and ``block_tq2_0``; bitnet.cpp's documentation of I2_S, ``docs`` and ``quantize_i2_s``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.granularity import Granularity, PerGroup, PerTensor, row_blocks
from tvm_ternary.formats.planes import pack_planes, plane_words
from tvm_ternary.formats.ternary import TernaryTensor

Bytes = npt.NDArray[np.uint8]

BLOCK = 256
I2_S_BLOCK = 128
I2_S_TAIL = 32
"""Bytes behind the trits of an I2_S tensor, of which the first four are the scale."""

_POWERS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)
_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)


def decode_tq1_0(data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
    """Read a TQ1_0 matrix: any bytes, K a multiple of 256, to a tensor with `PerGroup` (256)."""
    return _decode_blocks(data, shape, "TQ1_0", 54, _tq1_0_codes)


def decode_tq2_0(data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
    """Read a TQ2_0 matrix: any bytes, K a multiple of 256, to a tensor with `PerGroup` (256)."""
    return _decode_blocks(data, shape, "TQ2_0", 66, _tq2_0_codes)


def decode_i2_s(data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
    """Read an I2_S matrix: N * K / 4 bytes of trits and 32 more, K a multiple of 128, to a tensor with `PerTensor`."""
    n, k = shape
    flat = data.reshape(-1)
    if k % I2_S_BLOCK or flat.size != n * k // 4 + I2_S_TAIL:
        problem = f"{flat.size} bytes for {n} x {k}, expected {n * k // 4 + I2_S_TAIL} and K a multiple of {I2_S_BLOCK}"
        raise LayoutError("I2_S", problem, "the file is damaged")
    scale = flat[n * k // 4 :][:4].view("<f4").astype(np.float32).reshape(1, 1, 1)
    rows = flat[: n * k // 4].reshape(n, k // I2_S_BLOCK, 1, 32)
    shifts = _SHIFTS[::-1].reshape(4, 1)
    codes = ((block, (rows[block] >> shifts & np.uint8(3)).reshape(-1, k)) for block in row_blocks(n, k))
    return _assemble(codes, scale, shape, PerTensor(), "I2_S")


TERNARY: dict[str, Callable[[Bytes, tuple[int, int]], TernaryTensor]] = {
    "TQ1_0": decode_tq1_0,
    "TQ2_0": decode_tq2_0,
    "I2_S": decode_i2_s,
}
"""How the matrices of each ternary type are read."""


def _decode_blocks(
    data: Bytes, shape: tuple[int, int], kind: str, size: int, codes_of: Callable[[Bytes], Bytes]
) -> TernaryTensor:
    n, k = shape
    if k % BLOCK or data.size != n * k // BLOCK * size:
        problem = f"{data.size} bytes for {n} x {k}, expected {n * k // BLOCK * size} and K a multiple of {BLOCK}"
        raise LayoutError(kind, problem, "the file is damaged")
    blocks = data.reshape(n, k // BLOCK, size)
    scale = np.ascontiguousarray(blocks[..., -2:]).view("<f2").astype(np.float32).reshape(1, n, -1)
    if not k:
        scale = np.zeros((1, n, 1), dtype=np.float32)
    codes = ((rows, codes_of(blocks[rows, :, :-2]).reshape(-1, k)) for rows in row_blocks(n, k))
    return _assemble(codes, scale, shape, PerGroup(BLOCK), kind)


def _tq1_0_codes(blocks: Bytes) -> Bytes:
    """(R, B, 52) bytes to (R, B, 256) codes."""
    parts = []
    for run, trits in ((blocks[..., :32], 5), (blocks[..., 32:48], 5), (blocks[..., 48:], 4)):
        fractions = run[..., None, :] * _POWERS[:trits, None]
        parts.append((fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*blocks.shape[:2], -1))
    return np.concatenate(parts, axis=-1)


def _tq2_0_codes(blocks: Bytes) -> Bytes:
    """(R, B, 64) bytes to (R, B, 256) codes."""
    halves = blocks.reshape(*blocks.shape[:2], 2, 1, 32)
    return (halves >> _SHIFTS[:, None] & np.uint8(3)).reshape(*blocks.shape[:2], BLOCK)


def _assemble(
    parts: Iterator[tuple[slice, Bytes]],
    scale: npt.NDArray[np.float32],
    shape: tuple[int, int],
    granularity: Granularity,
    kind: str,
) -> TernaryTensor:
    """Codes (R, K) of rows, a block of rows at a time, and scales to a tensor."""
    n, k = shape
    planes = np.zeros((1, 2, n, plane_words(k)), dtype=np.uint64)
    for rows, codes in parts:
        if (codes > 2).any():
            raise LayoutError(kind, "holds the code 3, expected 0, 1 or 2 for -1, 0 or 1", "the file is damaged")
        planes[0, :, rows] = pack_planes(codes == 2, codes == 0)
    return TernaryTensor(planes, scale, shape, granularity)
