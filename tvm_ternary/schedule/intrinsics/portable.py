"""Blocks in plain vector operations, which LLVM lowers for every CPU."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_ternary.formats import LANES
from tvm_ternary.schedule.intrinsics.common import ByteDot, field, llvm, store, vector


def _low_halves(words: Any, dtype: str, lanes: int) -> Any:
    """Bits 0 to 15 of each 32-bit lane as a signed number."""
    sixteen = T.broadcast(T.int32(16), lanes)
    return T.shift_right(T.shift_left(T.reinterpret(words, dtype=dtype), sixteen), sixteen)


def _pair_sums(halves: Any, lanes: int) -> Any:
    """The sum of the two signed 16-bit numbers in each 32-bit lane."""
    dtype = f"int32x{lanes}"
    high = T.shift_right(T.reinterpret(halves, dtype=dtype), T.broadcast(T.int32(16), lanes))
    return _low_halves(halves, dtype, lanes) + high


def _dot(acc: Any, a: Any, b: Any) -> Any:
    """Even and odd bytes widened to 16 bits; two products fit into them."""
    halves = f"int16x{2 * LANES}"
    eight = T.broadcast(T.int16(8), 2 * LANES)
    a, b = T.reinterpret(a, dtype=halves), T.reinterpret(b, dtype=halves)
    even = T.bitwise_and(a, T.broadcast(T.int16(0xFF), 2 * LANES)) * T.shift_right(T.shift_left(b, eight), eight)
    # Arithmetic shifts do for a as well, whose bytes are at most 127.
    odd = T.shift_right(a, eight) * T.shift_right(b, eight)
    return acc + _pair_sums(even + odd, LANES)


DOT = ByteDot(LANES, _dot)


def int8(weight: Any, x: Any, acc: Any) -> None:
    """Codes as 16-bit lanes, two to a word: bytes 0 and 2 without a shift by 8, bytes 1 and 3 with it."""
    words = vector(weight, 0, LANES, "uint32")
    halves = f"int16x{2 * LANES}"
    half: Any = None
    for s in range(4):
        for odd in range(2):
            codes = T.reinterpret(field(words, 8 * odd + 2 * s, 0x00030003, LANES), dtype=halves)
            low = T.bitwise_and(T.Cast("int32", x[4 * s + odd]), T.int32(0xFFFF))
            high = T.shift_left(T.Cast("int32", x[4 * s + 2 + odd]), T.int32(16))
            pair = T.reinterpret(T.broadcast(T.bitwise_or(low, high), LANES), dtype=halves)
            half = codes * pair if half is None else half + codes * pair
    store(acc, 0, LANES, vector(acc, 0, LANES, "int32") + _pair_sums(half, LANES))


def _float_fields(weight: Any) -> Any:
    """Words of codes whose low bits are flipped (0, 1, 2 -> 1, 0, 3).

    Such a code in bits 31 and 30 of a float32 reads as +2, +0 or -2, minus twice the trit, which is what `A32`
    accumulates: codes become floats by their bits alone, without a conversion or a table.
    """
    return T.bitwise_xor(vector(weight, 0, LANES, "uint32"), T.broadcast(T.uint32(0x55555555), LANES))


def _add_field(total: Any, words: Any, x: Any) -> Any:
    """Add x times the float in the two highest bits of each word."""
    high = T.bitwise_and(words, T.broadcast(T.uint32(0xC0000000), LANES))
    return total + T.reinterpret(high, dtype=f"float32x{LANES}") * T.broadcast(x, LANES)


def float32(weight: Any, x: Any, acc: Any) -> None:
    """Each code is shifted to the top by itself, so that the rows of a tile share the sixteen shifted words."""
    words, total = _float_fields(weight), vector(acc, 0, LANES, "float32")
    for k in range(16):
        left = 30 - (8 * (k % 4) + 2 * (k // 4))
        moved = words if left == 0 else T.shift_left(words, T.broadcast(T.uint32(left), LANES))
        total = _add_field(total, moved, x[k])
    store(acc, 0, LANES, total)


def float32_narrow(weight: Any, x: Any, acc: Any) -> None:
    """The words move up by two bits at a time, from the highest code down.

    With sixteen registers of four lanes, sixteen independent shifts are spilled as soon as they are made. A fence hides
    that each shift follows another, or LLVM would merge them into those.
    """
    words, total = _float_fields(weight), vector(acc, 0, LANES, "float32")
    floats = f"float32x{LANES}"
    for bit in range(30, -1, -2):
        total = _add_field(total, words, x[4 * (bit % 8 // 2) + bit // 8])
        moved = T.shift_left(words, T.broadcast(T.uint32(2), LANES))
        words = T.reinterpret(
            llvm("llvm.arithmetic.fence", floats, T.reinterpret(moved, dtype=floats)), dtype=f"uint32x{LANES}"
        )
    store(acc, 0, LANES, total)
