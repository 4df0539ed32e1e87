"""The ternary matmul as a TensorIR computation: one skeleton for every kind of activation.

    y[m, n] = x_scale[m] * sum over planes p and groups g of scale[p, g, n] * dot(t[p, n, g], x[m, g]) + bias[n]

Blocks, which is all a schedule needs to know:

``panel``
    only in variants that have one: the weights decoded to bytes, planes summed;
``acc``
    the dot products of one segment of K (a group, or a part of a long one), in the accumulator's dtype (exact for
    integer activations);
``total``
    their sum over planes and segments in float32, each times its scales;
``y``
    the epilogue: the row's scale, bias, activation function, residual, the store.

Weights come in blocks of 16 out_features (see ``formats.layouts``), so a vector lane is an output and no sum ever
crosses lanes. Rows and blocks are counted in tiles. Where a tile reaches past the last row or block, it reads the last
one again (an index is clamped) and only the store is guarded: any M and N run the same code and nothing outside an
array is touched.

What differs between kinds of activation (their operands, one multiply-add, the zero-point) is a `MatmulKernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.shape import MatmulShape, Variant, ceil_div

Expr = Any  # a TIR expression; TVM's own annotations do not cover what its operators accept


@dataclass(frozen=True)
class Operand:
    """One array of a matmul: its name, dtype and shape for M rows."""

    name: str
    dtype: str
    shape: Callable[[MatmulShape, Expr], tuple[Expr, ...]]


@dataclass(frozen=True)
class MatmulKernel:
    """One way to multiply activations by ternary weights.

    Attributes
    ----------
    name : str
        Its name in the table, the manifest and ``schedules/``.
    layout : str
        The packed layout of the weights, a name of ``formats.layouts``.
    block : int
        k's that one block of that layout holds for each of its 16 rows.
    activations : tuple of Operand
        What the activations become before the matmul.
    weight : Operand
        The packed weight.
    scales : callable
        MatmulShape -> the operands that follow it: what turns sums of trits into floats.
    accumulator : str
        dtype of a segment's dot product.
    steps : tuple of int
        Extents of the loops inside a block of k's.
    multiply_add : callable
        (buffers, row, plane, n_block, k_block, lane, *step) -> what one step adds to the accumulator.
    term : callable
        (buffers, accumulator, `Place`) -> what a segment adds to the result, float32.
    row_scale : callable
        (buffers, row) -> float32 factor of the row, or None for 1.
    panel : Panel, optional
        How the weights are decoded once for many rows; None where they never are.
    """

    name: str
    layout: str
    block: int
    activations: tuple[Operand, ...]
    weight: Operand
    scales: Callable[[MatmulShape], tuple[Operand, ...]]
    accumulator: str
    steps: tuple[int, ...]
    multiply_add: Callable[..., Expr]
    term: Callable[[dict[str, Expr], Expr, Place], Expr]
    row_scale: Callable[..., Expr] | None
    panel: Panel | None = None

    def constants(self, shape: MatmulShape) -> tuple[str, ...]:
        """The names of the weight and its scales."""
        return (self.weight.name, *(operand.name for operand in self.scales(shape)))

    def operands(self, shape: MatmulShape) -> tuple[Operand, ...]:
        """All arrays that the matmul reads, in the order of its parameters, before the epilogue's."""
        return (*self.activations, self.weight, *self.scales(shape))


@dataclass(frozen=True)
class Place:
    """Where a segment's sum belongs: plane, segment of the row, group, column of the padded result; and the row."""

    row: Expr
    plane: Expr
    segment: Expr
    group: Expr
    column: Expr


@dataclass(frozen=True)
class Panel:
    """Weights of a tile decoded to bytes, all planes at once.

    Attributes
    ----------
    weight : Operand
        The decoded weight; what ``matmul`` reads in the place of the packed one.
    decode : callable
        (buffers, MatmulShape, n_block, k_block, group, lane, *step) -> the byte of one weight.
    matmul : callable
        The kernel that multiplies by a decoded weight of that MatmulShape.
    """

    weight: Operand
    decode: Callable[..., Expr]
    matmul: Callable[[MatmulShape], MatmulKernel]


_CUBIC = (2 / math.pi) ** 0.5

EPILOGUES: dict[str, Callable[[Expr], Expr]] = {
    "relu": lambda y: T.max(y, T.float32(0)),
    # x Phi(x) with the exact error function (Hendrycks and Gimpel 2016).
    "gelu": lambda y: y * T.float32(0.5) * (T.float32(1) + T.erf(y * T.float32(0.5**0.5))),
    # The same with a tanh of a cubic in place of the error function, also theirs.
    "gelu_tanh": lambda y: (
        y * T.float32(0.5) * (T.float32(1) + T.tanh(y * (T.float32(_CUBIC) + T.float32(0.044715 * _CUBIC) * y * y)))
    ),
    "silu": lambda y: y / (T.float32(1) + T.exp(T.float32(0) - y)),
}
"""Activation functions that a matmul can apply to its result before storing it."""


@dataclass(frozen=True)
class Epilogue:
    """What happens to a sum before it is stored: activation(sum + bias) + residual.

    Attributes
    ----------
    bias : bool
        Whether the function takes a bias (N,) float32.
    activation : str, optional
        A key of `EPILOGUES`.
    residual : bool
        Whether it takes a residual (M, N) float32, added last.
    """

    bias: bool = False
    activation: str | None = None
    residual: bool = False

    def __str__(self) -> str:
        """What there is, in order: ``bias + gelu + residual``."""
        parts = ("bias" if self.bias else None, self.activation, "residual" if self.residual else None)
        return " + ".join(part for part in parts if part)


PLAIN = Epilogue()
"""Nothing happens to it."""


def define_matmul(
    kernel: MatmulKernel,
    shape: MatmulShape,
    variants: Sequence[Variant],
    *,
    rows: int | None = None,
    epilogue: Epilogue = PLAIN,
) -> tirx.PrimFunc:
    """The unscheduled computation of ``kernel`` for weights of ``shape``.

    Parameters
    ----------
    kernel : MatmulKernel
    shape : MatmulShape
    variants : sequence of Variant
        The tiles in which rows and blocks are counted, in ascending order of the rows they serve: one branch of the
        function each, chosen by M when it runs. Block names end in the variant's index.
    rows : int, optional
        M where it is known; None leaves it symbolic.
    epilogue : Epilogue

    Returns
    -------
    tirx.PrimFunc
        Parameters: the kernel's activations, the packed weight and its scales, bias (N,) float32 and residual (M, N)
        float32 where there are such, and the result y (M, N) float32.
    """
    m = rows if rows is not None else tirx.Var("M", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("ternary_matmul")
        T.func_attr({"tirx.noalias": True})
        buffers = declare_parameters(kernel, shape, m, epilogue)
        finish = EPILOGUES[epilogue.activation] if epilogue.activation else lambda value: value
        bodies = [_Body(kernel, shape, v, m, buffers, finish, str(i)) for i, v in enumerate(variants)]
        emit_branches(m, [(v.max_rows, body.emit) for v, body in zip(variants, bodies, strict=True)])
    return builder.get()


def declare_parameters(kernel: MatmulKernel, shape: MatmulShape, m: Expr, epilogue: Epilogue) -> dict[str, Expr]:
    """Give the function that is being built its parameters, those that `define_matmul` lists: buffers by name."""
    parameters = [
        *((operand.name, operand.shape(shape, m), operand.dtype) for operand in kernel.operands(shape)),
        *([("bias", (shape.n,), "float32")] if epilogue.bias else []),
        *([("residual", (m, shape.n), "float32")] if epilogue.residual else []),
        ("y", (m, shape.n), "float32"),
    ]
    return {name: T.arg(name, T.buffer(extents, dtype)) for name, extents, dtype in parameters}


def emit_branches(m: Expr, branches: list[tuple[int | None, Callable[[], None]]]) -> None:
    """Write: if M <= the first limit: the first branch, else: the rest; the last branch has no condition."""
    (limit, emit), *rest = branches
    if not rest:
        emit()
        return
    assert limit is not None
    with T.If(m <= limit):
        with T.Then():
            emit()
        with T.Else():
            emit_branches(m, rest)


class _Body:
    """Emits the blocks of one variant; the index arithmetic they share lives here.

    Rows are taken in chunks, all of them in one where the variant has no chunk; ``first`` is a chunk's first row and
    ``count`` its number of rows.
    """

    def __init__(
        self,
        kernel: MatmulKernel,
        shape: MatmulShape,
        variant: Variant,
        m: Expr,
        buffers: dict[str, Expr],
        finish: Callable[[Expr], Expr],
        suffix: str,
    ) -> None:
        self.shape, self.variant, self.tile, self.m = shape, variant, variant.tile, m
        self.buffers, self.finish, self.suffix = dict(buffers), finish, suffix
        self.panel = kernel.panel if variant.panel else None
        self.kernel = self.panel.matmul(shape) if self.panel else kernel
        self.planes = 1 if self.panel else shape.planes
        self.block_count = ceil_div(shape.blocks, self.tile.blocks) * self.tile.blocks
        self.first: Expr = 0
        self.count: Expr = m
        self.row_tiles: Expr = 0

    def emit(self) -> None:
        chunk = self.variant.chunk
        if chunk is None:
            self._emit_chunk()
            return
        loop = T.parallel if self.variant.threads == "m" else T.serial
        chunks = (self.m + (chunk - 1)) // chunk
        with loop(0, chunks) as c, T.sblock("chunk" + self.suffix):
            index = T.axis.spatial(chunks, c)
            T.reads()
            T.writes()
            self.first = index * chunk
            self.count = T.min(self.m - self.first, chunk)
            self._emit_chunk()

    def _emit_chunk(self) -> None:
        shape, tile, kernel = self.shape, self.tile, self.kernel
        self.row_tiles = (self.count + (tile.rows - 1)) // tile.rows
        with T.sblock("variant" + self.suffix):
            T.reads()
            T.writes()
            spatial = (self.row_tiles, tile.rows, self.block_count)
            segments = shape.segments(kernel.block)
            if self.panel is not None:
                _, *extents = self.panel.weight.shape(shape, 0)
                self.buffers["panel"] = T.sblock_alloc_buffer((self.block_count, *extents), self.panel.weight.dtype)
                self._decode(self.panel)
            acc = T.sblock_alloc_buffer((*spatial, self.planes, segments, LANES), kernel.accumulator)
            total = T.sblock_alloc_buffer((*spatial, LANES), "float32")
            self._dot_products(acc)
            self._sum_of_segments(acc, total)
            self._epilogue(total)

    def _row(self, outer: Expr, inner: Expr) -> Expr:
        """The row of activations that a tile reads, the chunk's last one where the tile reaches past it."""
        if self.variant.tiles:
            return T.min(self.first + outer * self.tile.rows, self.m - self.tile.rows) + inner
        index = outer * self.tile.rows + inner
        return self.first + (index if self.tile.rows == 1 else T.min(index, self.count - 1))

    def _block(self, index: Expr) -> Expr:
        """The block of out_features that a tile reads, the last one where the tile reaches past it."""
        return index if self.block_count == self.shape.blocks else T.min(index, self.shape.blocks - 1)

    def _decode(self, panel: Panel) -> None:
        kernel, shape, target = self.kernel, self.shape, self.buffers["panel"]
        blocks, splits = shape.segment_blocks(kernel.block), shape.splits(kernel.block)
        extents = (self.block_count, shape.segments(kernel.block), blocks, kernel.steps[0], LANES, kernel.steps[1])
        with T.grid(*extents) as loops, T.sblock("panel" + self.suffix):
            nb, sg, kb, s, lane, j = T.axis.remap("SSSSSS", list(loops))
            value = panel.decode(self.buffers, shape, self._block(nb), sg * blocks + kb, sg // splits, lane, s, j)
            T.buffer_store(target, value, [nb, sg, kb, s, lane, j])

    def _dot_products(self, acc: Expr) -> None:
        shape, kernel = self.shape, self.kernel
        blocks, segments = shape.segment_blocks(kernel.block), shape.segments(kernel.block)
        spatial = (self.row_tiles, self.tile.rows, self.block_count, self.planes, segments, LANES)
        with T.grid(*spatial, blocks, *kernel.steps) as loops, T.sblock("acc" + self.suffix):
            bound = T.axis.remap("SSSSSSR" + "R" * len(kernel.steps), list(loops))
            mo, mi, nb, p, sg, lane, kb, *step = bound
            with T.init():
                T.buffer_store(acc, tirx.const(0, kernel.accumulator), [mo, mi, nb, p, sg, lane])
            block = nb if self.panel else self._block(nb)
            product = kernel.multiply_add(self.buffers, self._row(mo, mi), p, block, sg * blocks + kb, lane, *step)
            T.buffer_store(acc, acc[mo, mi, nb, p, sg, lane] + product, [mo, mi, nb, p, sg, lane])

    def _sum_of_segments(self, acc: Expr, total: Expr) -> None:
        segments, splits = self.shape.segments(self.kernel.block), self.shape.splits(self.kernel.block)
        extents = (self.row_tiles, self.tile.rows, self.block_count, LANES, self.planes, segments)
        with T.grid(*extents) as loops, T.sblock("total" + self.suffix):
            mo, mi, nb, lane, p, sg = T.axis.remap("SSSSRR", list(loops))
            with T.init():
                T.buffer_store(total, T.float32(0), [mo, mi, nb, lane])
            place = Place(self._row(mo, mi), p, sg, sg // splits, self._block(nb) * LANES + lane)
            term = self.kernel.term(self.buffers, acc[mo, mi, nb, p, sg, lane], place)
            T.buffer_store(total, total[mo, mi, nb, lane] + term, [mo, mi, nb, lane])

    def _epilogue(self, total: Expr) -> None:
        """Store whole blocks as vectors; the block that N cuts short, if there is one, value by value."""
        whole, rest = divmod(self.shape.n, LANES)
        with T.grid(self.row_tiles, self.tile.rows, self.block_count, LANES) as loops, T.sblock("y" + self.suffix):
            mo, mi, nb, lane = T.axis.remap("SSSS", list(loops))
            index, n = mo * self.tile.rows + mi, nb * LANES + lane
            m = self._row(mo, mi) if self.variant.tiles else self.first + index
            there = tirx.const(True, "bool") if self.variant.tiles else index < self.count
            T.reads(total[mo, mi, nb, lane])
            T.writes(self.buffers["y"][m, n])
            if whole:
                with T.If(T.And(there, nb < whole)), T.Then():
                    self._store(total[mo, mi, nb, lane], m, n)
            if rest:
                with T.If(T.And(there, nb == whole)), T.Then(), T.If(lane < rest), T.Then():
                    self._store(total[mo, mi, nb, lane], m, n)

    def _store(self, value: Expr, m: Expr, n: Expr) -> None:
        if self.kernel.row_scale is not None:
            value = value * self.kernel.row_scale(self.buffers, m)
        if "bias" in self.buffers:
            value = value + self.buffers["bias"][n]
        value = self.finish(value)
        if "residual" in self.buffers:
            value = value + self.buffers["residual"][m, n]
        T.buffer_store(self.buffers["y"], value, [m, n])
