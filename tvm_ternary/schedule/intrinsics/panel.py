"""Panels: decoding a block of codes to bytes, and multiplying by a block of bytes."""

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
from tvm_ternary.kernels.int8 import MIDDLE
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.schedule.intrinsics.common import ByteDot, Emit, code_bytes, four_bytes, store, vector

_Buffers = dict[str, Any]
_BYTES = 4 * LANES


def panel_block(dot: ByteDot) -> Emit:
    """16 k x 16 n of a panel: its bytes are multiplied as they are."""

    def emit(weight: Any, x: Any, acc: Any) -> None:
        for start in range(0, LANES, dot.lanes):
            total = vector(acc, start, dot.lanes, "int32")
            for s in range(4):
                decoded = weight.vload([s, start, 0], f"uint8x{4 * dot.lanes}")
                total = dot.add(total, decoded, four_bytes(x, 4 * s, dot.lanes))
            store(acc, start, dot.lanes, total)

    return emit


@cache
def decode_intrinsic(kernel: MatmulKernel, planes: int) -> str:
    """Register the intrinsic that decodes one block of a panel, any tier's, and return its name."""
    assert kernel.panel is not None
    decode = kernel.panel.decode
    name = f"ternary.{kernel.name}.decode{planes}"

    def describe(buffers: _Buffers) -> None:
        with B.grid(4, LANES, 4) as loops, B.sblock("decode"):
            s, lane, j = B.axis.remap("SSS", list(loops))
            shape = MatmulShape(LANES, kernel.block, planes, 1, kernel.block)
            B.buffer_store(buffers["panel"], decode(buffers, shape, 0, 0, 0, lane, s, j), [0, 0, 0, s, lane, j])

    TensorIntrin.register(name, _function(planes, describe), _function(planes, _decode), override=True)
    return name


def _function(planes: int, emit: Callable[[_Buffers], None]) -> tirx.PrimFunc:
    """A function over one block of codes of all planes, its factors, and one block of the panel."""
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("decode")
        buffers = {"codes": _strided("codes", (planes, 1, 1, LANES), "uint32")}
        if planes > 1:
            buffers["factor"] = _strided("factor", (planes, 1, LANES), "int8")
        buffers["panel"] = _strided("panel", (1, 1, 1, 4, LANES, 4), "uint8")
        regions = {name: buffer[tuple(slice(0, extent) for extent in buffer.shape)] for name, buffer in buffers.items()}
        with B.sblock("root"):
            # In the order in which the block reads them.
            B.reads(*(regions[name] for name in ("factor", "codes") if name in regions))
            B.writes(regions["panel"])
            emit(buffers)
    return builder.get()


def _strided(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    strides = [tirx.Var(f"{name}_stride{i}", "int32") for i in range(len(shape) - 1)]
    return B.arg(name, B.buffer(shape, dtype, strides=[*strides, 1], offset_factor=1))


def _decode(buffers: _Buffers) -> None:
    planes = int(buffers["codes"].shape[0])
    words = [buffers["codes"].vload([p, 0, 0, 0], f"uint32x{LANES}") for p in range(planes)]
    factors = []
    if planes > 1:
        factors = [_four_times(buffers["factor"].vload([p, 0, 0], f"int8x{LANES}")) for p in range(planes)]
    for s in range(4):
        value = _weighted_sum(words, factors, s) if factors else code_bytes(words[0], s, LANES)
        B.buffer_store(buffers["panel"], value, [0, 0, 0, s, 0, tirx.Ramp(0, 1, _BYTES)])


def _four_times(values: Any) -> Any:
    """Each of sixteen bytes four times."""
    words = T.bitwise_and(T.Cast(f"uint32x{LANES}", values), T.broadcast(T.uint32(0xFF), LANES))
    return T.reinterpret(words * T.broadcast(T.uint32(0x01010101), LANES), dtype=f"uint8x{_BYTES}")


def _weighted_sum(words: list[Any], factors: list[Any], s: int) -> Any:
    """Bit 0 of a code (t = 0) adds its plane's factor once, bit 1 (t = 1) twice, to the middle less all factors.

    Nothing is used twice in what is written down: TVM's passes would go through the first sum 4^planes times.
    """
    value = _splat(MIDDLE)
    for factor in factors:
        value = value - factor
    for word, factor in zip(words, factors, strict=True):
        codes = T.reinterpret(word, dtype=f"uint8x{_BYTES}")
        for bit, amount in ((1, factor), (2, factor + factor)):
            there = T.bitwise_and(codes, _splat(bit << (2 * s))) != _splat(0)
            value = value + T.Select(there, amount, _splat(0))
    return value


def _splat(byte: int) -> Any:
    return T.broadcast(T.uint8(byte), _BYTES)
