"""Element types that numpy lacks, as the float32 numbers that they stand for; every one of them is exact in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def from_bfloat16(codes: npt.NDArray[np.uint16]) -> Floats:
    """A bfloat16 is the upper half of a float32."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float8_e4m3fn(codes: npt.NDArray[np.uint8]) -> Floats:
    """4 bits of exponent, 3 of mantissa, bias 7; no infinity, and NaN where all exponent and mantissa bits are set."""
    return _table(3, 7, finite=True)[codes]


def from_float8_e5m2(codes: npt.NDArray[np.uint8]) -> Floats:
    """5 bits of exponent, 2 of mantissa, bias 15; infinities and NaN as in IEEE 754."""
    return _table(2, 15, finite=False)[codes]


@cache
def _table(mantissa_bits: int, bias: int, finite: bool) -> Floats:
    """The number that each byte stands for.

    References
    ----------
    Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1.
    """
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes & 0x7F) >> mantissa_bits
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    # Below the smallest exponent the leading one is missing.
    values = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
    if finite:
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        top = exponent == exponent.max()
        values[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    return (sign * values).astype(np.float32)


WIDENED: dict[str, tuple[Any, Callable[[Any], Floats]]] = {
    "bfloat16": (np.uint16, from_bfloat16),
    "float8_e4m3fn": (np.uint8, from_float8_e4m3fn),
    "float8_e5m2": (np.uint8, from_float8_e5m2),
}
"""By name: the numpy type of the stored codes, and what turns them into float32."""
