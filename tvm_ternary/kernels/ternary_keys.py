"""Keys and values of attention as ternary planes: what a block of a cache holds, and what it stands for.

Tokens come in blocks of `BLOCK`. The P planes of an element have scales in the ratio of three: it is

    x ~ scale * c,    c = 3^(P-1) t[0] + ... + 3 t[P-2] + t[P-1],    t[p] in {-1, 0, 1}

so that the planes are the digits of one whole number, |c| <= (3^P - 1) / 2, and a kernel may multiply by all of them
at once. Keys have a scale for each element of a head in a block, since a few elements of every key are large; values
one for each token. The scale is that of the best uniform quantizer of a normal distribution with the same mean
magnitude, then fitted to the numbers it gave by least squares. With a Hadamard rotation of the head before it, elements
are near to normal.

In memory a block is a matrix, rows by terms of a sum: keys are tokens by elements, values elements by tokens. Sixteen
rows lie side by side, a 32-bit word each, as byte dot products want them. One plane takes two bits, two planes four;
three are one of two bits and two of four.

References
----------
Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024: keys by channel, values by
token, the last tokens in float.
Ashkboos et al., "QuaRot", NeurIPS 2024: the rotation of heads.
Max, "Quantizing for Minimum Distortion", IRE Transactions on Information Theory, 1960: the uniform quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats import LANES

BLOCK = 64
"""Tokens that share the scales of keys."""

STEPS = {1: 1.534, 2: 0.667, 3: 0.271}
"""Planes to the step of the best uniform quantizer of a normal distribution with 3^P levels over its mean magnitude."""

Floats = npt.NDArray[np.floating]
Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Digits:
    """Planes that lie in one field of bits.

    Parameters
    ----------
    first, count : int
        Which planes, the most significant first.
    planes : int
        Of all.
    """

    first: int
    count: int
    planes: int

    @property
    def bits(self) -> int:
        """Of a field: 2 for one plane, 4 for two."""
        return 2 * self.count

    @property
    def offset(self) -> int:
        """What is added to a number so that it is none below zero."""
        return int(3**self.count - 1) // 2

    @property
    def weight(self) -> int:
        """What the number counts in c."""
        return int(3 ** (self.planes - self.first - self.count))

    @property
    def terms(self) -> int:
        """Terms of a sum in a word."""
        return 32 // self.bits


def digits(planes: int) -> tuple[Digits, ...]:
    """The fields of an element."""
    if planes not in STEPS:
        raise ValueError(f"{planes} planes of keys or values; expected 1 to {max(STEPS)}")
    pairs = tuple(Digits(first, 2, planes) for first in range(planes % 2, planes, 2))
    return (*((Digits(0, 1, planes),) if planes % 2 else ()), *pairs)


def quantize_block(x: Floats, planes: int, axis: int) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Numbers and scales of a block, in float32 as the kernels compute them.

    Parameters
    ----------
    x : (..., tokens, elements)
    planes : int
    axis : int
        The one that shares a scale: -2 for keys, -1 for values.

    Returns
    -------
    codes : int8, of x's shape
    scale : float32, of x's shape without that axis
        NaN where x has a NaN or an infinity, whose numbers are 0: what is read of them is NaN.
    """
    x = np.asarray(x, np.float32)
    largest = (3**planes - 1) // 2
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.mean(np.abs(x), axis=axis, keepdims=True, dtype=np.float32)
        step = mean * np.float32(STEPS[planes])
        # Over a denormal step would be infinite: what is that small is zero.
        some = step >= np.finfo(np.float32).tiny
        inverse = np.where(some, 1 / np.where(some, step, 1), 0).astype(np.float32)
        c = np.clip(np.rint(x * inverse), -largest, largest)
        c = np.where(np.isfinite(mean), c, 0)
        norm = np.sum(c * c, axis=axis, keepdims=True, dtype=np.float32)
        scale = np.sum(x * c, axis=axis, keepdims=True, dtype=np.float32) / np.where(norm > 0, norm, 1)
        scale = np.where(np.isfinite(mean), scale, np.float32(np.nan)).astype(np.float32)
    return c.astype(np.int8), np.asarray(scale.squeeze(axis), np.float32)


def dequantize_block(codes: Codes, scale: Floats, axis: int) -> npt.NDArray[np.float64]:
    """What the numbers stand for; arguments as `quantize_block` returns them."""
    return np.asarray(codes, np.float64) * np.expand_dims(np.asarray(scale, np.float64), axis)


def trits(codes: Codes, planes: int) -> Codes:
    """The planes of numbers, (P, ...), the most significant first."""
    rest, found = codes.astype(np.int16), []
    for power in (3**p for p in reversed(range(planes))):
        # What is left of a number is at most (power - 1) / 2, so the nearest multiple is the digit.
        digit = np.rint(rest / power)
        found.append(digit.astype(np.int8))
        rest = rest - power * digit.astype(np.int16)
    return np.stack(found)


def packed_words(rows: int, terms: int, field: Digits) -> tuple[int, int, int]:
    """Shape of the words of a matrix of rows by terms: groups of sixteen rows, words of a row, rows of a group."""
    return -(-rows // LANES), -(-terms // field.terms), LANES


def pack(codes: Codes, planes: int) -> list[npt.NDArray[np.uint32]]:
    """The words of a matrix of numbers, an array for each of `digits`.

    Parameters
    ----------
    codes : (..., rows, terms) int8
        Keys as they are; values transposed.
    planes : int

    Returns
    -------
    list of (..., groups, words, 16) uint32
        With b bits to a field, the one at bit ``8 i + b j`` of a word is term ``4 j + i`` of its; what is added
        at the ends is 0, which stands for minus the offset, and has to be multiplied by 0.
    """
    planar = trits(codes, planes)
    packed = []
    for field in digits(planes):
        powers = [3**p for p in reversed(range(field.count))]
        part = sum(power * planar[field.first + n].astype(np.int16) for n, power in enumerate(powers))
        groups, words, lanes = packed_words(codes.shape[-2], codes.shape[-1], field)
        fields = np.zeros((*codes.shape[:-2], groups * lanes, words * field.terms), np.uint32)
        fields[..., : codes.shape[-2], : codes.shape[-1]] = part + field.offset
        # (group, lane, word, j, i) to (group, word, lane), the fields of a word together.
        fields = fields.reshape(*codes.shape[:-2], groups, lanes, words, field.terms // 4, 4)
        shifts = np.arange(4) * 8 + np.arange(field.terms // 4)[:, None] * field.bits
        packed.append((fields << shifts.astype(np.uint32)).sum((-1, -2), dtype=np.uint32).swapaxes(-1, -2))
    return packed


def unpack(packed: list[npt.NDArray[np.uint32]], rows: int, terms: int, planes: int) -> Codes:
    """The matrix of numbers that `pack` was given, (..., rows, terms) int8."""
    total: npt.NDArray[np.int64] | None = None
    for field, words in zip(digits(planes), packed, strict=True):
        shifts = np.arange(4) * 8 + np.arange(field.terms // 4)[:, None] * field.bits
        fields = (words.swapaxes(-1, -2)[..., None, None] >> shifts.astype(np.uint32)) & (2**field.bits - 1)
        outer = words.shape[:-3]
        part = fields.reshape(*outer, words.shape[-3] * LANES, -1)[..., :rows, :terms].astype(np.int64) - field.offset
        total = field.weight * part if total is None else total + field.weight * part
    assert total is not None
    return total.astype(np.int8)


def bytes_a_token(size: int, value_size: int, planes: int) -> float:
    """Of a key and a value of one head, scales included: a block's size over its tokens, where sizes fill words."""
    return (size + value_size) * planes / 4 + 4 * size / BLOCK + 4
