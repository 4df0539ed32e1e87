"""A warp of a step over a ternary cache: its places, its rows' results so far, and their softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.plan import Step
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any

NOTHING = float("-inf")


def const(value: float) -> Expr:
    return tirx.const(value, "float32")


def local(count: int, dtype: str = "float32") -> Expr:
    return T.alloc_buffer((count,), dtype, scope="local")


def fold(held: Expr, index: Expr, distances: Sequence[int], combine: Callable[[Expr, Expr], Expr]) -> None:
    """Combine a register over lanes; every one of them gets the result."""
    exchange = device.exchange_int if held.dtype == "int32" else device.exchange_float
    for distance in distances:
        T.buffer_store(held, combine(held[index], exchange(held[index], distance)), [index])


def add(a: Expr, b: Expr) -> Expr:
    return a + b


OVER_T, OVER_G = (1, 2), (4, 8, 16)


class Warp:
    """What a thread is in a step, and the registers of its warp's results.

    Attributes
    ----------
    split, batch, kv, first_row : Expr
        Its thread block's part of the tokens, its sequence, its head of keys, and the first of its rows.
    thread, lane, warp : Expr
        ``lane = 4 g + t``: row t of each tile.
    g, t : Expr
    shared : Buffer
        The thread block's shared memory.
    mine : Expr
        Where in it the warp's blocks lie.
    o, m, l : Buffer
        Of each tile: sums of values, of elements ``4 (8 r + g) + i`` at ``4 r + i``; the largest score; the sum of
        weights, of this thread's tokens alone.
    """

    def __init__(self, step: Step, buffers: dict[str, Expr], block: tuple[Expr, Expr, Expr], thread: Expr) -> None:
        self.step, self.shape, self.b = step, step.shape, buffers
        self.split, y, self.batch = block
        self.thread, self.lane, self.warp = thread, thread % 32, thread // 32
        self.kv, self.first_row = y // step.row_tiles, y % step.row_tiles * step.rows
        self.g, self.t = self.lane // 4, self.lane % 4
        self.shared = T.alloc_buffer((step.shared_bytes,), "uint8", scope="shared.dyn")
        self.mine = step.query_bytes + self.warp * step.warp_bytes
        self.stride = step.splits * step.warps
        self.first = self.split * step.warps + self.warp
        self.count = T.max(buffers["full"][self.batch] - self.first + (self.stride - 1), 0) // self.stride
        self.o = local(step.tiles * step.passes * 4)
        self.m, self.l = local(step.tiles), local(step.tiles)
        self.fade = local(step.tiles)
        with unrolled(step.tiles * step.passes * 4) as i:
            T.buffer_store(self.o, const(0.0), [i])
        with unrolled(step.tiles) as tile:
            T.buffer_store(self.m, const(NOTHING), [tile])
            T.buffer_store(self.l, const(0.0), [tile])

    @staticmethod
    def place_of(piece: Expr) -> Expr:
        """Where four elements lie: those that the four t's multiply at a time are neighbours."""
        return piece // 16 * 16 + piece % 4 * 4 + piece // 4 % 4

    def query_at(self, row: Expr, place: Expr) -> Expr:
        return (row * (self.step.padded // 4) + place) * 16

    def softmax(self, tile: Expr, scores: Expr, count: int) -> None:
        """Turn a row's scores into weights, and what was there before into what it is beside a larger one."""
        best, safe = local(1), local(1)
        T.buffer_store(best, scores[tile * count], [0])
        with unrolled(count) as i:
            T.buffer_store(best, T.max(best[0], scores[tile * count + i]), [0])
        fold(best, 0, OVER_G, T.max)
        T.buffer_store(best, T.max(best[0], self.m[tile]), [0])
        # Where there is nothing yet all differences are to be minus infinity.
        T.buffer_store(safe, T.Select(best[0] > const(NOTHING), best[0], const(0.0)), [0])
        T.buffer_store(self.fade, own.exp2(self.m[tile] - safe[0]), [tile])
        T.buffer_store(self.m, best[0], [tile])
        T.buffer_store(self.l, self.l[tile] * self.fade[tile], [tile])
        with unrolled(count) as i:
            place = tile * count + i
            T.buffer_store(scores, own.exp2(scores[place] - safe[0]), [place])
            T.buffer_store(self.l, self.l[tile] + scores[place], [tile])
