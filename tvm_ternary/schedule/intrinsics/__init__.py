"""Tensor intrinsics of the ternary matmuls: what one block of weights means, and how an ISA tier does it.

The description of an intrinsic is made from the kernel's own ``multiply_add``, so the meaning stands in one place; an
implementation is chosen by tier. Each updates the sixteen accumulators of one row of activations with one block of
weights:

==========  ======================  ================================================================================
kernel      tier                    a block of 16 k x 16 n
==========  ======================  ================================================================================
matmul_a8   avx512-vnni, amx        4 x (shift, and, vpdpbusd)
matmul_a8   avx2-vnni               the same on two 256-bit halves
matmul_a8   neon-dot                the same with sdot on four 128-bit quarters
matmul_a8   avx512                  4 x (shift, and, vpmaddubsw, add) then vpmaddwd, add
matmul_a8   avx2, sse4              the same on two 256-bit halves, on four 128-bit quarters
matmul_a8   portable                8 x (shift, and, 16-bit multiply, add), widened once a block
a8_dense    any                     5 x (4 or 5 operations, a byte dot product), see `dense` (20 k x 16 n)
a8_panel    any                     4 x a byte dot product, see `panel`
matmul_a32  any                     16 x (shift, and, multiply-add), see `portable`
matmul_a1   any                     and, xor, and, two population counts of bytes, summed by one or two byte dot
                                    products (32 k x 16 n)
==========  ======================  ================================================================================

AMX multiplies whole tiles of rows, so it is no implementation of these; see `amx`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.schedule.intrinsics import arm, portable, x86
from tvm_ternary.schedule.intrinsics.common import ByteDot, Emit, PairDot, int8_block, reading_ahead, ternary_block
from tvm_ternary.schedule.intrinsics.dense import (
    dense_block,
    dense_block_in_place,
    dense_block_of_one_row,
    dense_pairs,
)
from tvm_ternary.schedule.intrinsics.panel import decode_intrinsic, panel_block

__all__ = [
    "BIT_COUNTS",
    "BYTE_DOTS",
    "IMPLEMENTATIONS",
    "PAIR_DOTS",
    "ByteDot",
    "PairDot",
    "decode_intrinsic",
    "matmul_intrinsic",
]

BYTE_DOTS: dict[str, ByteDot] = {
    "portable": portable.DOT,
    "sse4": x86.pairs(4),
    "avx2": x86.pairs(8),
    "avx2-vnni": x86.vnni(8),
    "avx512": x86.pairs(16),
    "avx512-vnni": x86.vnni(16),
    "amx": x86.vnni(16),
    "neon-dot": arm.DOT,
}
"""Tier to its dot product of bytes, the common form of what its blocks are built on."""

PAIR_DOTS: dict[str, PairDot] = {
    "sse4": x86.word_pairs(4),
    "avx2": x86.word_pairs(8),
    "avx2-vnni": x86.vnni_pairs(8),
    "avx512": x86.word_pairs(16),
    "avx512-vnni": x86.vnni_pairs(16),
    "amx": x86.vnni_pairs(16),
}
"""Tier to its dot product of 16-bit pairs, for tiers that multiply twice as many of these at once as floats."""

BIT_COUNTS = frozenset({"avx512-vnni", "amx"})
"""Tiers that count the bits of 32-bit lanes in one instruction."""

_ONE_INSTRUCTION = frozenset({"avx2-vnni", "avx512-vnni", "amx", "neon-dot"})
"""Tiers whose dot product of bytes is a single instruction."""

IMPLEMENTATIONS: dict[str, dict[str, Emit]] = {
    "matmul_a8": {
        "portable": portable.int8,
        "sse4": x86.int8_pairs(4),
        "avx2": x86.int8_pairs(8),
        "avx2-vnni": int8_block(BYTE_DOTS["avx2-vnni"]),
        "avx512": x86.int8_pairs(16),
        "avx512-vnni": int8_block(BYTE_DOTS["avx512-vnni"]),
        "amx": int8_block(BYTE_DOTS["amx"]),
        "neon-dot": int8_block(BYTE_DOTS["neon-dot"]),
    },
    "matmul_a8_dense": {
        "portable": dense_block(BYTE_DOTS["portable"]),
        "sse4": dense_pairs(4),
        "avx2": dense_pairs(8),
        "avx2-vnni": dense_block_in_place(BYTE_DOTS["avx2-vnni"]),
        "avx512": dense_pairs(16),
        "avx512-vnni": dense_block_in_place(BYTE_DOTS["avx512-vnni"]),
        "amx": dense_block_in_place(BYTE_DOTS["amx"]),
        "neon-dot": dense_block(BYTE_DOTS["neon-dot"]),
    },
    "matmul_a8_panel": {tier: panel_block(dot) for tier, dot in BYTE_DOTS.items()},
    "matmul_a32": {
        "portable": portable.float32_narrow,
        "sse4": portable.float32_narrow,
        "avx2": portable.float32,
        "avx2-vnni": portable.float32,
        "avx512": portable.float32,
        "avx512-vnni": portable.float32,
        "amx": portable.float32,
        "neon-dot": portable.float32,
    },
    "matmul_a1": {tier: ternary_block(dot, apart=tier in _ONE_INSTRUCTION) for tier, dot in BYTE_DOTS.items()},
}
"""Kernel to tier to implementation; every tier has a row."""

ONE_ROW: dict[str, dict[str, Emit]] = {
    "matmul_a8_dense": {tier: dense_block_of_one_row(BYTE_DOTS[tier]) for tier in ("avx2-vnni", "avx512-vnni", "amx")}
}
"""What takes the place of an implementation in tiles of one row."""

_WEIGHT_BLOCKS = {"bits": (2, LANES), "codes": (LANES,), "dense": (LANES,), "panel": (4, LANES, 4)}


@cache
def matmul_intrinsic(kernel: MatmulKernel, tier: str, *, ahead: bool = False) -> str:
    """Register the intrinsic of ``kernel`` for ``tier`` and return its name.

    With ``ahead`` it also prefetches the weights of a later block. That is for tiles of one row: LLVM takes a prefetch
    for a change of what it points to, and would load and decode a block again for every further row. Where such tiles
    have an implementation of their own, it is taken.
    """
    name = f"ternary.{kernel.name}.{tier}{'.ahead' if ahead else ''}"
    emit = IMPLEMENTATIONS[kernel.name][tier]
    if ahead:
        emit = reading_ahead(ONE_ROW.get(kernel.name, {}).get(tier, emit))
    TensorIntrin.register(name, _function(kernel, _describe(kernel)), _function(kernel, emit), override=True)
    return name


class _Block:
    """A buffer of one block that answers to the indices of the whole array: the leading ones are dropped."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __getitem__(self, indices: tuple[Any, ...]) -> Any:
        return self.buffer[tuple(indices[-len(self.buffer.shape) :])]


def _describe(kernel: MatmulKernel) -> Emit:
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


def _function(kernel: MatmulKernel, emit: Emit) -> tirx.PrimFunc:
    """A function over one block of weights, one block of activations and sixteen accumulators."""
    weight_shape = _WEIGHT_BLOCKS[kernel.layout]
    x_shape = (2,) if kernel.layout == "bits" else (kernel.block,)
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
