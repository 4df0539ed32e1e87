"""What attention reads and writes, and the few statements that both of its ways are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import BufferStore, Select, Stmt, Var

from tvm_ternary.kernels.attention import WORD, Attention
from tvm_ternary.schedule.cpu.nest import index, loop, sequence, static, vector
from tvm_ternary.schedule.cpu.simd import Simd

KEYS = 64
"""Keys of a block: their scores for a tile of queries, beside the tile itself, fit the first-level cache."""

MANY_REGISTERS = 32
"""For a register tile of eight rows, or of twelve, and two vectors."""

assert KEYS == WORD, "a block of keys is a word of a mask"

ZERO = tirx.const(0.0, "float32")
NOTHING = tirx.const(float("-inf"), "float32")
HIDDEN = -1e30
"""Masks from here down hide a key, and scores are above it: any sum of the two is below all other scores."""


class Values(Protocol):
    """Where values are read from, one element by what it is of."""

    def value_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr: ...


class Source(Values, Protocol):
    """Where keys and values are read from."""

    def key_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr: ...


@dataclass(frozen=True)
class Run:
    """Keys and values of a sequence that lie one behind another.

    Parameters
    ----------
    k, v : Var
    key, value : str
        Layouts; those of buffers that hold one head alone have no ``b`` and ``h``.
    start, count : Expr
        Number of the first one in the sequence, and how many there are.
    """

    k: Var
    v: Var
    key: str
    value: str
    start: Expr
    count: Expr

    def key_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.k[tuple(place(self.key, batch, kv, key - self.start, d))]

    def value_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.v[tuple(place(self.value, batch, kv, key - self.start, d))]

    def blocks(self, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        """For the keys of each block of the sequence, ``body(first, count)``."""
        if static(self.count) == 1:
            return body(self.start, index(1))
        stop, size = self.start + self.count, index(KEYS)
        before = tirx.floordiv(self.start, size)

        def block(n: Expr) -> Stmt:
            first = tirx.max(self.start, (before + n) * KEYS)
            return body(first, tirx.min(stop, (before + n + 1) * KEYS) - first)

        return loop(tirx.floordiv(stop + (KEYS - 1), size) - before, block, name="block")


@dataclass(frozen=True)
class Operands:
    """The arguments of an attention, and one element of each by what it is of.

    Parameters
    ----------
    shape : Attention
    simd : Simd
    batch, queries : Expr
        Extents.
    past, new : Expr
        Keys in either part of `Attention.joined`; else none and all.
    """

    shape: Attention
    simd: Simd
    batch: Expr
    queries: Expr
    past: Expr
    new: Expr

    @cached_property
    def keys(self) -> Expr:
        return Analyzer().simplify(self.past + self.new)

    @cached_property
    def params(self) -> list[Var]:
        """All arguments, results last."""
        parts = [part for name in "kv" for part in self.apart[name]] if self.shape.joined else [self.k, self.v]
        results = [self.out, *([self.k, self.v] if self.shape.joined else [])]
        return [self.q, *parts, *([self.mask] if self.shape.mask else []), *results]

    @cached_property
    def apart(self) -> dict[str, tuple[Var, Var]]:
        """The parts of k and v, past and new."""
        shape = self.shape

        def of(name: str, layout: str, size: int) -> tuple[Var, Var]:
            past = self._operand(f"past_{name}", layout, shape.kv_heads, self.past, size)
            return past, self._operand(f"new_{name}", layout, shape.kv_heads, self.new, size)

        return {"k": of("k", shape.key, shape.size), "v": of("v", shape.value, shape.value_size)}

    @cached_property
    def q(self) -> Var:
        return self._operand("q", self.shape.query, self.shape.heads, self.queries, self.shape.size)

    @cached_property
    def k(self) -> Var:
        return self._operand("k", self.shape.key, self.shape.kv_heads, self.keys, self.shape.size)

    @cached_property
    def v(self) -> Var:
        return self._operand("v", self.shape.value, self.shape.kv_heads, self.keys, self.shape.value_size)

    @cached_property
    def out(self) -> Var:
        return self._operand("out", self.shape.out, self.shape.heads, self.queries, self.shape.value_size)

    @cached_property
    def mask(self) -> Var:
        bits = self.shape.hidden is not None
        extents = {"b": self.batch, "h": index(self.shape.heads), "m": self.queries}
        extents["s"] = self.words if bits else self.keys
        dims = [extents[axis] if axis in self.shape.mask else index(1) for axis in "bhms"]
        return tirx.decl_buffer(dims, "int64" if bits else "float32", "mask")

    @cached_property
    def words(self) -> Expr:
        """Words of a mask of bits."""
        return Analyzer().simplify(tiles(self.keys, WORD))

    def _operand(self, name: str, layout: str, heads: int, length: Expr, size: int) -> Var:
        extents = {"b": self.batch, "h": index(heads), "l": length, "d": index(size)}
        return tirx.decl_buffer([extents[axis] for axis in layout], "float32", name)

    def query_at(self, batch: Expr, head: Expr, query: Expr, d: Expr) -> Expr:
        return self.q[tuple(place(self.shape.query, batch, head, query, d))]

    def key_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.k[tuple(place(self.shape.key, batch, kv, key, d))]

    def value_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.v[tuple(place(self.shape.value, batch, kv, key, d))]

    def mask_at(self, batch: Expr, head: Expr, query: Expr, key: Expr) -> Expr:
        """What is added to a score; of a mask of bits a word, ``key`` its number."""
        return self.mask[tuple(self.mask_place(batch, head, query, key))]

    def mask_place(self, batch: Expr, head: Expr, query: Expr, key: Expr) -> list[Expr]:
        at = {"b": batch, "h": head, "m": query, "s": key}
        return [at[axis] if axis in self.shape.mask else index(0) for axis in "bhms"]

    def out_at(self, batch: Expr, head: Expr, query: Expr, d: Expr) -> Expr:
        return self.out[tuple(place(self.shape.out, batch, head, query, d))]

    def store(self, batch: Expr, head: Expr, query: Expr, d: Expr, value: Expr) -> Stmt:
        return BufferStore(self.out, value, place(self.shape.out, batch, head, query, d))

    @property
    def lanes(self) -> int:
        """Float32 elements of a vector."""
        return self.simd.lanes("float32")

    @property
    def rows(self) -> int:
        """Rows of a register tile, two vectors wide: they and what they are made of fit the registers."""
        return 8 if self.simd.registers >= MANY_REGISTERS else 4

    def blocks(self, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        """For each block of keys, ``body(first, count)``."""
        known = static(self.keys)
        if known is not None and known <= KEYS:
            return body(index(0), index(known))
        count = tirx.floordiv(self.keys + (KEYS - 1), index(KEYS))
        return loop(count, lambda n: body(n * KEYS, tirx.min(index(KEYS), self.keys - n * KEYS)), name="block")


def place(layout: str, batch: Expr, head: Expr, position: Expr, d: Expr) -> list[Expr]:
    at = {"b": batch, "h": head, "l": position, "d": d}
    return [at[axis] for axis in layout]


def tiles(extent: Expr, size: int) -> Expr:
    known = static(Analyzer().simplify(extent))
    return tirx.floordiv(extent + (size - 1), index(size)) if known is None else index(-(-known // size))


def hide(score: Expr, word: Expr, bit: Expr, hidden: float) -> Expr:
    """A score, to which ``hidden`` is added unless a bit of 32 is set."""
    one, nothing = tirx.const(1, "uint32"), tirx.const(0, "uint32")
    set_ = tirx.NE(tirx.bitwise_and(word, tirx.shift_left(one, bit.astype("uint32"))), nothing)
    return Select(set_, score, score + tirx.const(hidden, "float32"))


def is_nothing(hidden: float, beside: Expr) -> Expr:
    """Whether keys that ``hidden`` hides have no weight; ``beside`` is whether each query sees another key.

    Infinity leaves them none, a large number none beside a key that is seen, and a small one some in any case.
    """
    if hidden > HIDDEN or hidden == float("-inf"):
        return tirx.const(hidden < HIDDEN)
    return beside


def inverse(total: Expr) -> Expr:
    """1 / total; 0 of nothing."""
    return Select(tirx.EQ(total, ZERO), ZERO, tirx.const(1.0, "float32") / total)


def buffer(name: str, *extents: int) -> Var:
    return tirx.decl_buffer([index(extent) for extent in extents], "float32", name)


def vectors(width: int, lanes: int, write: Callable[[Expr], Stmt]) -> Stmt:
    """One statement for each vector of so many elements; ``write`` gets the element."""

    def part(at: int) -> Stmt:
        return vector(lanes, lambda lane: write(lane + at))

    return sequence([part(at) for at in range(0, width, lanes)])


def elements(count: Expr, lanes: int, write: Callable[[Expr], Stmt]) -> Stmt:
    """One statement for each of so many elements: whole vectors, then one by one."""
    whole, rest = (Analyzer().simplify(op(count, index(lanes))) for op in (tirx.floordiv, tirx.floormod))
    parts = [loop(whole, lambda n: vector(lanes, lambda lane: write(n * lanes + lane)), name="part")]
    if static(rest) != 0:
        parts.append(loop(rest, lambda n: write(whole * lanes + n), name="rest"))
    return sequence(parts)


def zeros(sums: list[Var], lanes: int) -> list[Stmt]:
    def zero(acc: Var) -> Stmt:
        return vectors(int(acc.shape[0]), lanes, lambda c: BufferStore(acc, ZERO, [c]))

    return [zero(acc) for acc in sums]


def across(buffer: Var, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Stmt:
    """Fold lanes pairwise into lane 0."""

    def halve(half: int) -> Stmt:
        return vector(half, lambda lane: BufferStore(buffer, combine(buffer[lane], buffer[lane + half]), [lane]))

    return sequence([halve(lanes >> step) for step in range(1, lanes.bit_length())])
