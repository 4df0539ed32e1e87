"""What a CUDA matmul copies to shared memory while it multiplies what was copied before."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.operands import Place, at
from tvm_ternary.schedule.cuda.places import Places, unrolled, when

Expr = Any


class Copies:
    """Begins the copies of a thread.

    Parameters
    ----------
    places : Places
    buffers : dict of str to Buffer
        The function's arrays.
    shared : Buffer
        The block's shared memory, bytes.
    """

    def __init__(self, places: Places, buffers: dict[str, Expr], shared: Expr) -> None:
        self.at, self.b, self.shared = places, buffers, shared
        self.cut, self.variant, self.shape, self.operands = places.cut, places.variant, places.shape, places.operands

    def step(self, iteration: Expr, stage: Expr) -> None:
        """Begin to copy what an iteration needs to a stage of shared memory."""
        self._weights(iteration, stage)
        self._scales(iteration, stage)
        if self.variant.shared:
            self._shared_rows(iteration, stage)
        else:
            self._own_rows(iteration, stage)

    def _weights(self, iteration: Expr, stage: Expr) -> None:
        o, where = self.operands, self.at.where(iteration, self.at.warp_k)
        inner = where.step * o.blocks + self.at.t * (o.blocks // 4)
        with unrolled(self.cut.repeats) as r:
            blocks = [self.at.clamped(inner + i) + where.segment * self.cut.blocks for i in range(2)]
            place = Place(self.at.n_block(r), self.at.g % 4, blocks[0], blocks[1], where.plane)
            for i, source in enumerate(o.weight_addresses(self.b, place)):
                to = self.at.own(stage, r * (o.words // 4) + i)
                T.evaluate(device.copy_rows(16)(self.shared.data, to, source, 16))

    def _piece(self, iteration: Expr, warp_k: Expr, piece: Expr) -> tuple[Expr, Expr | bool]:
        """A piece of a step's rows: which piece of the whole row, and whether there is one."""
        o, where = self.operands, self.at.where(iteration, warp_k)
        of_block = max(1, o.pieces // o.blocks)
        inner = where.step * o.blocks + piece // of_block
        there = where.there
        if self.cut.blocks % o.blocks:
            within = inner < self.cut.blocks
            there = within if there is True else T.And(there, within)
        block = self.at.clamped(inner) + where.segment * self.cut.blocks
        return block * of_block + piece % of_block, there

    def _scales(self, iteration: Expr, stage: Expr) -> None:
        """Scales where a segment ends, factors at each step."""
        where = self.at.where(iteration, self.at.warp_k)
        group, planes = where.segment // self.cut.splits, self.shape.planes
        plane = (where.plane,) if self.cut.planes_scaled_apart else ()
        if not self.cut.whole:
            with when(self.at.ends(where)), unrolled(self.cut.repeats) as r:
                to = self.at.own(stage, r, self.cut.scales_start)
                source = at(self.b["scale"], *plane, group, self.at.column(r))
                T.evaluate(device.copy_rows(16)(self.shared.data, to, source, 16))
        if self.cut.changing_factors:
            with unrolled(self.cut.repeats) as r:
                for p in range(planes):
                    to = self.at.own_factor(stage, r * planes + p)
                    source = at(self.b["factor"], p, group, self.at.column(r))
                    T.evaluate(device.copy_rows(4)(self.shared.data, to, source, 4))
        if self.cut.shared_terms:
            with when(self.at.ends(where)):
                self._row_terms(iteration, stage)

    def _row_terms(self, iteration: Expr, stage: Expr) -> None:
        """Sum and scale, side by side, of the activations of each row and warp along K."""
        v = self.variant
        words = v.warps_k * v.rows * 2
        with unrolled(ceil_div(words, v.threads)) as i:
            index = i * v.threads + self.at.thread
            with when(index < words if words % v.threads else True):
                row, segment = self.at.row(index // 2 % v.rows), self.at.where(iteration, index // (2 * v.rows)).segment
                to = self.at.terms(stage) + index * 4
                for name, column, mine in (("x_sum", segment, 0), ("x_scale", segment // self.cut.splits, 1)):
                    with T.If(index % 2 == mine), T.Then():
                        T.evaluate(device.copy_rows(4)(self.shared.data, to, at(self.b[name], row, column), 4))

    def _own_rows(self, iteration: Expr, stage: Expr) -> None:
        """Activations that this thread alone multiplies."""
        o = self.operands
        mine = o.pieces // 4
        with unrolled(self.cut.row_tiles) as j:
            for i in range(mine):
                of_row, there = self._piece(iteration, self.at.warp_k, self.at.t * mine + i)
                index, rest = divmod(i * o.piece_bytes, 16)
                to = self.at.own(stage, j * (o.row_registers // 4) + index, self.cut.rows_start) + rest
                self._place_piece(to, j * 8 + self.at.g, of_row, there)

    def _shared_rows(self, iteration: Expr, stage: Expr) -> None:
        """Activations of all warps along K, spread over the threads."""
        o, v = self.operands, self.variant
        pieces = v.warps_k * v.rows * o.pieces
        with unrolled(ceil_div(pieces, v.threads)) as i:
            index = i * v.threads + self.at.thread
            piece, row, warp_k = index % o.pieces, index // o.pieces % v.rows, index // (o.pieces * v.rows)
            with when(index < pieces if pieces % v.threads else True):
                of_row, there = self._piece(iteration, warp_k, piece)
                self._place_piece(
                    self.at.shared_row(stage, warp_k, row) + o.piece_offset(row, piece), row, of_row, there
                )

    def _place_piece(self, to: Expr, row: Expr, of_row: Expr, there: Expr | bool) -> None:
        o = self.operands
        size = o.piece_bytes if there is True else T.Select(there, o.piece_bytes, 0)
        source = o.row_address(self.b, self.at.row(row), of_row)
        T.evaluate(device.copy_rows(o.piece_bytes)(self.shared.data, to, source, size))
