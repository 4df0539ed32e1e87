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

What it costs, counted for 128 elements, two planes and four rows: a block is 8,960 bytes, words and scales, which an
H100's memory brings in 619 cycles of a multiprocessor (3.35 TB/s, 132 of them at 1.755 GHz). Instructions of a warp
for it: decoding 192, tensor cores 32, queries 200, softmax and weights 180, sums 100, copies and addresses 60: some
760, or 190 cycles of the four schedulers. With dot products of bytes (dp4a) decoding would be followed by 512 in the
place of 32, with fused multiply-adds of floats by 2,048 and a conversion each: more than memory leaves time for, with
one plane or where a head of keys has more queries. Copies are asynchronous, keys of the next block on their way while
values of this one are multiplied, and the reverse.

References
----------
Dao et al., "Flash-Decoding for long-context inference", 2023: keys split over thread blocks.
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
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, packed_words
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.matmul import SCHEDULED, root_block
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any

WARPS = 4
TILE = 4
"""Rows of a tensor core's eight columns."""
TOKENS = 8
"""Last tokens that a warp takes at once."""
STEP = 64
"""Terms of a sum that a warp multiplies at once: sixteen for each t."""
BLOCKS_OF_GPU = 4 * 132
"""Thread blocks that fill an H100: four on a multiprocessor."""
NOTHING = float("-inf")
SMALLEST = 2.0**-100
"""What is smaller is rounded to 0."""


@dataclass(frozen=True)
class Step:
    """What is known of a step when it is compiled, and where things lie in shared memory.

    Parameters
    ----------
    shape : Attention
    planes : tuple of int
        Of keys and of values.
    batch, queries, blocks, room : int
        Sequences, queries of each, the most packed blocks and last tokens of one.
    splits : int
        Thread blocks that share the tokens of a head.
    """

    shape: Attention
    planes: tuple[int, int]
    batch: int
    queries: int
    blocks: int
    room: int
    splits: int

    @property
    def all_rows(self) -> int:
        """Queries of a head of keys."""
        return self.shape.group * self.queries

    @property
    def tiles(self) -> int:
        """Of rows that a warp does at once: two where there are so many, for what is decoded serves both."""
        return 1 if self.all_rows <= TILE else 2

    @property
    def rows(self) -> int:
        return TILE * self.tiles

    @property
    def steps(self) -> int:
        """Of a product with a key."""
        return ceil_div(self.shape.size, STEP)

    @property
    def padded(self) -> int:
        """Elements of a row of queries in shared memory."""
        return STEP * self.steps

    @property
    def passes(self) -> int:
        """Over a value's elements, 32 at a time."""
        return ceil_div(self.shape.value_size, 2 * LANES)

    def pieces(self, operand: int) -> int:
        """Copies of 16 bytes that a thread needs for what it multiplies in a step: words of 16 terms."""
        return self.planes[operand]

    @property
    def key_copies(self) -> int:
        return 2 * self.steps * self.pieces(0)

    @property
    def value_copies(self) -> int:
        return self.passes * self.pieces(1)

    @property
    def query_bytes(self) -> int:
        return 4 * self.rows * self.padded

    @property
    def values_at(self) -> int:
        """Where a warp's words of values begin, behind those of keys."""
        return 512 * self.key_copies

    @property
    def key_scale_at(self) -> int:
        return self.values_at + 512 * self.value_copies

    @property
    def value_scale_at(self) -> int:
        return self.key_scale_at + 4 * self.padded

    @property
    def warp_bytes(self) -> int:
        return self.value_scale_at + 4 * BLOCK

    @property
    def partial(self) -> int:
        """Floats that a warp says of a row: the sums of values, m and l."""
        return 32 * self.passes + 2

    @property
    def shared_bytes(self) -> int:
        return self.query_bytes + WARPS * max(self.warp_bytes, 4 * self.rows * self.partial)


def choose_splits(batch: int, kv_heads: int, blocks: int, room: int, row_tiles: int = 1) -> int:
    """As many as fill a GPU, but a unit of work for each warp."""
    units = blocks + ceil_div(room, TOKENS)
    return max(1, min(BLOCKS_OF_GPU // (batch * kv_heads * row_tiles), ceil_div(units, WARPS)))


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
        Thread blocks that share the tokens of a head. None: `choose_splits`.

    Returns
    -------
    PrimFunc
        Of the parameters of `schedule.cpu.attention.packed.attention_step`. Queries times the scales of a block, and
        weights times those of its tokens, are rounded to whole numbers of at most 32,639, by a scale a row; the last
        tokens are multiplied as they are. No tokens give zeros.

    Raises
    ------
    ValueError
        If sizes are no multiples of four, or elements of a head are not neighbours.
    """
    check_sizes(shape)
    batch, queries, blocks, room = lengths
    rows = shape.group * queries
    row_tiles = ceil_div(rows, TILE if rows <= TILE else 2 * TILE)
    if splits is None:
        splits = choose_splits(batch, shape.kv_heads, blocks, room, row_tiles)
    step = Step(shape, planes, batch, queries, blocks, room, splits)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_step")
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1})
        buffers = declare(step)
        with root_block():
            partial = T.alloc_buffer((batch, shape.kv_heads, rows, splits, shape.value_size), "float32")
            extremes = T.alloc_buffer((batch, shape.kv_heads, rows, splits, 2), "float32")
            buffers |= {"partial": partial, "extremes": extremes}
            _Parts(step, buffers, row_tiles).emit()
            _join(step, buffers)
    return builder.get()


def check_sizes(shape: Attention) -> None:
    """Refuse what these kernels do not do."""
    for name, size in (("size", shape.size), ("value_size", shape.value_size)):
        if size % 4:
            raise ValueError(f"a head's {name} of {size}; on a GPU expected a multiple of 4")
    for layout in (shape.query, shape.key, shape.value, shape.out):
        if layout[-1] != "d":
            raise ValueError(f"a layout {layout}; on a GPU elements of a head are neighbours")


def declare(step: Step) -> dict[str, Expr]:
    """The parameters by name."""
    shape, made = step.shape, dict[str, Expr]()

    def declared(name: str, extents: Sequence[int], dtype: str = "float32") -> None:
        made[name] = T.arg(name, T.buffer(tuple(extents), dtype))

    def laid(name: str, layout: str, heads: int, length: int, size: int) -> None:
        extents = {"b": step.batch, "h": heads, "l": length, "d": size}
        declared(name, [extents[axis] for axis in layout])

    outer = (step.batch, shape.kv_heads, step.blocks)
    laid("q", shape.query, shape.heads, step.queries, shape.size)
    matrices = {"key": (BLOCK, shape.size), "value": (shape.value_size, BLOCK)}
    for planes, (name, matrix) in zip(step.planes, matrices.items(), strict=True):
        for n, field in enumerate(digits(planes)):
            declared(f"{name}_words{n}", (*outer, *packed_words(*matrix, field)), "uint32")
        declared(f"{name}_scale", (*outer, shape.size if name == "key" else BLOCK))
    laid("k", shape.key, shape.kv_heads, step.room, shape.size)
    laid("v", shape.value, shape.kv_heads, step.room, shape.value_size)
    for name in ("full", "recent"):
        declared(name, (step.batch,), "int32")
    laid("out", shape.out, shape.heads, step.queries, shape.value_size)
    return made


def placed(layout: str, batch: Expr, head: Expr, position: Expr, d: Expr) -> list[Expr]:
    at = {"b": batch, "h": head, "l": position, "d": d}
    return [at[axis] for axis in layout]


def head_and_query(step: Step, kv: Expr, row: Expr) -> tuple[Expr, Expr]:
    """Of a row of a head of keys."""
    return kv * step.shape.group + row // step.queries, row % step.queries


def _float(value: float) -> Expr:
    return tirx.const(value, "float32")


def _local(count: int, dtype: str = "float32") -> Expr:
    return T.alloc_buffer((count,), dtype, scope="local")


def _fold(held: Expr, index: Expr, distances: Sequence[int], combine: Callable[[Expr, Expr], Expr]) -> None:
    """Combine a register over lanes; every one of them gets the result."""
    exchange = device.exchange_int if held.dtype == "int32" else device.exchange_float
    for distance in distances:
        T.buffer_store(held, combine(held[index], exchange(held[index], distance)), [index])


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


OVER_T, OVER_G = (1, 2), (4, 8, 16)


class _Parts:
    """The first kernel: what each thread block makes of its share of the tokens."""

    def __init__(self, step: Step, buffers: dict[str, Expr], row_tiles: int) -> None:
        self.step, self.shape, self.b, self.row_tiles = step, step.shape, buffers, row_tiles

    def emit(self) -> None:
        step, launch = self.step, T.launch_thread
        with (
            launch("blockIdx.x", step.splits) as split,
            launch("blockIdx.y", self.shape.kv_heads * self.row_tiles) as y,
            launch("blockIdx.z", step.batch) as self.batch,
            launch("threadIdx.x", 32 * WARPS) as thread,
        ):
            self.split, self.thread, self.lane, self.warp = split, thread, thread % 32, thread // 32
            self.kv, self.first_row = y // self.row_tiles, y % self.row_tiles * step.rows
            self.g, self.t = self.lane // 4, self.lane % 4
            self.shared = T.alloc_buffer((step.shared_bytes,), "uint8", scope="shared.dyn")
            self.mine = step.query_bytes + self.warp * step.warp_bytes
            self._registers()
            self._fetch_queries()
            self._blocks()
            self._last_tokens()
            self._write()

    def _registers(self) -> None:
        step = self.step
        self.o = _local(step.tiles * step.passes * 4)
        self.m, self.l = _local(step.tiles), _local(step.tiles)
        self.fade = _local(step.tiles)
        with unrolled(step.tiles * step.passes * 4) as i:
            T.buffer_store(self.o, _float(0.0), [i])
        with unrolled(step.tiles) as tile:
            T.buffer_store(self.m, _float(NOTHING), [tile])
            T.buffer_store(self.l, _float(0.0), [tile])

    # --- queries ----------------------------------------------------------------------------------------------------

    def _fetch_queries(self) -> None:
        """Put the rows' queries into shared memory; zeros behind the ends of rows and of each."""
        step = self.step
        pieces = step.padded // 4
        four = _local(4)
        with T.serial(0, ceil_div(step.rows * pieces, 32 * WARPS)) as i:
            index = i * (32 * WARPS) + self.thread
            with T.If(index < step.rows * pieces), T.Then():
                row, piece = index // pieces, index % pieces
                for n in range(4):
                    T.buffer_store(four, _float(0.0), [n])
                with T.If(T.And(self.first_row + row < step.all_rows, piece * 4 < self.shape.size)), T.Then():
                    head, query = head_and_query(step, self.kv, self.first_row + row)
                    source = at(self.b["q"], *placed(self.shape.query, self.batch, head, query, piece * 4))
                    T.evaluate(device.load_floats(at(four, 0), source))
                to = (row * pieces + self._place(piece)) * 16
                T.evaluate(own.put_four(self.shared.data, to, at(four, 0)))
        T.evaluate(T.tvm_storage_sync("shared"))

    @staticmethod
    def _place(piece: Expr) -> Expr:
        """Where four elements lie: those that the four t's multiply at a time are neighbours."""
        return piece // 16 * 16 + piece % 4 * 4 + piece // 4 % 4

    def _query_at(self, row: Expr, place: Expr) -> Expr:
        return (row * (self.step.padded // 4) + place) * 16

    # --- packed blocks ----------------------------------------------------------------------------------------------

    def _blocks(self) -> None:
        step = self.step
        stride = step.splits * WARPS
        first = self.split * WARPS + self.warp
        full = self.b["full"][self.batch]
        self.count = T.max(full - first + (stride - 1), 0) // stride
        with T.If(self.count > 0), T.Then():
            self._copy_keys(first)
        T.evaluate(device.commit_copies())
        with T.If(self.count > 0), T.Then():
            self._copy_values(first)
        T.evaluate(device.commit_copies())
        with T.serial(0, self.count) as i:
            self._block(first + i * stride, i + 1 < self.count, stride)

    def _block(self, block: Expr, more: Expr, stride: int) -> None:
        step = self.step
        asked, away, scale = (
            _local(step.tiles * step.steps * 4, "int32"),
            _local(step.tiles, "int32"),
            _local(step.tiles),
        )
        scores = _local(step.tiles * 8)
        self._arrived()
        with unrolled(step.tiles) as tile:
            self._ask(tile, asked, away, scale)
        with unrolled(2) as r:
            acc = self._products(0, asked, step.steps, lambda s: self._key_place(r, s, 0))
            with unrolled(step.tiles) as tile, unrolled(4) as n:
                score = T.Cast("float32", self._whole(acc, tile, n) - away[tile]) * scale[tile]
                T.buffer_store(scores, score, [(tile * 2 + r) * 4 + n])
        T.evaluate(own.sync_warp())
        with T.If(more), T.Then():
            self._copy_keys(block + stride)
        T.evaluate(device.commit_copies())
        self._arrived()
        weights = _local(step.tiles * 4, "int32")
        with unrolled(step.tiles) as tile:
            self._softmax(tile, scores, 8)
            self._weigh(tile, scores, weights, away, scale)
        with unrolled(step.passes) as r:
            acc = self._products(1, weights, 1, lambda _: self._value_place(r, 0))
            with unrolled(step.tiles) as tile, unrolled(4) as n:
                value = T.Cast("float32", self._whole(acc, tile, n) - away[tile]) * scale[tile]
                place = (tile * step.passes + r) * 4 + n
                T.buffer_store(self.o, self.o[place] * self.fade[tile] + value, [place])
        T.evaluate(own.sync_warp())
        with T.If(more), T.Then():
            self._copy_values(block + stride)
        T.evaluate(device.commit_copies())

    def _arrived(self) -> None:
        """Wait for the older one of two groups of copies, of the whole warp."""
        T.evaluate(device.wait_copies(1)())
        T.evaluate(own.sync_warp())

    def _key_place(self, r: Expr, s: Expr, piece: Expr) -> Expr:
        return self.mine + ((r * self.step.steps + s) * self.step.pieces(0) + piece) * 512 + self.lane * 16

    def _value_place(self, r: Expr, piece: Expr) -> Expr:
        return self.mine + self.step.values_at + (r * self.step.pieces(1) + piece) * 512 + self.lane * 16

    def _words(self, operand: int, unit: Expr, terms: int) -> list[tuple[str, Expr]]:
        """The arrays and the words that hold sixteen terms; the last ones where there are no more."""
        name, planes = ("key", "value")[operand], self.step.planes[operand]
        found = []
        for n, field in enumerate(digits(planes)):
            count = ceil_div(terms, field.terms)
            words = [unit] if field.count == 1 else [2 * unit, 2 * unit + 1]
            found += [(f"{name}_words{n}", T.min(word, count - 1)) for word in words]
        return found

    def _copy_keys(self, block: Expr) -> None:
        step, where = self.step, [self.batch, self.kv, block]
        with unrolled(2) as r, unrolled(step.steps) as s:
            for piece, (name, word) in enumerate(self._words(0, 4 * s + self.t, self.shape.size)):
                source = at(self.b[name], *where, self.g // 2, word, 4 * (2 * r + self.g % 2))
                T.evaluate(device.copy_rows(16)(self.shared.data, self._key_place(r, s, piece), source, 16))
        pieces = step.padded // 4
        with unrolled(ceil_div(pieces, 32)) as i:
            piece = i * 32 + self.lane
            with T.If(piece < pieces), T.Then():
                there = piece * 4 < self.shape.size
                source = at(self.b["key_scale"], *where, T.min(piece * 4, self.shape.size - 4))
                to = self.mine + step.key_scale_at + self._place(piece) * 16
                T.evaluate(device.copy_rows(16)(self.shared.data, to, source, T.Select(there, 16, 0)))

    def _copy_values(self, block: Expr) -> None:
        step, where = self.step, [self.batch, self.kv, block]
        groups = ceil_div(self.shape.value_size, LANES)
        with unrolled(step.passes) as r:
            group = T.min(2 * r + self.g // 4, groups - 1)
            for piece, (name, word) in enumerate(self._words(1, self.t, BLOCK)):
                source = at(self.b[name], *where, group, word, 4 * (self.g % 4))
                T.evaluate(device.copy_rows(16)(self.shared.data, self._value_place(r, piece), source, 16))
        with T.If(self.lane < BLOCK // 4), T.Then():
            to = self.mine + step.value_scale_at + self.lane * 16
            T.evaluate(device.copy_rows(16)(self.shared.data, to, at(self.b["value_scale"], *where, self.lane * 4), 16))

    def _ask(self, tile: Expr, asked: Expr, away: Expr, scale: Expr) -> None:
        """A row's queries times the block's scales, in 16 bits: of thread (g, t) row g / 2, and byte g % 2 of it.

        The sum of the numbers and their scale go to the threads that get the row's scores: those of its t.
        """
        step = self.step
        x, k = _local(step.steps * 16), _local(4)
        peak, total = _local(1, "int32"), _local(1, "int32")
        T.buffer_store(peak, T.int32(0), [0])
        T.buffer_store(total, T.int32(0), [0])
        with unrolled(step.steps) as s, unrolled(4) as j:
            place = (s * 4 + j) * 4 + self.t
            query = self._query_at(tile * TILE + self.g // 2, place)
            T.evaluate(device.load_shared_floats(at(x, (s * 4 + j) * 4), self.shared.data, query))
            T.evaluate(
                device.load_shared_floats(at(k, 0), self.shared.data, self.mine + step.key_scale_at + place * 16)
            )
            for i in range(4):
                n = (s * 4 + j) * 4 + i
                T.buffer_store(x, x[n] * k[i], [n])
                T.buffer_store(peak, T.max(peak[0], own.magnitude_bits(x[n])), [0])
        _fold(peak, 0, OVER_T, T.max)
        largest = device.float_of(peak[0])
        with unrolled(step.steps) as s, unrolled(4) as j:
            n = (tile * step.steps + s) * 4 + j
            T.buffer_store(asked, own.round_four(at(x, (s * 4 + j) * 4), _inverse(largest), self.g % 2), [n])
            T.buffer_store(total, own.sum_bytes(asked[n], total[0]), [0])
        _fold(total, 0, OVER_T, _add)
        high, low = (own.from_lane_int(total[0], 8 * self.t + 4 * part) for part in range(2))
        offset = (3 ** step.planes[0] - 1) // 2
        T.buffer_store(away, (256 * high + low) * offset, [tile])
        of_row = own.from_lane_float(largest, 8 * self.t)
        T.buffer_store(scale, of_row * _float(self.shape.scale * math.log2(math.e) / own.MOST), [tile])

    def _products(self, operand: int, right: Expr, steps: int, place: Callable[[Expr], Expr]) -> Expr:
        """32 rows of a block, four for each g, multiplied: for each tile, two products of four sums."""
        step, pieces = self.step, self.step.pieces(operand)
        acc, quads = _local(step.tiles * 8, "int32"), _local(16, "uint32")
        words = _local(4 * pieces, "uint32")
        with unrolled(step.tiles * 8) as i:
            T.buffer_store(acc, T.int32(0), [i])
        with unrolled(steps) as s:
            for piece in range(pieces):
                T.evaluate(device.load_shared(at(words, 4 * piece), self.shared.data, place(s) + 512 * piece))
            decode = {1: device.decode_codes, 2: own.decode_pairs, 3: own.decode_threes}[pieces]
            with unrolled(4) as n:
                T.evaluate(decode(at(quads, 4 * n), *(words[4 * piece + n] for piece in range(pieces))))
            with unrolled(step.tiles) as tile, unrolled(2) as e, unrolled(2) as half:
                left = [quads[4 * (2 * e + row) + 2 * half + k] for k in range(2) for row in range(2)]
                numbers = [T.Cast("uint32", right[(tile * steps + s) * 4 + 2 * half + k]) for k in range(2)]
                T.evaluate(device.mma_bytes(at(acc, (tile * 2 + e) * 4), *left, *numbers))
        return acc

    @staticmethod
    def _whole(acc: Expr, tile: Expr, n: Expr) -> Expr:
        """The product of both bytes, of the n-th row of four."""
        place = (tile * 2 + n // 2) * 4 + n % 2 * 2
        return 256 * acc[place] + acc[place + 1]

    # --- weights ----------------------------------------------------------------------------------------------------

    def _softmax(self, tile: Expr, scores: Expr, count: int) -> None:
        """Turn a row's scores into weights, and what was there before into what it is beside a larger one."""
        best, safe = _local(1), _local(1)
        T.buffer_store(best, scores[tile * count], [0])
        with unrolled(count) as i:
            T.buffer_store(best, T.max(best[0], scores[tile * count + i]), [0])
        _fold(best, 0, OVER_G, T.max)
        T.buffer_store(best, T.max(best[0], self.m[tile]), [0])
        # Where there is nothing yet all differences are to be minus infinity.
        T.buffer_store(safe, T.Select(best[0] > _float(NOTHING), best[0], _float(0.0)), [0])
        T.buffer_store(self.fade, own.exp2(self.m[tile] - safe[0]), [tile])
        T.buffer_store(self.m, best[0], [tile])
        T.buffer_store(self.l, self.l[tile] * self.fade[tile], [tile])
        with unrolled(count) as i:
            place = tile * count + i
            T.buffer_store(scores, own.exp2(scores[place] - safe[0]), [place])
            T.buffer_store(self.l, self.l[tile] + scores[place], [tile])

    def _weigh(self, tile: Expr, scores: Expr, weights: Expr, away: Expr, scale: Expr) -> None:
        """Weights times the tokens' scales, in 16 bits, brought to the threads that multiply with them."""
        step = self.step
        peak, total, four = _local(1, "int32"), _local(2, "int32"), _local(4)
        bytes_ = _local(4, "int32")
        T.buffer_store(peak, T.int32(0), [0])
        for part in range(2):
            T.buffer_store(total, T.int32(0), [part])
        with unrolled(2) as r:
            quad = self.g // 2 * 4 + 2 * r + self.g % 2
            place = self.mine + step.value_scale_at + quad * 16
            T.evaluate(device.load_shared_floats(at(four, 0), self.shared.data, place))
            for i in range(4):
                n = (tile * 2 + r) * 4 + i
                T.buffer_store(scores, scores[n] * four[i], [n])
                T.buffer_store(peak, T.max(peak[0], own.magnitude_bits(scores[n])), [0])
        _fold(peak, 0, OVER_G, T.max)
        largest = device.float_of(peak[0])
        with unrolled(2) as r:
            for part in range(2):
                rounded = own.round_four(at(scores, (tile * 2 + r) * 4), _inverse(largest), part)
                T.buffer_store(bytes_, rounded, [2 * r + part])
                T.buffer_store(total, own.sum_bytes(bytes_[2 * r + part], total[part]), [part])
        both = _local(1, "int32")
        T.buffer_store(both, 256 * total[0] + total[1], [0])
        _fold(both, 0, OVER_G, _add)
        T.buffer_store(away, both[0] * ((3 ** step.planes[1] - 1) // 2), [tile])
        T.buffer_store(scale, largest * _float(1 / own.MOST), [tile])
        for j in range(4):
            source = 4 * (2 * self.t + j % 2) + self.g // 2
            high, low = (own.from_lane_int(bytes_[2 * (j // 2) + part], source) for part in range(2))
            T.buffer_store(total, high, [0])
            T.buffer_store(total, low, [1])
            T.buffer_store(weights, T.Select(self.g % 2 == 0, total[0], total[1]), [tile * 4 + j])

    # --- the last tokens --------------------------------------------------------------------------------------------

    def _last_tokens(self) -> None:
        step = self.step
        stride = step.splits * WARPS
        full, recent = self.b["full"][self.batch], self.b["recent"][self.batch]
        first = self.split * WARPS + self.warp + self.count * stride - full
        chunks = (recent + (TOKENS - 1)) // TOKENS
        with T.serial(0, T.max(chunks - first + (stride - 1), 0) // stride) as i:
            self._chunk((first + i * stride) * TOKENS, recent)

    def _chunk(self, start: Expr, recent: Expr) -> None:
        """Eight tokens: a score for each thread, of token g and row t; then values, elements as blocks have them."""
        step = self.step
        scores = _local(step.tiles)
        self._score_chunk(start, recent, scores)
        with unrolled(step.tiles) as tile:
            self._softmax(tile, scores, 1)
        with unrolled(step.tiles) as tile, unrolled(step.passes * 4) as n:
            place = tile * (step.passes * 4) + n
            T.buffer_store(self.o, self.o[place] * self.fade[tile], [place])
        four, weight = _local(4), _local(step.tiles)
        with unrolled(TOKENS) as j:
            with unrolled(step.tiles) as tile:
                T.buffer_store(weight, own.from_lane_float(scores[tile], 4 * j + self.t), [tile])
            with T.If(start + j < recent), T.Then(), unrolled(step.passes) as r:
                element = 4 * (8 * r + self.g)
                with T.If(element < self.shape.value_size), T.Then():
                    source = placed(self.shape.value, self.batch, self.kv, start + j, element)
                    T.evaluate(device.load_floats(at(four, 0), at(self.b["v"], *source)))
                    with unrolled(step.tiles) as tile:
                        for i in range(4):
                            place = (tile * step.passes + r) * 4 + i
                            T.buffer_store(self.o, self.o[place] + weight[tile] * four[i], [place])

    def _score_chunk(self, start: Expr, recent: Expr, scores: Expr) -> None:
        step = self.step
        dots, k, q = _local(step.rows), _local(4), _local(4)
        token = start + self.g
        with unrolled(step.rows) as row:
            T.buffer_store(dots, _float(0.0), [row])
        with unrolled(ceil_div(self.shape.size, 16)) as pp:
            d = (4 * pp + self.t) * 4
            with T.If(T.And(token < recent, d < self.shape.size)), T.Then():
                source = placed(self.shape.key, self.batch, self.kv, token, d)
                T.evaluate(device.load_floats(at(k, 0), at(self.b["k"], *source)))
                with unrolled(step.rows) as row:
                    place = self._query_at(row, self._place(4 * pp + self.t))
                    T.evaluate(device.load_shared_floats(at(q, 0), self.shared.data, place))
                    for i in range(4):
                        T.buffer_store(dots, dots[row] + q[i] * k[i], [row])
        with unrolled(step.rows) as row:
            _fold(dots, row, OVER_T, _add)
        with unrolled(step.tiles) as tile:
            for t in range(TILE):
                with T.If(self.t == t), T.Then():
                    T.buffer_store(scores, dots[tile * TILE + t], [tile])
            # The last tokens are those that ask: none sees one behind it.
            query = (self.first_row + tile * TILE + self.t) % step.queries
            seen = T.And(token < recent, token <= recent - step.queries + query)
            score = scores[tile] * _float(self.shape.scale * math.log2(math.e))
            T.buffer_store(scores, T.Select(seen, score, _float(NOTHING)), [tile])

    # --- results ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Put the warps together, and store what the thread block has of each row."""
        step = self.step
        T.evaluate(device.wait_copies(0)())
        T.evaluate(T.tvm_storage_sync("shared"))
        with unrolled(step.tiles) as tile:
            _fold(self.l, tile, OVER_G, _add)
            start = self._result(self.warp, tile * TILE + self.t)
            with unrolled(step.passes) as r, unrolled(4) as i:
                place = (tile * step.passes + r) * 4 + i
                T.evaluate(device.put_float(self.shared.data, start + (8 * r + self.g) * 4 + i, self.o[place]))
            with T.If(self.g == 0), T.Then():
                for n, value in enumerate((self.m[tile], self.l[tile])):
                    T.evaluate(device.put_float(self.shared.data, start + (step.partial - 2 + n), value))
        T.evaluate(T.tvm_storage_sync("shared"))
        size = self.shape.value_size
        with T.serial(0, ceil_div(step.rows * size, 32 * WARPS)) as i:
            index = i * (32 * WARPS) + self.thread
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

        peaks = [of(warp, step.partial - 2) for warp in range(WARPS)]
        totals = [of(warp, step.partial - 1) for warp in range(WARPS)]
        values = [of(warp, element) for warp in range(WARPS)]
        where = [self.batch, self.kv, self.first_row + row, self.split]
        best = _local(1)
        T.buffer_store(best, _float(NOTHING), [0])
        for peak in peaks:
            T.buffer_store(best, T.max(best[0], peak), [0])
        joined = _weighted(best, list(zip(peaks, values, strict=True)))
        T.buffer_store(self.b["partial"], joined, [*where, element])
        with T.If(element == 0), T.Then():
            T.buffer_store(self.b["extremes"], best[0], [*where, 0])
            T.buffer_store(self.b["extremes"], _weighted(best, list(zip(peaks, totals, strict=True))), [*where, 1])


def _inverse(largest: Expr) -> Expr:
    """What numbers of at most that size are multiplied by to be rounded."""
    return T.Select(largest >= _float(SMALLEST), _float(own.MOST) / largest, _float(0.0))


def _factor(best: Expr, peak: Expr) -> Expr:
    """What a part with the largest score ``peak`` counts beside ``best``; 0 where it has no tokens."""
    return own.exp2(peak - T.Select(best[0] > _float(NOTHING), best[0], _float(0.0)))


def _weighted(best: Expr, parts: Sequence[tuple[Expr, Expr]]) -> Expr:
    return sum((value * _factor(best, peak) for peak, value in parts), start=_float(0.0))


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
        best, total, value = _local(1), _local(1), _local(1)
        partial, extremes = buffers["partial"], buffers["extremes"]
        T.buffer_store(best, _float(NOTHING), [0])
        T.buffer_store(total, _float(0.0), [0])
        with T.serial(0, step.splits) as split:
            T.buffer_store(best, T.max(best[0], extremes[batch, kv, row, split, 0]), [0])
        with T.serial(0, step.splits) as split:
            factor = _factor(best, extremes[batch, kv, row, split, 0])
            T.buffer_store(total, total[0] + extremes[batch, kv, row, split, 1] * factor, [0])
        head, query = head_and_query(step, kv, row)
        with T.serial(0, ceil_div(shape.value_size, threads)) as i:
            element = i * threads + thread
            with T.If(element < shape.value_size), T.Then():
                T.buffer_store(value, _float(0.0), [0])
                with T.serial(0, step.splits) as split:
                    factor = _factor(best, extremes[batch, kv, row, split, 0])
                    T.buffer_store(value, value[0] + partial[batch, kv, row, split, element] * factor, [0])
                # Of no tokens nothing; what is not a number stays so.
                inverse = T.Select(total[0] == _float(0.0), _float(0.0), _float(1.0) / total[0])
                T.buffer_store(buffers["out"], value[0] * inverse, placed(shape.out, batch, head, query, element))
