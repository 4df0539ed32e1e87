"""Tensor intrinsics of the ternary matmuls: what one block of weights means, and how an ISA tier does it.

The description of an intrinsic is made from the kernel's own ``multiply_add``, so the meaning stands in one place; an
implementation is chosen by tier. Each updates the sixteen accumulators of one row of activations with one block of
weights:

==========  ============  ==========================================================================================
kernel      tier          a block of 16 k x 16 n
==========  ============  ==========================================================================================
matmul_a8   avx512-vnni   4 x (shift, and, vpdpbusd)
matmul_a8   avx512        4 x (shift, and, vpmaddubsw, add) then vpmaddwd, add
matmul_a8   avx2          the same on two 256-bit halves
matmul_a8   portable      8 x (shift, and, 16-bit multiply, add), widened once a block
matmul_a32  any           16 x (shift, and, multiply-add), see `_float_fields`
matmul_a1   any           and, xor, and, two vector population counts (32 k x 16 n)
==========  ============  ==========================================================================================

A 16-bit lane holds eight products of a code (0 to 2) and an activation (-127 to 127), at most 2,032: none saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.matmul import MatmulKernel

_Emit = Callable[[Any, Any, Any], None]  # (weight, activations, accumulators) -> emits the update


def _vector(buffer: Any, start: int, lanes: int, dtype: str) -> Any:
    return buffer.vload([start], f"{dtype}x{lanes}")


def _store(buffer: Any, start: int, lanes: int, value: Any) -> None:
    B.buffer_store(buffer, value, [tirx.Ramp(start, 1, lanes)])


def _field(words: Any, shift: int, mask: int, lanes: int) -> Any:
    """(words >> shift) & mask, lane by lane."""
    shifted = words if shift == 0 else T.shift_right(words, T.broadcast(T.uint32(shift), lanes))
    return T.bitwise_and(shifted, T.broadcast(T.uint32(mask), lanes))


def _llvm(name: str, dtype: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def _four_bytes(x: Any, start: int, lanes: int) -> Any:
    """x[start : start + 4] repeated over lanes words of four bytes."""
    word = T.reinterpret(x.vload([start], "int8x4"), dtype="int32")
    return T.reinterpret(T.broadcast(word, lanes), dtype=f"int8x{4 * lanes}")


def _int8_vnni(weight: Any, x: Any, acc: Any) -> None:
    words = _vector(weight, 0, 16, "uint32")
    total = _vector(acc, 0, 16, "int32")
    for s in range(4):
        codes = T.reinterpret(_field(words, 2 * s, 0x03030303, 16), dtype="uint8x64")
        total = _llvm("llvm.x86.avx512.vpdpbusd.512", "int32x16", total, codes, _four_bytes(x, 4 * s, 16))
    _store(acc, 0, 16, total)


def _int8_pairs(lanes: int, byte_pairs: str, word_pairs: str) -> _Emit:
    """Byte pairs to 16 bits, four of them added, then 16-bit pairs to 32 bits: for x86 without a byte dot product."""

    def emit(weight: Any, x: Any, acc: Any) -> None:
        for start in range(0, LANES, lanes):
            words = _vector(weight, start, lanes, "uint32")
            half: Any = None
            for s in range(4):
                codes = T.reinterpret(_field(words, 2 * s, 0x03030303, lanes), dtype=f"uint8x{4 * lanes}")
                product = _llvm(byte_pairs, f"int16x{2 * lanes}", codes, _four_bytes(x, 4 * s, lanes))
                half = product if half is None else half + product
            ones = T.broadcast(T.int16(1), 2 * lanes)
            wide = _llvm(word_pairs, f"int32x{lanes}", half, ones)
            _store(acc, start, lanes, _vector(acc, start, lanes, "int32") + wide)

    return emit


def _int8_portable(weight: Any, x: Any, acc: Any) -> None:
    """Codes as 16-bit lanes, two to a word: bytes 0 and 2 without a shift by 8, bytes 1 and 3 with it."""
    words = _vector(weight, 0, LANES, "uint32")
    half: Any = None
    for s in range(4):
        for odd in range(2):
            codes = T.reinterpret(_field(words, 8 * odd + 2 * s, 0x00030003, LANES), dtype=f"int16x{2 * LANES}")
            low = T.bitwise_and(T.Cast("int32", x[4 * s + odd]), T.int32(0xFFFF))
            high = T.shift_left(T.Cast("int32", x[4 * s + 2 + odd]), T.int32(16))
            pair = T.reinterpret(T.broadcast(T.bitwise_or(low, high), LANES), dtype=f"int16x{2 * LANES}")
            half = codes * pair if half is None else half + codes * pair
    both = T.reinterpret(half, dtype=f"int32x{LANES}")
    sixteen = T.broadcast(T.int32(16), LANES)
    total = T.shift_right(T.shift_left(both, sixteen), sixteen) + T.shift_right(both, sixteen)
    _store(acc, 0, LANES, _vector(acc, 0, LANES, "int32") + total)


def _float_fields(weight: Any) -> Any:
    """Words of codes whose low bits are flipped (0, 1, 2 -> 1, 0, 3).

    Such a code in bits 31 and 30 of a float32 reads as +2, +0 or -2, minus twice the trit, which is what `A32`
    accumulates: codes become floats by their bits alone, without a conversion or a table.
    """
    return T.bitwise_xor(_vector(weight, 0, LANES, "uint32"), T.broadcast(T.uint32(0x55555555), LANES))


def _add_field(total: Any, words: Any, x: Any) -> Any:
    """Add x times the float in the two highest bits of each word."""
    field = T.bitwise_and(words, T.broadcast(T.uint32(0xC0000000), LANES))
    return total + T.reinterpret(field, dtype=f"float32x{LANES}") * T.broadcast(x, LANES)


def _float32(weight: Any, x: Any, acc: Any) -> None:
    """Each code is shifted to the top by itself, so that the rows of a tile share the sixteen shifted words."""
    words, total = _float_fields(weight), _vector(acc, 0, LANES, "float32")
    for k in range(16):
        left = 30 - (8 * (k % 4) + 2 * (k // 4))
        moved = words if left == 0 else T.shift_left(words, T.broadcast(T.uint32(left), LANES))
        total = _add_field(total, moved, x[k])
    _store(acc, 0, LANES, total)


def _float32_portable(weight: Any, x: Any, acc: Any) -> None:
    """The words move up by two bits at a time, from the highest code down.

    With sixteen registers of four lanes, sixteen independent shifts are spilled as soon as they are made. A fence hides
    that each shift follows another, or LLVM would merge them into those.
    """
    words, total = _float_fields(weight), _vector(acc, 0, LANES, "float32")
    floats = f"float32x{LANES}"
    for bit in range(30, -1, -2):
        total = _add_field(total, words, x[4 * (bit % 8 // 2) + bit // 8])
        moved = T.shift_left(words, T.broadcast(T.uint32(2), LANES))
        words = T.reinterpret(
            _llvm("llvm.arithmetic.fence", floats, T.reinterpret(moved, dtype=floats)), dtype=f"uint32x{LANES}"
        )
    _store(acc, 0, LANES, total)


def _ternary(weight: Any, x: Any, acc: Any) -> None:
    lanes = f"int32x{LANES}"
    both = T.bitwise_and(weight.vload([0, 0], f"uint32x{LANES}"), T.broadcast(x[0], LANES))
    signs = T.bitwise_xor(weight.vload([1, 0], f"uint32x{LANES}"), T.broadcast(x[1], LANES))
    same = T.Cast(lanes, T.popcount(both))
    minus = T.Cast(lanes, T.popcount(T.bitwise_and(both, signs)))
    _store(acc, 0, LANES, _vector(acc, 0, LANES, "int32") + same - minus * T.broadcast(T.int32(2), LANES))


IMPLEMENTATIONS: dict[str, dict[str, _Emit]] = {
    "matmul_a8": {
        "avx512-vnni": _int8_vnni,
        "avx512": _int8_pairs(16, "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
        "avx2": _int8_pairs(8, "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
        "portable": _int8_portable,
    },
    "matmul_a32": {
        "avx512-vnni": _float32,
        "avx512": _float32,
        "avx2": _float32,
        "portable": _float32_portable,
    },
    "matmul_a1": {"portable": _ternary},
}
"""Kernel to tier to implementation; a tier without a row of its own takes the portable one."""


@cache
def matmul_intrinsic(kernel: MatmulKernel, tier: str) -> str:
    """Register the intrinsic of ``kernel`` for ``tier`` and return its name."""
    rows = IMPLEMENTATIONS[kernel.name]
    chosen = tier if tier in rows else "portable"
    name = f"ternary.{kernel.name}.{chosen}"
    TensorIntrin.register(name, _function(kernel, _describe(kernel)), _function(kernel, rows[chosen]), override=True)
    return name


class _Block:
    """A buffer of one block that answers to the indices of the whole array: the leading ones are dropped."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __getitem__(self, indices: tuple[Any, ...]) -> Any:
        return self.buffer[tuple(indices[-len(self.buffer.shape) :])]


def _describe(kernel: MatmulKernel) -> _Emit:
    """One block of ``kernel``'s computation, scalar by scalar."""

    def emit(weight: Any, x: Any, acc: Any) -> None:
        with B.grid(LANES, *kernel.steps) as loops, B.sblock("update"):
            indices = list(loops) if kernel.steps else [loops]
            lane, *step = (
                B.axis.remap("S" + "R" * len(kernel.steps), indices) if kernel.steps else [B.axis.remap("S", indices)]
            )
            buffers = {kernel.weight.name: _Block(weight), kernel.activations[0].name: _Block(x)}
            B.buffer_store(acc, acc[lane] + kernel.multiply_add(buffers, 0, 0, 0, 0, lane, *step), [lane])

    return emit


def _function(kernel: MatmulKernel, emit: _Emit) -> tirx.PrimFunc:
    """A function over one block of weights, one block of activations and sixteen accumulators."""
    planes = kernel.layout == "bits"
    weight_shape = (2, LANES) if planes else (LANES,)
    x_shape = (2,) if planes else (kernel.block,)
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name(kernel.name)
        weight = B.arg("w", B.buffer(weight_shape, kernel.weight.dtype, offset_factor=1))
        x = B.arg("x", B.buffer(x_shape, kernel.activations[0].dtype, offset_factor=1))
        acc = B.arg("acc", B.buffer((LANES,), kernel.accumulator, offset_factor=1))
        whole = [slice(0, extent) for extent in weight_shape]
        with B.sblock("root"):
            B.reads(acc[0:LANES], weight[tuple(whole)], x[0 : x_shape[0]])
            B.writes(acc[0:LANES])
            emit(weight, x, acc)
    return builder.get()
