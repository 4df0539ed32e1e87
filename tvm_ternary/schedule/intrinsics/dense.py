"""Dense weights: five trits a byte, taken off by multiplications by three.

A byte q holds digits of base 3 (see `formats.dense`): the next is floor(3 q / 256), and (3 q) mod 256 holds the others.
x86 neither multiplies nor shifts bytes, but two additions make q three times itself, and with the average of two bytes,
avg(a, b) = (a + b + 1) >> 1, an instruction nearly everywhere,

    avg(q, avg(q, 253)) >> 6 = floor(3 q / 256) + 1    for every q from 0 to 255:

it reaches 1 at q = 0, 2 at q = 86 and 3 at q = 171.

A single row of activations needs no digits at all. With q[0] .. q[5] the bytes before and after each, a digit is
(3 q[s] - q[s + 1]) / 256, so that

    256 * sum of digit[s] x[s] = 3 * sum of q[s] x[s] - sum of q[s + 1] x[s],

two dot products in the place of one, but nothing else: 23 operations a block and not 35. Every tier's accumulators are
-256 times the sum of digits, since the second sum can then be added to them as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from tvm_ternary.formats import LANES
from tvm_ternary.formats.dense import DIGITS
from tvm_ternary.kernels.dense import ONE
from tvm_ternary.schedule.intrinsics.common import ByteDot, Emit, field, four_bytes, llvm, store, vector
from tvm_ternary.schedule.intrinsics.x86 import byte_pairs, widened


def dense_block(dot: ByteDot) -> Emit:
    """20 k x 16 n of `matmul_a8_dense`: digit by digit off the bytes of the words, each multiplied as it comes."""
    return _by_digits(dot, _digits, 8)


def dense_block_in_place(dot: ByteDot) -> Emit:
    """The same with digits multiplied where they stand, 64 times too large, where a dot product takes any byte.

    For tiles of several rows, which share the digits.
    """
    return _by_digits(dot, _high_digits, 2)


def _by_digits(dot: ByteDot, digits: Callable[[Any, int], Any], shift: int) -> Emit:
    """``digits`` (q, lanes) are multiplied; their sum, moved up by ``shift`` bits, is 256 times that of the digits."""

    def emit(weight: Any, x: Any, acc: Any) -> None:
        for start in range(0, LANES, dot.lanes):
            total = T.broadcast(T.int32(0), dot.lanes)
            for s, q in enumerate(_remainders(weight, start, dot.lanes, DIGITS)):
                total = dot.add(total, digits(q, dot.lanes), four_bytes(x, 4 * s, dot.lanes))
            _subtract(acc, start, dot.lanes, total, shift)

    return emit


def dense_block_of_one_row(dot: ByteDot) -> Emit:
    """The same without digits, for tiles of one row and dot products that take any unsigned byte: x86's of VNNI."""

    def emit(weight: Any, x: Any, acc: Any) -> None:
        for start in range(0, LANES, dot.lanes):
            before, after = T.broadcast(T.int32(0), dot.lanes), vector(acc, start, dot.lanes, "int32")
            for s, (q, rest) in enumerate(pairwise(_remainders(weight, start, dot.lanes, DIGITS + 1))):
                four = four_bytes(x, 4 * s, dot.lanes)
                before, after = dot.add(before, q, four), dot.add(after, rest, four)
            store(acc, start, dot.lanes, after - (before + before + before))

    return emit


def dense_pairs(lanes: int) -> Emit:
    """The same by x86's sums of byte pairs: a 16-bit lane holds ten products of a digit (0 to 2), at most 2,540."""

    def emit(weight: Any, x: Any, acc: Any) -> None:
        for start in range(0, LANES, lanes):
            half: Any = None
            for s, q in enumerate(_remainders(weight, start, lanes, DIGITS)):
                product = byte_pairs(_digits(q, lanes), four_bytes(x, 4 * s, lanes), lanes)
                half = product if half is None else half + product
            store(acc, start, lanes, vector(acc, start, lanes, "int32") + widened(half, lanes, ONE))

    return emit


def _subtract(acc: Any, start: int, lanes: int, total: Any, left: int) -> None:
    """Subtract ``total`` times 2^left from the accumulators."""
    shifted = T.shift_left(total, T.broadcast(T.int32(left), lanes))
    store(acc, start, lanes, vector(acc, start, lanes, "int32") - shifted)


def _remainders(weight: Any, start: int, lanes: int, count: int) -> list[Any]:
    """The bytes of ``lanes`` words, before a digit is taken off, after one, after two, ...

    Each is three times the one before. A fence hides this: LLVM would make one multiplication of several additions, and
    x86 has no instruction for that. Each has a name: or else TVM's passes, which follow an operand wherever it is
    used, would go through the first one 3^5 times.
    """
    bytes_, floats = f"uint8x{4 * lanes}", f"float32x{lanes}"
    remainders = [B.bind(T.reinterpret(vector(weight, start, lanes, "uint32"), dtype=bytes_))]
    while len(remainders) < count:
        q = remainders[-1]
        tripled = T.reinterpret(q + q + q, dtype=floats)
        remainders.append(B.bind(T.reinterpret(llvm("llvm.arithmetic.fence", floats, tripled), dtype=bytes_)))
    return remainders


def _digits(q: Any, lanes: int) -> Any:
    """The next digit of each byte."""
    words = T.reinterpret(_three_quarters(q, lanes), dtype=f"uint32x{lanes}")
    return T.reinterpret(field(words, 6, 0x03030303, lanes), dtype=f"uint8x{4 * lanes}") - _splat(1, lanes)


def _high_digits(q: Any, lanes: int) -> Any:
    """The next digit of each byte, times 64."""
    return T.bitwise_and(_three_quarters(q, lanes), _splat(0xC0, lanes)) - _splat(64, lanes)


def _three_quarters(q: Any, lanes: int) -> Any:
    """Three quarters of each byte and 64 or so: its two high bits are the next digit and 1."""
    return _average(q, _average(q, _splat(253, lanes), lanes), lanes)


def _average(a: Any, b: Any, lanes: int) -> Any:
    """(a + b + 1) >> 1 without loss, in the form that LLVM knows as one instruction."""
    wide = f"uint16x{4 * lanes}"
    one = T.broadcast(T.uint16(1), 4 * lanes)
    return T.Cast(f"uint8x{4 * lanes}", T.shift_right(T.Cast(wide, a) + T.Cast(wide, b) + one, one))


def _splat(byte: int, lanes: int) -> Any:
    return T.broadcast(T.uint8(byte), 4 * lanes)
