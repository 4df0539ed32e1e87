"""What activations become before a ternary matmul, on a GPU: the functions of `kernels.activations`, and 16-bit rows.

A *team* of threads makes one group of a row (or a whole row): a warp where a group is short, else a block. A thread
takes four neighbouring values at a time. Values are read twice, to find their scale and to round them; the second time
they come from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import BITS_BLOCK, CODES_BLOCK
from tvm_ternary.kernels.activations import SMALLEST_ABSMAX
from tvm_ternary.kernels.half import SWAPPED
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape, ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.matmul import any_rows, root_block

Expr = Any

WARP = 32
BLOCK_THREADS = 256
_SMALLEST_BITS = int(np.float32(SMALLEST_ABSMAX).view(np.int32))
LONG = 512
"""From this many values on a group has a block of threads for itself."""


def rows_function(kernel: MatmulKernel, shape: MatmulShape, rows: int | None = None) -> tirx.PrimFunc:
    """The scheduled function that makes a kernel's activations of x (M, K) float32 on a GPU.

    Parameters
    ----------
    kernel : MatmulKernel
        One that `schedule.cuda.matmul` takes.
    shape : MatmulShape
    rows : int, optional
        M where it is known; None leaves it symbolic.

    Returns
    -------
    tirx.PrimFunc
        Parameters: x, then the kernel's activations.
    """
    m = rows if rows is not None else tirx.Var("M", "int64")
    makers: dict[str, Callable[[MatmulShape, Expr], tirx.PrimFunc]] = {
        "matmul_a8": _int8_rows,
        "matmul_a1": _ternary_rows,
        "matmul_a16": lambda shape, m: _half_rows(shape, m, "float16"),
        "matmul_abf16": lambda shape, m: _half_rows(shape, m, "bfloat16"),
    }
    return makers[kernel.name](shape, m)


@contextmanager
def _function(name: str) -> Iterator[Callable[[], tirx.PrimFunc]]:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": 1, "op_pattern": 8})
        yield builder.get


@dataclass
class _Team:
    """Threads that work on one thing together.

    Attributes
    ----------
    size : int
        A warp, or a whole block.
    index : Expr
        Which thing: a number below ``count``, since the others are guarded.
    rank : Expr
        This thread's number in the team.
    """

    size: int
    index: Expr
    rank: Expr
    scratch: Expr | None

    @property
    def warps(self) -> int:
        return self.size // WARP

    def fold(self, value: Expr, combine: Callable[[Expr, Expr], Expr], dtype: str) -> Expr:
        """``value`` of all threads combined, in every thread; a number's bits, if it is a float."""
        held = T.alloc_buffer((1,), dtype, scope="local")
        T.buffer_store(held, value, [0])
        _fold_warp(held, combine, dtype)
        if self.scratch is None:
            return held[0]
        put, get = (device.put_int, device.get_int) if dtype == "int32" else (device.put_float, device.get_float)
        # What was folded before may still be read.
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(self.rank % WARP == 0), T.Then():
            T.evaluate(put(self.scratch.data, self.rank // WARP, held[0]))
        T.evaluate(T.tvm_storage_sync("shared"))
        T.buffer_store(held, get(self.scratch.data, 0), [0])
        for warp in range(1, self.warps):
            T.buffer_store(held, combine(held[0], get(self.scratch.data, warp)), [0])
        return held[0]


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _fold_warp(held: Expr, combine: Callable[[Expr, Expr], Expr], dtype: str) -> None:
    exchange = device.exchange_int if dtype == "int32" else device.exchange_float
    for distance in (16, 8, 4, 2, 1):
        T.buffer_store(held, combine(held[0], exchange(held[0], distance)), [0])


@contextmanager
def _teams(m: Expr, groups: int, size: int) -> Iterator[tuple[_Team, Expr, Expr]]:
    """A team for each group of each row: the team, row and group; nothing where M is 0."""
    per_block = BLOCK_THREADS // size
    count = m * groups
    blocks, launch = (count + (per_block - 1)) // per_block, T.launch_thread
    with root_block(), any_rows(m), launch("blockIdx.x", blocks) as bx, launch("threadIdx.x", BLOCK_THREADS) as thread:
        scratch = T.alloc_buffer((BLOCK_THREADS // WARP * 4,), "uint8", scope="shared.dyn") if size > WARP else None
        block = T.Cast("int64", bx)
        index = block if per_block == 1 else block * per_block + T.Cast("int64", thread // size)
        team = _Team(size, index, thread % size, scratch)
        if per_block == 1:
            yield team, index // groups, index % groups
            return
        # A whole warp is there or not.
        with T.If(index < count), T.Then():
            yield team, index // groups, index % groups


class _Group:
    """The values of one group of one row, four at a time; zero behind its end."""

    def __init__(self, shape: MatmulShape, x: Expr, row: Expr, group: Expr) -> None:
        self.x, self.row, self.first = x, row, T.Cast("int32", group) * shape.group_size
        # The last group may be cut short.
        whole = shape.k == shape.groups * shape.group_size
        self.size = shape.group_size if whole else T.min(shape.group_size, shape.k - self.first)
        self.aligned = shape.k % 4 == 0 and shape.group_size % 4 == 0

    def load(self, to: Expr, k: Expr) -> None:
        """Values k to k + 3 of the group."""
        if self.aligned:
            with T.If(k < self.size):
                with T.Then():
                    source = T.address_of(self.x[self.row, self.first + k])
                    T.evaluate(device.load_floats(T.address_of(to[0]), source))
                with T.Else():
                    for i in range(4):
                        T.buffer_store(to, T.float32(0), [i])
            return
        for i in range(4):
            # Not a select, whose both sides would be read.
            T.buffer_store(to, T.float32(0), [i])
            with T.If(k + i < self.size), T.Then():
                T.buffer_store(to, self.x[self.row, self.first + k + i], [i])


def _team_size(width: int) -> int:
    return WARP if width < LONG else BLOCK_THREADS


def _int8_rows(shape: MatmulShape, m: Expr) -> tirx.PrimFunc:
    """`kernels.activations.int8_rows`, equal to the bit."""
    width = shape.padded_k(CODES_BLOCK) // shape.groups
    size = _team_size(width)
    with _function("quantize_rows_int8") as built:
        x = T.arg("x", T.buffer((m, shape.k), "float32"))
        x_q = T.arg("x_q", T.buffer((m, shape.padded_k(CODES_BLOCK)), "int8"))
        x_sum = T.arg("x_sum", T.buffer((m, shape.segments(CODES_BLOCK)), "int32"))
        x_scale = T.arg("x_scale", T.buffer((m, shape.groups), "float32"))
        with _teams(m, shape.groups, size) as (team, row, group):
            values = _Group(shape, x, row, group)
            four = T.alloc_buffer((4,), "float32", scope="local")
            peak = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(peak, _SMALLEST_BITS, [0])
            with T.serial(0, ceil_div(width, 4 * size)) as i:
                values.load(four, (i * size + team.rank) * 4)
                for j in range(4):
                    # The bits of floats without a sign order like integers, and NaN is above infinity.
                    bits = device.bits_of(T.abs(four[j]))
                    T.buffer_store(peak, T.max(peak[0], bits), [0])
            absmax = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(absmax, device.float_of(team.fold(peak[0], T.max, "int32")), [0])
            with T.If(team.rank == 0), T.Then():
                T.buffer_store(x_scale, absmax[0] / T.float32(127), [row, group])
            _round_segments(shape, values, team, absmax, (x_q, x_sum), row, group)
    return built()


def _round_segments(
    shape: MatmulShape, values: _Group, team: _Team, absmax: Expr, out: tuple[Expr, Expr], row: Expr, group: Expr
) -> None:
    """Round a group's values and sum up each segment of them, a warp a segment."""
    (x_q, x_sum), splits = out, shape.splits(CODES_BLOCK)
    width = shape.segment_blocks(CODES_BLOCK) * CODES_BLOCK
    inverse = T.alloc_buffer((1,), "float32", scope="local")
    four = T.alloc_buffer((4,), "float32", scope="local")
    total = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(inverse, T.float32(127) / absmax[0], [0])
    lane = team.rank % WARP
    with T.serial(0, ceil_div(splits, team.warps)) as i:
        segment = i * team.warps + team.rank // WARP
        with T.If(segment < splits), T.Then():
            T.buffer_store(total, T.int32(0), [0])
            with T.serial(0, ceil_div(width, 4 * WARP)) as step:
                k = (step * WARP + lane) * 4
                with T.If(k < width), T.Then():
                    values.load(four, segment * width + k)
                    whole = [T.Cast("int32", T.nearbyint(four[j] * inverse[0])) for j in range(4)]
                    T.buffer_store(total, total[0] + (whole[0] + whole[1] + (whole[2] + whole[3])), [0])
                    place = T.address_of(x_q[row, (group * splits + segment) * width + k])
                    T.evaluate(device.store_bytes(place, *whole))
            _fold_warp(total, _add, "int32")
            with T.If(lane == 0), T.Then():
                T.buffer_store(x_sum, total[0], [row, group * splits + segment])


def _half_rows(shape: MatmulShape, m: Expr, dtype: str) -> tirx.PrimFunc:
    """x (M, K) float32 -> x_half (M, Kp): rounded to nearest even, groups padded, the middle two of four exchanged."""
    width = shape.padded_k(CODES_BLOCK) // shape.groups
    with _function(f"round_rows_{dtype}") as built:
        x = T.arg("x", T.buffer((m, shape.k), "float32"))
        x_half = T.arg("x_half", T.buffer((m, shape.padded_k(CODES_BLOCK)), dtype))
        quads = shape.groups * (width // 4)
        with (
            root_block(),
            any_rows(m),
            T.launch_thread("blockIdx.x", (m * quads + 255) // 256) as bx,
            T.launch_thread("threadIdx.x", 256) as thread,
        ):
            index = T.Cast("int64", bx) * 256 + T.Cast("int64", thread)
            with T.If(index < m * quads), T.Then():
                row, quad = index // quads, index % quads
                group, k = quad // (width // 4), quad % (width // 4) * 4
                four = T.alloc_buffer((4,), "float32", scope="local")
                _Group(shape, x, row, group).load(four, T.Cast("int32", k))
                for place, source in enumerate(SWAPPED):
                    T.buffer_store(x_half, T.Cast(dtype, four[source]), [row, quad * 4 + place])
    return built()


def _ternary_rows(shape: MatmulShape, m: Expr) -> tirx.PrimFunc:
    """`kernels.activations.ternary_rows`, up to the order of sums: a block of threads a row."""
    words = shape.segment_blocks(BITS_BLOCK)
    with _function("quantize_rows_ternary") as built:
        x = T.arg("x", T.buffer((m, shape.k), "float32"))
        x_bits = T.arg("x_bits", T.buffer((m, shape.groups * words, 2), "uint32"))
        x_scale = T.arg("x_scale", T.buffer((m,), "float32"))
        with _teams(m, 1, BLOCK_THREADS) as (team, row, _):
            one = MatmulShape(shape.n, shape.k, 1, 1, max(shape.k, 1))
            values = _Group(one, x, row, tirx.const(0, "int64"))
            limit = T.alloc_buffer((1,), "float32", scope="local")
            size = _sum_of(values, team, shape.k, lambda value: T.abs(value))
            T.buffer_store(limit, team.fold(size, _add, "float32") / T.float32(2 * max(shape.k, 1)), [0])
            zero = T.float32(0)

            def kept(value: Expr) -> Expr:
                return T.abs(value) > limit[0]

            size = _sum_of(values, team, shape.k, lambda value: T.Select(kept(value), T.abs(value), zero))
            total = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(total, team.fold(size, _add, "float32"), [0])
            count = _sum_of(values, team, shape.k, lambda value: T.Select(kept(value), T.float32(1), zero))
            scale = total[0] / T.max(team.fold(count, _add, "float32"), T.float32(1))
            with T.If(team.rank == 0), T.Then():
                # Against a limit that is NaN or infinite nothing was kept, and zeros would hide it.
                finite = limit[0] <= T.max_value("float32")
                T.buffer_store(x_scale, T.Select(finite, scale, T.float32(float("nan"))), [row])
            _pack_bits(shape, x, x_bits, row, team, limit)
    return built()


def _sum_of(values: _Group, team: _Team, k: int, term: Callable[[Expr], Expr]) -> Expr:
    """This thread's share of the sum of ``term`` over a row."""
    held = T.alloc_buffer((1,), "float32", scope="local")
    four = T.alloc_buffer((4,), "float32", scope="local")
    T.buffer_store(held, T.float32(0), [0])
    with T.serial(0, max(1, ceil_div(k, 4 * team.size))) as i:
        values.load(four, (i * team.size + team.rank) * 4)
        for j in range(4):
            T.buffer_store(held, held[0] + term(four[j]), [0])
    return held[0]


def _pack_bits(shape: MatmulShape, x: Expr, x_bits: Expr, row: Expr, team: _Team, limit: Expr) -> None:
    """The two planes of a row: a warp makes a word of the comparisons of its threads."""
    words = shape.segment_blocks(BITS_BLOCK)
    value = T.alloc_buffer((1,), "float32", scope="local")
    word = T.alloc_buffer((1,), "uint32", scope="local")
    lane = team.rank % WARP
    with T.serial(0, ceil_div(shape.groups * words, team.warps)) as i:
        index = i * team.warps + team.rank // WARP
        with T.If(index < shape.groups * words), T.Then():
            inner = index % words * BITS_BLOCK + lane
            k = index // words * shape.group_size + inner
            T.buffer_store(value, T.float32(0), [0])
            with T.If(T.And(inner < shape.group_size, k < shape.k)), T.Then():
                T.buffer_store(value, x[row, k], [0])
            for plane, magnitude in enumerate((T.abs(value[0]), T.float32(0) - value[0])):
                T.buffer_store(word, device.ballot(T.Cast("int32", magnitude > limit[0])), [0])
                with T.If(lane == 0), T.Then():
                    T.buffer_store(x_bits, word[0], [row, index, plane])
