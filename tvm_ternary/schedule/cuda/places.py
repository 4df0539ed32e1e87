"""Where a thread of a CUDA matmul is: in the grid, in K, in shared memory. Index arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.schedule.cuda.cut import Cut

Expr = Any


@contextmanager
def unrolled(extent: int) -> Iterator[Expr]:
    """A loop that the CUDA compiler unrolls; no loop where there is one iteration."""
    if extent == 1:
        yield 0
        return
    with T.unroll(0, extent, annotations={"pragma_unroll_explicit": tirx.const(0, "int32")}) as i:
        yield i


@contextmanager
def when(condition: Expr | bool) -> Iterator[None]:
    """Do what follows if the condition holds, which may be known to."""
    if condition is True:
        yield
        return
    with T.If(condition), T.Then():
        yield


@dataclass(frozen=True)
class Where:
    """Where in K an iteration of a warp is: unit, plane, segment, step of the segment; and whether there is such."""

    plane: Expr
    segment: Expr
    step: Expr
    there: Expr | bool


class Places:
    """A thread's places.

    Attributes
    ----------
    thread, lane : Expr
        Its number in the block and in the warp; ``lane = 4 g + t``.
    g, t : Expr
    warp_n, warp_k : Expr
        Which warp along N and along K it belongs to.
    first_row, last_row : Expr
        The first row of the block's tile, and the last one of all.
    first_block : Expr
        The first block of 16 outputs of its warp.
    """

    def __init__(self, cut: Cut, m: Expr, bx: Expr, by: Expr, thread: Expr) -> None:
        v = cut.variant
        self.cut, self.variant, self.shape, self.operands = cut, v, cut.shape, cut.operands
        self.thread, self.lane, warp = thread, thread % 32, thread // 32
        self.g, self.t = self.lane // 4, self.lane % 4
        self.warp_n, self.warp_k = warp % v.warps_n, warp // v.warps_n
        self.first_row, self.last_row = T.Cast("int32", bx) * v.rows, T.Cast("int32", m) - 1
        self.first_block = (T.Cast("int32", by) * v.warps_n + self.warp_n) * (2 * cut.repeats)

    def where(self, iteration: Expr, warp_k: Expr) -> Where:
        """The place of an iteration; the last one's where there is none."""
        unit, inner = iteration // self.cut.unit_steps * self.variant.warps_k + warp_k, iteration % self.cut.unit_steps
        there = True if self.cut.units % self.variant.warps_k == 0 else unit < self.cut.units
        unit = unit if there is True else T.min(unit, self.cut.units - 1)
        if self.cut.whole:
            return Where(0, unit // self.cut.steps, unit % self.cut.steps, there)
        return Where(unit // self.cut.segments, unit % self.cut.segments, inner, there)

    def n_block(self, r: Expr) -> Expr:
        """The block of 16 outputs that this thread's weights are of, the last one where there are no more."""
        return T.min(self.first_block + 2 * r + self.g // 4, self.shape.blocks - 1)

    def n(self, r: Expr) -> Expr:
        """The first of the four outputs that this thread holds, beyond N perhaps."""
        return (self.first_block + 2 * r + self.g // 4) * LANES + self.g % 4 * 4

    def column(self, r: Expr) -> Expr:
        """The same, of the scales, whose rows are padded to whole blocks."""
        return self.n_block(r) * LANES + self.g % 4 * 4

    def row(self, index: Expr) -> Expr:
        """A row of this tile, the last one where there are no more; 64 bits, as M times N may need them."""
        return T.Cast("int64", T.min(self.first_row + index, self.last_row))

    def clamped(self, block: Expr) -> Expr:
        """A block of a segment, the last one where there are no more."""
        return block if self.cut.blocks % self.operands.blocks == 0 else T.min(block, self.cut.blocks - 1)

    def own(self, stage: Expr, index: Expr, offset: int = 0) -> Expr:
        """Where this thread's ``index``-th 16 bytes lie in a stage, ``offset`` bytes behind its start."""
        return stage * self.cut.stage_bytes + (offset + index * (16 * self.variant.threads)) + self.thread * 16

    def own_factor(self, stage: Expr, index: Expr) -> Expr:
        """Where this thread's ``index``-th factors lie in a stage."""
        start = self.cut.factors_start
        return stage * self.cut.stage_bytes + (start + index * (4 * self.variant.threads)) + self.thread * 4

    def terms(self, stage: Expr) -> Expr:
        """Where the sums and scales of activations begin in a stage."""
        return stage * self.cut.stage_bytes + self.cut.terms_start

    def ends(self, where: Where) -> Expr | bool:
        """Whether a step is a segment's last."""
        return where.step == self.cut.steps - 1 if self.cut.steps > 1 else True

    def shared_row(self, stage: Expr, warp_k: Expr, row: Expr) -> Expr:
        """Where a row of the tile begins in a stage."""
        rows = self.variant.rows
        start = self.cut.rows_start
        return stage * self.cut.stage_bytes + start + (warp_k * rows + row) * self.operands.row_bytes
