"""A step of decoding over a ternary cache, split over its keys: partial results of warps, then their sum.

A warp takes one block of 64 tokens at a time, or eight of the last tokens, which are in float, and keeps for four rows
(queries of one head of keys), or eight, what attention over them is so far: the largest score m, the sum l of
2^(score - m), and the sum o of values with these weights. Blocks are dealt out to the warps of all thread blocks in
turns; warps of a thread block are put together in shared memory, thread blocks by a second kernel.

Scores are products of tensor cores: digits of keys are their left operand as they come out of a word by shifts and
masks (`schedule.cuda.device`), queries times the block's scales the right one, rounded to 16 bits. A row has two of the
eight columns, one for each byte of its numbers, so that the second byte costs nothing but its place. The result has
row t of the queries in thread ``lane = 4 g + t``, for two times four tokens in a row; so a softmax needs three
exchanges, and weights, times the tokens' scales and rounded the same way, become the right operand of the product with
values in sixteen.

What it costs, for 128 elements, two planes and four rows: a block is 8,960 bytes, words and scales, which an H100's
memory brings in 619 cycles of a multiprocessor (3.35 TB/s, 132 of them at 1.755 GHz). A warp has 873 instructions for
it, counted in sm_90's machine code: 218 cycles of four schedulers. With one plane it is 872 (218) and 336 cycles of
memory, with eight rows 1,397 (349) and 619. Products are 32 of these instructions; they would be 512 with dot products
of bytes (dp4a, at half the rate of others), and 2,048 and as many conversions with floats: beside the rest more than
memory leaves time for where there is one plane, or eight rows. Copies are asynchronous, keys of the next block on their
way while values of this one are multiplied, and the reverse.

References
----------
Dao et al., "Flash-Decoding for long-context inference", 2023: keys split over thread blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.blocks import Blocks
from tvm_ternary.schedule.cuda.attention.plan import (
    TILE,
    Step,
    at_once,
    check_grid,
    check_sizes,
    declare,
    head_and_query,
    placed,
    with_splits,
)
from tvm_ternary.schedule.cuda.attention.tail import LastTokens
from tvm_ternary.schedule.cuda.attention.warp import NOTHING, OVER_G, add, const, fold, local
from tvm_ternary.schedule.cuda.matmul import SCHEDULED, root_block
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any


def attention_step(
    shape: Attention, planes: tuple[int, int], lengths: tuple[int, int, int, int], splits: int | None = None
) -> tirx.PrimFunc:
    """The scheduled function ``(q, key words ..., key_scale, value words ..., value_scale, k, v, full, recent, out)``.

    Parameters
    ----------
    shape : Attention
        Without a mask: a query sees all blocks, and the last tokens up to its own. Layouts end in ``d``.
    planes : tuple of int
        Of keys and of values.
    lengths : tuple of int
        Batch, queries, most blocks and most last tokens. Queries are few: the cache is read once for eight rows.
    splits : int, optional
        Thread blocks that share the tokens of a head. None: `plan.with_splits`.

    Returns
    -------
    PrimFunc
        Of the parameters of `schedule.cpu.attention.packed.attention_step`. Queries times the scales of a block, and
        weights times those of its tokens, are rounded to whole numbers of at most 32,639, by a scale a row; the last
        tokens are multiplied as they are. No tokens give zeros.

    Raises
    ------
    ValueError
        If sizes are no multiples of four, elements of a head are not neighbours, or there are more heads or sequences
        than a grid has thread blocks.
    """
    check_sizes(shape)
    step = Step(shape, planes, *lengths, splits or 1)
    if splits is None:
        step = with_splits(step)
    check_grid(shape.kv_heads * step.row_tiles, step.batch)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_step")
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1})
        buffers = declare(step)
        with root_block():
            rows = (step.batch, shape.kv_heads, step.all_rows, step.splits)
            buffers["partial"] = T.alloc_buffer((*rows, shape.value_size), "float32")
            buffers["extremes"] = T.alloc_buffer((*rows, 2), "float32")
            _parts(step, buffers)
            _join(step, buffers)
    return builder.get()


def _parts(step: Step, buffers: dict[str, Expr]) -> None:
    launch = T.launch_thread
    with (
        launch("blockIdx.x", step.splits) as x,
        launch("blockIdx.y", step.shape.kv_heads * step.row_tiles) as y,
        launch("blockIdx.z", step.batch) as z,
        launch("threadIdx.x", step.threads) as thread,
        at_once(step.blocks_at_once),
    ):
        _Parts(step, buffers, (x, y, z), thread).write()


class _Parts(Blocks, LastTokens):
    """The first kernel: what each thread block makes of its share of the tokens."""

    def write(self) -> None:
        """All of it."""
        self.begin_copies()
        self.over_blocks()
        self.over_last_tokens()
        self._write()

    def _write(self) -> None:
        """Put the warps together, and store what the thread block has of each row."""
        step = self.step
        T.evaluate(device.wait_copies(0)())
        T.evaluate(T.tvm_storage_sync("shared"))
        with unrolled(step.tiles) as tile:
            fold(self.l, tile, OVER_G, add)
            start = self._result(self.warp, tile * TILE + self.t)
            with unrolled(step.passes) as r, unrolled(4) as i:
                place = (tile * step.passes + r) * 4 + i
                T.evaluate(device.put_float(self.shared.data, start + (8 * r + self.g) * 4 + i, self.o[place]))
            with T.If(self.g == 0), T.Then():
                for n, value in enumerate((self.m[tile], self.l[tile])):
                    T.evaluate(device.put_float(self.shared.data, start + (step.partial - 2 + n), value))
        T.evaluate(T.tvm_storage_sync("shared"))
        size = self.shape.value_size
        with T.serial(0, ceil_div(step.rows * size, step.threads)) as i:
            index = i * (step.threads) + self.thread
            row, element = index // size, index % size
            with T.If(T.And(row < step.rows, self.first_row + row < step.all_rows)), T.Then():
                self._write_element(row, element)

    def _result(self, warp: Expr, row: Expr) -> Expr:
        """Where a warp's results of a row begin, counted in floats."""
        return self.step.query_bytes // 4 + (warp * self.step.rows + row) * self.step.partial

    def _write_element(self, row: Expr, element: Expr) -> None:
        step = self.step

        def of(warp: int, place: Expr) -> Expr:
            return device.get_float(self.shared.data, self._result(warp, row) + place)

        peaks = [of(warp, step.partial - 2) for warp in range(step.warps)]
        totals = [of(warp, step.partial - 1) for warp in range(step.warps)]
        values = [of(warp, element) for warp in range(step.warps)]
        where = [self.batch, self.kv, self.first_row + row, self.split]
        best = local(1)
        T.buffer_store(best, const(NOTHING), [0])
        for peak in peaks:
            T.buffer_store(best, T.max(best[0], peak), [0])
        joined = _weighted(best, list(zip(peaks, values, strict=True)))
        T.buffer_store(self.b["partial"], joined, [*where, element])
        with T.If(element == 0), T.Then():
            T.buffer_store(self.b["extremes"], best[0], [*where, 0])
            T.buffer_store(self.b["extremes"], _weighted(best, list(zip(peaks, totals, strict=True))), [*where, 1])


def _factor(best: Expr, peak: Expr) -> Expr:
    """What a part with the largest score ``peak`` counts beside ``best``; 0 where it has no tokens."""
    return own.exp2(peak - T.Select(best[0] > const(NOTHING), best[0], const(0.0)))


def _weighted(best: Expr, parts: Sequence[tuple[Expr, Expr]]) -> Expr:
    return sum((value * _factor(best, peak) for peak, value in parts), start=const(0.0))


def _join(step: Step, buffers: dict[str, Expr]) -> None:
    """The second kernel: a row of a thread block, an element of a thread."""
    shape, launch = step.shape, T.launch_thread
    threads = min(128, ceil_div(shape.value_size, 32) * 32)
    with (
        launch("blockIdx.x", shape.kv_heads * step.all_rows) as x,
        launch("blockIdx.y", step.batch) as batch,
        launch("threadIdx.x", threads) as thread,
    ):
        kv, row = x // step.all_rows, x % step.all_rows
        best, total, value = local(1), local(1), local(1)
        partial, extremes = buffers["partial"], buffers["extremes"]
        T.buffer_store(best, const(NOTHING), [0])
        T.buffer_store(total, const(0.0), [0])
        with T.serial(0, step.splits) as split:
            T.buffer_store(best, T.max(best[0], extremes[batch, kv, row, split, 0]), [0])
        with T.serial(0, step.splits) as split:
            factor = _factor(best, extremes[batch, kv, row, split, 0])
            T.buffer_store(total, total[0] + extremes[batch, kv, row, split, 1] * factor, [0])
        head, query = head_and_query(step, kv, row)
        with T.serial(0, ceil_div(shape.value_size, threads)) as i:
            element = i * threads + thread
            with T.If(element < shape.value_size), T.Then():
                T.buffer_store(value, const(0.0), [0])
                with T.serial(0, step.splits) as split:
                    factor = _factor(best, extremes[batch, kv, row, split, 0])
                    T.buffer_store(value, value[0] + partial[batch, kv, row, split, element] * factor, [0])
                # Of no tokens nothing; what is not a number stays so.
                inverse = T.Select(total[0] == const(0.0), const(0.0), const(1.0) / total[0])
                T.buffer_store(buffers["out"], value[0] * inverse, placed(shape.out, batch, head, query, element))
