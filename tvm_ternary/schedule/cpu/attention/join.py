"""Keys and values of the past and new ones, put one behind the other as results of their own.

A step of decoding reads every key of the past once. Joined on the way, a block at a time while it is in the cache, they
are not read from memory again.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import BufferStore, Stmt, Var

from tvm_ternary.schedule.cpu.attention.operands import Operands, place
from tvm_ternary.schedule.cpu.nest import index, loop, sequence, space, strips, vector


def join_all(on: Operands) -> Stmt:
    """Join all keys, then all values."""
    extents = [on.batch, index(on.shape.kv_heads), on.keys]

    def of(operand: str, size: int) -> Stmt:
        return space(extents, size, lambda at: _row(on, operand, at[0], at[1], at[2], _chosen(on, operand)))

    return sequence(of("k", on.shape.size), of("v", on.shape.value_size))


def join_block(on: Operands, batch: Expr, kv: Expr, first: Expr, count: Expr) -> Stmt:
    """Join the keys and values ``first .. first + count`` of a head."""
    old = tirx.max(tirx.min(on.past - first, count), index(0))

    def of(operand: str) -> list[Stmt]:
        past, new = _sources(on, operand)
        return [
            loop(old, lambda j: _row(on, operand, batch, kv, first + j, past), name="past"),
            loop(count - old, lambda j: _row(on, operand, batch, kv, first + old + j, new), name="new"),
        ]

    return sequence(of("k"), of("v"))


_Read = Callable[[Expr, Expr, Expr, Expr], Expr]


def _sources(on: Operands, operand: str) -> tuple[_Read, _Read]:
    """What reads an element by its joined position, of the past and of what is new."""
    layout = on.shape.key if operand == "k" else on.shape.value
    past, new = on.apart[operand]

    def of_past(batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return past[tuple(place(layout, batch, kv, key, d))]

    def of_new(batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return new[tuple(place(layout, batch, kv, key - on.past, d))]

    return of_past, of_new


def _chosen(on: Operands, operand: str) -> _Read:
    past, new = _sources(on, operand)
    return lambda batch, kv, key, d: tirx.if_then_else(key < on.past, past(batch, kv, key, d), new(batch, kv, key, d))


def _row(on: Operands, operand: str, batch: Expr, kv: Expr, key: Expr, read: _Read) -> Stmt:
    """One key or value of a head."""
    to, layout, size = (
        (on.k, on.shape.key, on.shape.size) if operand == "k" else (on.v, on.shape.value, on.shape.value_size)
    )

    def part(base: Expr, width: int, stale: Expr | None) -> Stmt:
        # The overlapped start of the last vector is written twice, the same each time.
        return vector(width, lambda lane: _store(to, layout, batch, kv, key, base + lane, read))

    return sequence(strips(size, on.lanes, part))


def _store(to: Var, layout: str, batch: Expr, kv: Expr, key: Expr, d: Expr, read: _Read) -> Stmt:
    return BufferStore(to, read(batch, kv, key, d), place(layout, batch, kv, key, d))
