"""Dot products of x86-64: of bytes, and of pairs of 16-bit numbers.

With VNNI either is one instruction; without, bytes are multiplied and added in pairs twice, 16-bit numbers once.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_ternary.formats import LANES
from tvm_ternary.schedule.intrinsics.common import (
    ByteDot,
    Emit,
    PairDot,
    code_bytes,
    four_bytes,
    llvm,
    store,
    vector,
)

_PAIRS = {
    4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
}
"""32-bit lanes to pmaddubsw (byte pairs to 16 bits) and pmaddwd (16-bit pairs to 32 bits)."""


def vnni(lanes: int) -> ByteDot:
    """vpdpbusd; LLVM takes the encoding, VEX or EVEX, that the target has."""
    name, dtype = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", f"int32x{lanes}"
    return ByteDot(lanes, lambda acc, a, b: llvm(name, dtype, acc, a, b))


def pairs(lanes: int) -> ByteDot:
    """pmaddubsw, whose 16-bit sums of two do not saturate, and pmaddwd."""
    return ByteDot(lanes, lambda acc, a, b: acc + widened(byte_pairs(a, b, lanes), lanes))


def vnni_pairs(lanes: int) -> PairDot:
    """vpdpwssd."""
    name, dtype = f"llvm.x86.avx512.vpdpwssd.{32 * lanes}", f"int32x{lanes}"
    return PairDot(lanes, lambda acc, a, b: llvm(name, dtype, acc, a, b))


def word_pairs(lanes: int) -> PairDot:
    """pmaddwd and an addition."""
    return PairDot(lanes, lambda acc, a, b: acc + llvm(_PAIRS[lanes][1], f"int32x{lanes}", a, b))


def byte_pairs(a: Any, b: Any, lanes: int) -> Any:
    """a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] as 16 bits, a unsigned and b signed bytes."""
    return llvm(_PAIRS[lanes][0], f"int16x{2 * lanes}", a, b)


def widened(halves: Any, lanes: int, factor: int = 1) -> Any:
    """(halves[2 i] + halves[2 i + 1]) * factor as 32 bits."""
    return llvm(_PAIRS[lanes][1], f"int32x{lanes}", halves, T.broadcast(T.int16(factor), 2 * lanes))


def int8_pairs(lanes: int) -> Emit:
    """Byte pairs to 16 bits, four of them added, then 16-bit pairs to 32 bits.

    A 16-bit lane holds eight products of a code (0 to 2) and an activation (-127 to 127), at most 2,032.
    """

    def emit(weight: Any, x: Any, acc: Any) -> None:
        for start in range(0, LANES, lanes):
            words = vector(weight, start, lanes, "uint32")
            half: Any = None
            for s in range(4):
                product = byte_pairs(code_bytes(words, s, lanes), four_bytes(x, 4 * s, lanes), lanes)
                half = product if half is None else half + product
            store(acc, start, lanes, vector(acc, start, lanes, "int32") + widened(half, lanes))

    return emit
