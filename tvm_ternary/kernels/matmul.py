"""The ternary matmul as a TensorIR computation: one skeleton for every kind of activation.

    y[m, n] = x_scale[m] * sum over planes p and groups g of scale[p, g, n] * dot(t[p, n, g], x[m, g]) + bias[n]

Three blocks, which is all a schedule needs to know:

``acc``
    the dot products of one group of one plane, in the accumulator's dtype (exact for integer activations);
``total``
    their sum over planes and groups in float32, each times its scale;
``y``
    the epilogue: the row's scale, the bias, the store.

Weights come in blocks of 16 out_features (see ``formats.layouts``), so a vector lane is an output and no sum ever
crosses lanes. Rows and blocks are counted in tiles. Where a tile reaches past the last row or block, it reads the last
one again (an index is clamped) and only the store is guarded: any M and N run the same code and nothing outside an
array is touched.

What differs between kinds of activation (their operands, one multiply-add, the zero-point) is a `MatmulKernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant, ceil_div

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
    accumulator : str
        dtype of a group's dot product.
    steps : tuple of int
        Extents of the loops inside a block of k's.
    multiply_add : callable
        (buffers, row, plane, n_block, k_block, lane, *step) -> what one step adds to the accumulator.
    group_value : callable
        (buffers, accumulator, row, group) -> the group's dot product as float32.
    row_scale : callable
        (buffers, row) -> float32 factor of the row, or None for 1.
    """

    name: str
    layout: str
    block: int
    activations: tuple[Operand, ...]
    weight: Operand
    accumulator: str
    steps: tuple[int, ...]
    multiply_add: Callable[..., Expr]
    group_value: Callable[..., Expr]
    row_scale: Callable[..., Expr] | None


EPILOGUES: dict[str, Callable[[Expr], Expr]] = {
    "relu": lambda y: T.max(y, T.float32(0)),
    # x Phi(x) with the exact error function (Hendrycks and Gimpel 2016).
    "gelu": lambda y: y * T.float32(0.5) * (T.float32(1) + T.erf(y * T.float32(0.5**0.5))),
    "silu": lambda y: y / (T.float32(1) + T.exp(T.float32(0) - y)),
}
"""Activation functions that a matmul can apply to its result before storing it."""


@dataclass(frozen=True)
class Epilogue:
    """What happens to a sum before it is stored: a bias is added, then an activation function applied.

    Attributes
    ----------
    bias : bool
        Whether the function takes a bias (N,) float32.
    activation : str, optional
        A key of `EPILOGUES`.
    """

    bias: bool = False
    activation: str | None = None


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
        Parameters: the kernel's activations, the packed weight, scale (P, G, 16 * blocks) float32, bias (N,) float32
        where there is one, and the result y (M, N) float32.
    """
    m = rows if rows is not None else tirx.Var("M", "int64")
    operands = [
        *((operand.name, operand.shape(shape, m), operand.dtype) for operand in (*kernel.activations, kernel.weight)),
        ("scale", (shape.planes, shape.groups, shape.blocks * LANES), "float32"),
        *([("bias", (shape.n,), "float32")] if epilogue.bias else []),
        ("y", (m, shape.n), "float32"),
    ]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("ternary_matmul")
        T.func_attr({"tirx.noalias": True})
        buffers = {name: T.arg(name, T.buffer(extents, dtype)) for name, extents, dtype in operands}
        finish = EPILOGUES[epilogue.activation] if epilogue.activation else lambda value: value
        bodies = [_Body(kernel, shape, v.tile, m, buffers, finish, str(i)) for i, v in enumerate(variants)]
        _emit_branches(m, [(v.max_rows, body.emit) for v, body in zip(variants, bodies, strict=True)])
    return builder.get()


def _emit_branches(m: Expr, branches: list[tuple[int | None, Callable[[], None]]]) -> None:
    """if M <= the first limit: the first branch, else: the rest; the last branch has no condition."""
    (limit, emit), *rest = branches
    if not rest:
        emit()
        return
    assert limit is not None
    with T.If(m <= limit):
        with T.Then():
            emit()
        with T.Else():
            _emit_branches(m, rest)


class _Body:
    """Emits the three blocks of one variant; the tile-clamping index arithmetic they share lives here."""

    def __init__(
        self,
        kernel: MatmulKernel,
        shape: MatmulShape,
        tile: Tile,
        m: Expr,
        buffers: dict[str, Expr],
        finish: Callable[[Expr], Expr],
        suffix: str,
    ) -> None:
        self.kernel, self.shape, self.tile, self.m = kernel, shape, tile, m
        self.buffers, self.finish, self.suffix = buffers, finish, suffix
        self.row_tiles = (m + (tile.rows - 1)) // tile.rows
        self.block_count = ceil_div(shape.blocks, tile.blocks) * tile.blocks

    def row(self, outer: Expr, inner: Expr) -> Expr:
        """The row of activations that a tile reads, the last one where the tile reaches past it."""
        index = outer * self.tile.rows + inner
        return index if self.tile.rows == 1 else T.min(index, self.m - 1)

    def block(self, index: Expr) -> Expr:
        """The block of out_features that a tile reads, the last one where the tile reaches past it."""
        return index if self.block_count == self.shape.blocks else T.min(index, self.shape.blocks - 1)

    def emit(self) -> None:
        with T.sblock("variant" + self.suffix):
            T.reads()
            T.writes()
            self._emit_blocks()

    def _emit_blocks(self) -> None:
        shape, tile = self.shape, self.tile
        acc = T.sblock_alloc_buffer(
            (self.row_tiles, tile.rows, self.block_count, shape.planes, shape.groups, LANES),
            self.kernel.accumulator,
        )
        total = T.sblock_alloc_buffer((self.row_tiles, tile.rows, self.block_count, LANES), "float32")
        self._dot_products(acc)
        self._sum_of_groups(acc, total)
        self._epilogue(total)

    def _dot_products(self, acc: Expr) -> None:
        shape, kernel = self.shape, self.kernel
        blocks = shape.group_blocks(kernel.block)
        spatial = (self.row_tiles, self.tile.rows, self.block_count, shape.planes, shape.groups, LANES)
        with T.grid(*spatial, blocks, *kernel.steps) as loops, T.sblock("acc" + self.suffix):
            bound = T.axis.remap("SSSSSSR" + "R" * len(kernel.steps), list(loops))
            mo, mi, nb, p, g, lane, kb, *step = bound
            with T.init():
                T.buffer_store(acc, tirx.const(0, kernel.accumulator), [mo, mi, nb, p, g, lane])
            product = kernel.multiply_add(
                self.buffers, self.row(mo, mi), p, self.block(nb), g * blocks + kb, lane, *step
            )
            T.buffer_store(acc, acc[mo, mi, nb, p, g, lane] + product, [mo, mi, nb, p, g, lane])

    def _sum_of_groups(self, acc: Expr, total: Expr) -> None:
        shape = self.shape
        extents = (self.row_tiles, self.tile.rows, self.block_count, LANES, shape.planes, shape.groups)
        with T.grid(*extents) as loops, T.sblock("total" + self.suffix):
            mo, mi, nb, lane, p, g = T.axis.remap("SSSSRR", list(loops))
            with T.init():
                T.buffer_store(total, T.float32(0), [mo, mi, nb, lane])
            value = self.kernel.group_value(self.buffers, acc[mo, mi, nb, p, g, lane], self.row(mo, mi), g)
            T.buffer_store(
                total,
                total[mo, mi, nb, lane] + self.buffers["scale"][p, g, self.block(nb) * LANES + lane] * value,
                [mo, mi, nb, lane],
            )

    def _epilogue(self, total: Expr) -> None:
        """Store whole blocks as vectors; the block that N cuts short, if there is one, value by value."""
        whole, rest = divmod(self.shape.n, LANES)
        with T.grid(self.row_tiles, self.tile.rows, self.block_count, LANES) as loops, T.sblock("y" + self.suffix):
            mo, mi, nb, lane = T.axis.remap("SSSS", list(loops))
            m, n = mo * self.tile.rows + mi, nb * LANES + lane
            T.reads(total[mo, mi, nb, lane])
            T.writes(self.buffers["y"][m, n])
            if whole:
                with T.If(T.And(m < self.m, nb < whole)), T.Then():
                    self._store(total[mo, mi, nb, lane], m, n)
            if rest:
                with T.If(T.And(m < self.m, nb == whole)), T.Then(), T.If(lane < rest), T.Then():
                    self._store(total[mo, mi, nb, lane], m, n)

    def _store(self, value: Expr, m: Expr, n: Expr) -> None:
        if self.kernel.row_scale is not None:
            value = value * self.kernel.row_scale(self.buffers, m)
        if "bias" in self.buffers:
            value = value + self.buffers["bias"][n]
        T.buffer_store(self.buffers["y"], self.finish(value), [m, n])
