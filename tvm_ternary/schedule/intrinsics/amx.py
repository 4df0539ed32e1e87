"""AMX: tiles of 16 rows of activations times tiles of 16 out_features of a panel, for many rows.

A tile register holds 16 rows of 64 bytes. One instruction, ``tdpbsud``, adds to a 16 x 16 tile of int32 the products of
a tile of x, (16 m, 64 k) signed bytes, and a tile of a panel, (16 quads of k, 16 n, 4 k) unsigned ones. Up to 2 x 2
accumulators share two tiles of x and two of the panel: 8 registers, and as many loads as multiplications.

An `AmxTile` says what one call of the intrinsics computes, a segment of K of a tile of rows and blocks::

    acc[m, c, 0, 0, n] = sum over kb, s, j of x[m, 16 kb + 4 s + j] * panel[c, 0, kb, s, n, j]

which is the update of the panel kernel with all rows, blocks and k's in one. K is taken 64 at a time, or all at once
where a segment is shorter. Every step has the same shape, so one configuration of the tiles serves a function: changing
it in between would clear the accumulators.

TensorIR sees memory and not registers. Of the two intrinsics ``zero`` clears the registers, and ``update`` multiplies
into them and stores them, so each stands for what it says only when the other follows or precedes it: they replace the
two halves that ``decompose_reduction`` makes of one block. `with_tiles` puts the configuration around them.

Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (tiles, ``palette_id``,
permission) and volume 2 (instructions); latencies: Intel Optimization Reference Manual, volume 1, chapter 20.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Op, StringImm
from tvm.s_tir import SBlock, SBlockRealize, TensorIntrin
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B
from tvm_ffi.structural import WalkResult

from tvm_ternary.formats import LANES

ROWS = 16
"""Rows of a tile of x."""
BLOCK = 16
"""k's of a block of a panel, four quads."""
STEP = 4
"""Blocks that one instruction multiplies: 64 k's, the width of a tile."""
_ROW_BYTES = 64
_REGISTERS = 8
_MULTIPLY = "llvm.x86.tdpbsud"
# Linux leaves the tiles' state out of a process that has not asked for it; see Documentation/arch/x86/xstate.rst.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class AmxTile:
    """What one call of the intrinsics computes.

    Attributes
    ----------
    blocks : int
        Blocks of 16 k's in a segment, padding included: at most 4, or a multiple of 4 (see `fits`).
    row_tiles : int
        Tiles of 16 rows of x, 1 or 2.
    column_tiles : int
        Tiles of 16 out_features, 1 or 2.
    """

    blocks: int
    row_tiles: int = 2
    column_tiles: int = 2

    def __post_init__(self) -> None:
        assert self.fits(self.blocks)
        assert self.row_tiles in (1, 2)
        assert self.column_tiles in (1, 2)

    @staticmethod
    def fits(blocks: int) -> bool:
        """Whether segments of so many blocks of 16 k's fall into steps of one shape."""
        return blocks > 0 and (blocks <= STEP or blocks % STEP == 0)

    @property
    def rows(self) -> int:
        """Rows of x."""
        return ROWS * self.row_tiles

    @property
    def step(self) -> int:
        """Blocks of one step: 4, or all of a shorter segment."""
        return min(self.blocks, STEP)


@dataclass(frozen=True)
class AmxIntrinsics:
    """Names of registered tensor intrinsics.

    Attributes
    ----------
    zero : str
        For loops (rows, column_tiles, 16): ``acc[m, c, 0, 0, n] = 0``.
    update : str
        For loops (rows, column_tiles, 16, blocks, 4, 4): ``acc[m, c, 0, 0, n] += int32(panel[c, 0, kb, s, n, j]) *
        int32(x[m, 16 * kb + 4 * s + j])``. The panel is read before x.
    """

    zero: str
    update: str


@cache
def amx_intrinsics(tile: AmxTile) -> AmxIntrinsics:
    """Register the intrinsics of ``tile``.

    Operands are the last dimensions of their arrays: x (rows, 16 * blocks) int8, panel (column_tiles, 1, blocks, 4, 16,
    4) uint8 and acc (rows, column_tiles, 1, 1, 16) int32. Rows of x and acc, and the column tiles of the panel and acc,
    may have any stride. All rows are read and written, so the caller takes a last tile that starts early enough.
    """
    suffix = f"{tile.blocks}.{tile.row_tiles}x{tile.column_tiles}"
    names = AmxIntrinsics(f"ternary.amx.zero.{suffix}", f"ternary.amx.update.{suffix}")
    zero, update = (_zero_function, _update_function)
    TensorIntrin.register(names.zero, zero(tile, _describe_zero), zero(tile, _zero), override=True)
    TensorIntrin.register(names.update, update(tile, _describe_update), update(tile, _update), override=True)
    return names


def with_tiles(function: tirx.PrimFunc, tile: AmxTile) -> tirx.PrimFunc:
    """Configure the tiles in each parallel loop that uses them, and release them there.

    A thread has its own registers, so the configuration is loaded inside the loop, once an iteration: for work of a few
    tiles its 200 cycles would be felt. Where no loop is parallel, it is the outermost one. Before the loop the process
    asks for permission to use tiles, which is a short system call and works once for all threads; where it is refused,
    the function returns an error.

    Parameters
    ----------
    function : tirx.PrimFunc
        Scheduled, with the intrinsics of ``tile`` inside loops.
    tile : AmxTile

    Returns
    -------
    tirx.PrimFunc
    """
    chosen: list[tirx.For] = []

    def choose(loop: tirx.For) -> WalkResult:
        if not _uses_tiles(loop):
            return WalkResult.SKIP
        if any(inner.kind == tirx.ForKind.PARALLEL and _uses_tiles(inner) for inner in _all(tirx.For, loop.body)):
            return WalkResult.ADVANCE
        chosen.append(loop)
        return WalkResult.SKIP

    def configure(loop: tirx.For) -> tirx.Stmt:
        if not any(loop.same_as(other) for other in chosen):
            return loop
        body = _configured(loop.body, tile)
        inside = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, annotations=loop.annotations)
        return tirx.SeqStmt([_permission(), inside])

    tvm_ffi.structural_walk(function.body, (tirx.For, choose), order="pre")
    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, configure)))


def _all(kind: type[Any], root: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (kind, found.append))
    return found


def _uses_tiles(stmt: tirx.Stmt) -> bool:
    multiply = T.llvm_lookup_intrinsic_id(_MULTIPLY)
    calls = (call for call in _all(Call, stmt) if isinstance(call.op, Op) and call.op.name == "tirx.call_llvm_intrin")
    return any(int(call.args[0]) == multiply for call in calls)


def _permission() -> tirx.Stmt:
    asked = T.call_extern("int64", "syscall", T.int64(_ARCH_PRCTL), T.int64(_REQUEST_PERMISSION), T.int64(_TILE_DATA))
    message = "the operating system refuses AMX tiles to this process; compile for the target avx512-vnni"
    # TVM's wrapper hands its arguments on in another order than the constructor has: the condition goes first.
    return tirx.AssertStmt(tirx.EQ(asked, tirx.const(0, "int64")), StringImm("RuntimeError"), [StringImm(message)])


def _configured(body: tirx.Stmt, tile: AmxTile) -> tirx.Stmt:
    words = tirx.decl_buffer((16,), "int32", "tiles")
    values = memoryview(configuration(tile)).cast("i")
    stores = [tirx.BufferStore(words, tirx.const(value, "int32"), [i]) for i, value in enumerate(values)]
    load = tirx.Evaluate(_call("llvm.x86.ldtilecfg", T.address_of(words[0])))
    release = tirx.Evaluate(_call("llvm.x86.tilerelease"))
    sequence = tirx.SeqStmt([*stores, load, body, release])
    return SBlockRealize([], True, SBlock([], [], [], "tiles", sequence, alloc_buffers=[words]))


def configuration(tile: AmxTile) -> bytes:
    """The 64 bytes that ``ldtilecfg`` reads: palette 1, then for each register its bytes a row and its rows."""
    shapes = [
        *[(_ROW_BYTES, ROWS)] * (tile.row_tiles * tile.column_tiles),
        *[(BLOCK * tile.step, ROWS)] * tile.row_tiles,
        *[(_ROW_BYTES, 4 * tile.step)] * tile.column_tiles,
    ]
    shapes += [(0, 0)] * (16 - len(shapes))
    row_bytes = b"".join(width.to_bytes(2, "little") for width, _ in shapes)
    return bytes([1, *[0] * 15]) + row_bytes + bytes(rows for _, rows in shapes)


def _call(name: str, *operands: Any) -> Any:
    """A call of an LLVM intrinsic that works on registers TVM does not know."""
    return T.call_llvm_intrin("void", T.llvm_lookup_intrinsic_id(name), *operands)


def _registers(tile: AmxTile) -> tuple[list[list[int]], list[int], list[int]]:
    """Numbers of the accumulators [row tile][column tile], of the tiles of x and of those of the panel."""
    columns, count = tile.column_tiles, tile.row_tiles * tile.column_tiles
    acc = [[row * columns + column for column in range(columns)] for row in range(tile.row_tiles)]
    x = [count + row for row in range(tile.row_tiles)]
    panel = [count + tile.row_tiles + column for column in range(columns)]
    assert panel[-1] < _REGISTERS
    return acc, x, panel


def _zero(tile: AmxTile, acc: Any) -> None:
    for register in range(tile.row_tiles * tile.column_tiles):
        B.evaluate(_call("llvm.x86.tilezero", T.uint8(register)))


def _update(tile: AmxTile, x: Any, panel: Any, acc: Any) -> None:
    with B.serial(0, tile.blocks // tile.step) as step:
        _multiply_step(tile, x, panel, step * tile.step)
    for row, registers in enumerate(_registers(tile)[0]):
        for column, register in enumerate(registers):
            place = T.address_of(acc[ROWS * row, column, 0, 0, 0])
            _move("llvm.x86.tilestored64", register, place, acc.strides[0] * 4)


def _multiply_step(tile: AmxTile, x: Any, panel: Any, kb: Any) -> None:
    """Each tile is loaded right before the first multiplication that needs it."""
    acc, x_registers, panel_registers = _registers(tile)
    for row, a in enumerate(x_registers):
        _move("llvm.x86.tileloadd64", a, T.address_of(x[ROWS * row, kb * BLOCK]), x.strides[0])
        for column, b in enumerate(panel_registers):
            if row == 0:
                _move("llvm.x86.tileloadd64", b, T.address_of(panel[column, 0, kb, 0, 0, 0]), T.int64(_ROW_BYTES))
            B.evaluate(_call(_MULTIPLY, *map(T.uint8, (acc[row][column], a, b))))


def _move(name: str, register: int, place: Any, stride: Any) -> None:
    B.evaluate(_call(name, T.uint8(register), place, T.Cast("int64", stride)))


def _describe_zero(tile: AmxTile, acc: Any) -> None:
    def store(m: Any, c: Any, n: Any) -> None:
        B.buffer_store(acc, T.int32(0), [m, c, 0, 0, n])

    _block("zero", (tile.rows, tile.column_tiles, LANES), "SSS", store)


def _describe_update(tile: AmxTile, x: Any, panel: Any, acc: Any) -> None:
    def add(m: Any, c: Any, n: Any, kb: Any, s: Any, j: Any) -> None:
        product = T.Cast("int32", panel[c, 0, kb, s, n, j]) * T.Cast("int32", x[m, kb * BLOCK + s * 4 + j])
        B.buffer_store(acc, acc[m, c, 0, 0, n] + product, [m, c, 0, 0, n])

    _block("update", (tile.rows, tile.column_tiles, LANES, tile.blocks, 4, 4), "SSSRRR", add)


def _block(name: str, extents: tuple[int, ...], kinds: str, emit: Callable[..., None]) -> None:
    """One block in loops of these extents. A loop of extent 1 has no axis: TVM drops it from the block that a
    description is compared with."""
    kept = [i for i, extent in enumerate(extents) if extent > 1]
    with B.grid(*extents) as loops, B.sblock(name):
        axes = B.axis.remap("".join(kinds[i] for i in kept), [loops[i] for i in kept])
        indices: list[Any] = [0] * len(extents)
        for i, axis in zip(kept, axes, strict=True):
            indices[i] = axis
        emit(*indices)


def _operand(name: str, shape: tuple[int, ...], dtype: str, free: int) -> tuple[Any, Any]:
    """An argument whose first ``free`` dimensions have strides of their own, and the region of all of it."""
    strides: list[Any] = [tirx.Var(f"{name}_stride{i}", "int64") for i in range(free)]
    strides += [prod(shape[i + 1 :]) for i in range(free, len(shape))]
    buffer = B.arg(name, B.buffer(shape, dtype, strides=strides, offset_factor=1))
    return buffer, buffer[tuple(slice(0, extent) for extent in shape)]


def _accumulators(tile: AmxTile) -> tuple[Any, Any]:
    return _operand("acc", (tile.rows, tile.column_tiles, 1, 1, LANES), "int32", 4)


def _zero_function(tile: AmxTile, emit: Callable[..., None]) -> tirx.PrimFunc:
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("amx_zero")
        acc, region = _accumulators(tile)
        with B.sblock("root"):
            B.reads()
            B.writes(region)
            emit(tile, acc)
    return builder.get()


def _update_function(tile: AmxTile, emit: Callable[..., None]) -> tirx.PrimFunc:
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("amx_update")
        x, x_region = _operand("x", (tile.rows, BLOCK * tile.blocks), "int8", 1)
        panel, panel_region = _operand("panel", (tile.column_tiles, 1, tile.blocks, 4, LANES, 4), "uint8", 2)
        acc, region = _accumulators(tile)
        with B.sblock("root"):
            B.reads(region, panel_region, x_region)
            B.writes(region)
            emit(tile, x, panel, acc)
    return builder.get()
