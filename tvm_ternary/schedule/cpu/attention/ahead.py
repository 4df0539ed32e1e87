"""Asking for queries, keys and values before they are needed.

Where all heads of a token lie together, rows of one head lie apart, and what a CPU reads ahead by itself ends with a
page. So a tile of queries asks for the values of a block while it computes its scores, for the next block's keys while
it adds values, and for the next tile's queries before its first block. While others use the shared cache, attention in
float over 4,096 keys takes a tenth less time by that; where all keys stay in a core's own cache it costs 2%.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import IfThenElse, Stmt

from tvm_ternary.schedule.cpu.attention.masks import Tile
from tvm_ternary.schedule.cpu.attention.operands import KEYS, MANY_REGISTERS, Operands
from tvm_ternary.schedule.cpu.nest import index, loop, sequence
from tvm_ternary.schedule.intrinsics.common import prefetch

_LINE = 16
"""Elements that come together."""


class Ahead:
    """What a tile of queries asks for.

    Parameters
    ----------
    on : Operands
    tile : Tile
    kv : Expr
        Its head of keys and values.
    width, rows, elements : int
        Queries of a tile, keys of a register tile of scores, elements of one of values.
    keys : bool
        Whether keys and values are read as they lie.
    """

    def __init__(self, on: Operands, tile: Tile, kv: Expr, width: int, rows: int, elements: int, *, keys: bool) -> None:
        self.on, self.tile, self.kv, self.width, self.rows, self.elements = on, tile, kv, width, rows, elements
        # With fewer, a step of a loop has so few multiply-adds that asking costs more than it saves.
        self.keys = keys and on.simd.registers >= MANY_REGISTERS

    def ask_for_tiles(self) -> Sequence[Stmt]:
        """For the next tile's queries, and for where results go: not in the last tile, which may be the only one."""
        shape, tile, following = self.on.shape, self.tile, self.tile.first + self.width
        read, write = (partial(at, tile.batch, tile.head) for at in (self.on.query_at, self.on.out_at))

        def ask(column: Expr) -> Stmt:
            after = tirx.min(following + column, self.on.queries - 1)
            rows = [_row(read, after, shape.size)] if shape.query[-1] == "d" else []
            rows += [_row(write, tile.first + column, shape.value_size, to_write=True)] if shape.out[-1] == "d" else []
            return sequence(rows)

        if "d" not in (shape.query[-1], shape.out[-1]):
            return []
        return [IfThenElse(following < self.on.queries, loop(self.width, ask, name="column"), None)]

    def ask_for_value(self, first: Expr, tile: Expr, step: Expr) -> Sequence[Stmt]:
        """While scores of a register tile of keys are computed, in a step for each element: their values."""
        shape = self.on.shape
        read, size, layout = self.on.value_at, shape.value_size, shape.value
        return self._ask(read, layout, first + tile * self.rows, size, step * self.rows, shape.size)

    def ask_for_key(self, first: Expr, start: Expr, step: Expr) -> Sequence[Stmt]:
        """While values are added from element ``start`` on, in a step for each key: the next block's keys."""
        shape = self.on.shape
        rows = -(-KEYS * self.elements // shape.value_size)
        key = first + KEYS + tirx.floordiv(start, index(self.elements)) * rows
        return self._ask(self.on.key_at, shape.key, key, shape.size, step * rows, KEYS)

    def _ask(
        self, read: Callable[..., Expr], layout: str, key: Expr, size: int, part: Expr, parts: int
    ) -> Sequence[Stmt]:
        """For what lies ``part / parts`` rows behind ``key``."""
        if not self.keys or layout[-1] != "d":
            return []
        row, rest = (one(part, index(parts)) for one in (tirx.floordiv, tirx.floormod))
        d = rest if size == parts else tirx.floordiv(rest * size, index(parts))
        return [prefetch(T.address_of(read(self.tile.batch, self.kv, key + row, d)))]


def _row(read: Callable[[Expr, Expr], Expr], row: Expr, size: int, *, to_write: bool = False) -> Stmt:
    return sequence([prefetch(T.address_of(read(row, index(d))), to_write=to_write) for d in range(0, size, _LINE)])
