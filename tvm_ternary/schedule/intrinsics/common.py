"""What the intrinsics of several tiers are made of: vector expressions, and blocks built on a byte dot product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from tvm_ternary.formats import LANES

Emit = Callable[[Any, Any, Any], None]
"""(weight, activations, accumulators) -> emits the update of sixteen accumulators by one block."""

_AHEAD = 1024
"""Bytes: of 256 to 4,096, the best or as good for weights from memory, and no loss for those from a cache."""
_LINE = 64


@dataclass(frozen=True)
class ByteDot:
    """A tier's dot product of bytes, in the width of its registers.

    Attributes
    ----------
    lanes : int
        32-bit lanes of one instruction; 16 is a multiple.
    add : callable
        (acc int32 x lanes, a uint8 x 4 lanes, b int8 x 4 lanes) -> acc[i] + sum over j of a[4 i + j] * b[4 i + j].
        No value of a may exceed 127: then two products fit in 16 bits, and a is the same as signed bytes.
    """

    lanes: int
    add: Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class PairDot:
    """A tier's dot product of pairs of 16-bit numbers, in the width of its registers.

    Attributes
    ----------
    lanes : int
        32-bit lanes of one instruction.
    add : callable
        (acc int32 x lanes, a int16 x 2 lanes, b int16 x 2 lanes) -> acc[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1].
        The sum wraps.
    """

    lanes: int
    add: Callable[[Any, Any, Any], Any]


def vector(buffer: Any, start: int, lanes: int, dtype: str) -> Any:
    """Load ``lanes`` values of a buffer of one dimension."""
    return buffer.vload([start], f"{dtype}x{lanes}")


def store(buffer: Any, start: int, lanes: int, value: Any) -> None:
    """Store a vector into a buffer of one dimension."""
    B.buffer_store(buffer, value, [tirx.Ramp(start, 1, lanes)])


def field(words: Any, shift: int, mask: int, lanes: int) -> Any:
    """(words >> shift) & mask, lane by lane."""
    shifted = words if shift == 0 else T.shift_right(words, T.broadcast(T.uint32(shift), lanes))
    return T.bitwise_and(shifted, T.broadcast(T.uint32(mask), lanes))


def code_bytes(words: Any, s: int, lanes: int) -> Any:
    """The codes of k = 4 s to 4 s + 3 of each word, as bytes."""
    return T.reinterpret(field(words, 2 * s, 0x03030303, lanes), dtype=f"uint8x{4 * lanes}")


def four_bytes(x: Any, start: int, lanes: int) -> Any:
    """x[start : start + 4] repeated over lanes words of four bytes."""
    word = T.reinterpret(x.vload([start], "int8x4"), dtype="int32")
    return T.reinterpret(T.broadcast(word, lanes), dtype=f"int8x{4 * lanes}")


def llvm(name: str, dtype: str, *args: Any) -> Any:
    """The result of an LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def prefetch(address: Any, *, to_write: bool = False) -> tirx.Evaluate:
    """Ask for the line at an address, to be kept; one that is not there is no fault."""
    read, keep, data = T.int32(int(to_write)), T.int32(3), T.int32(1)
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    return tirx.Evaluate(T.call_llvm_intrin("void", intrinsic, address, read, keep, data))


def reading_ahead(emit: Emit) -> Emit:
    """Ask for the weights `_AHEAD` bytes further on, then do the block.

    A tile reads several blocks of out_features side by side, more streams than a CPU's own prefetcher follows well.
    Beyond the end of an array nothing is read: a prefetch cannot fault.
    """

    def ahead(weight: Any, x: Any, acc: Any) -> None:
        lines = weight.shape[0] if len(weight.shape) == 2 else 1
        for line in range(int(lines)):
            first = [_AHEAD // _LINE + line, 0] if len(weight.shape) == 2 else [_AHEAD // 4]
            B.evaluate(prefetch(T.address_of(weight[tuple(first)])).value)
        emit(weight, x, acc)

    return ahead


def int8_block(dot: ByteDot) -> Emit:
    """16 k x 16 n of `matmul_a8`: each two bits of the words are moved to the bottom of their byte, then multiplied."""

    def emit(weight: Any, x: Any, acc: Any) -> None:
        for start in range(0, LANES, dot.lanes):
            words = vector(weight, start, dot.lanes, "uint32")
            total = vector(acc, start, dot.lanes, "int32")
            for s in range(4):
                total = dot.add(total, code_bytes(words, s, dot.lanes), four_bytes(x, 4 * s, dot.lanes))
            store(acc, start, dot.lanes, total)

    return emit


def ternary_block(dot: ByteDot, *, apart: bool) -> Emit:
    """32 k x 16 n of `matmul_a1`: bits are counted in bytes, and a dot product sums the counts of a word.

    A byte's part of the result is pop(both) - 2 pop(minus), between -8 and 8.

    Parameters
    ----------
    dot : ByteDot
    apart : bool
        Whether the two counts are summed apart, with the factors 1 and -2: better where a dot product is one
        instruction.
    """

    def emit(weight: Any, x: Any, acc: Any) -> None:
        lanes = dot.lanes
        for start in range(0, LANES, lanes):
            both = T.bitwise_and(weight.vload([0, start], f"uint32x{lanes}"), T.broadcast(x[0], lanes))
            signs = T.bitwise_xor(weight.vload([1, start], f"uint32x{lanes}"), T.broadcast(x[1], lanes))
            same, minus = _counts(both, lanes), _counts(T.bitwise_and(both, signs), lanes)
            total = vector(acc, start, lanes, "int32")
            if apart:
                total = dot.add(total, same, T.broadcast(T.int8(1), 4 * lanes))
                total = dot.add(total, minus, T.broadcast(T.int8(-2), 4 * lanes))
            else:
                part = T.reinterpret(same - minus - minus, dtype=f"int8x{4 * lanes}")
                total = dot.add(total, T.broadcast(T.uint8(1), 4 * lanes), part)
            store(acc, start, lanes, total)

    return emit


def _counts(words: Any, lanes: int) -> Any:
    """The bits set in each byte."""
    return T.popcount(T.reinterpret(words, dtype=f"uint8x{4 * lanes}"))
