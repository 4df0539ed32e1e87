"""Which blocks of keys a thread block of a prompt goes through: those that its mask of bits leaves.

A word is a query's mask of a block of 64 keys. Before anything else each warp looks at those of its sixteen queries,
and says in a byte of shared memory for each block whether one of them sees a key of it. Blocks that none of a thread
block's queries sees are then passed over: their keys and values are not even copied.

Where what hides a key is finite, as exporters have it, a query that sees no key at all gives the mean of its values. So
nothing is passed over by a thread block that has such a query. Bits of keys that are not there, or that causal order
hides, do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.prompt_plan import KEYS, ROWS, Prompt
from tvm_ternary.schedule.cuda.attention.warp import local

Expr = Any
Turn = tuple[Expr, Expr, Expr, Expr]
"""A block, the one after it, the one after that, and how many there were before."""

HIDDEN = -1e30
"""What is added from here down leaves nothing of a score: beside any that is seen its weight is 0."""


class InOrder:
    """All blocks, one after another.

    Parameters
    ----------
    blocks : Expr
        Their number.
    """

    def __init__(self, blocks: Expr) -> None:
        self.blocks = blocks
        self.first: tuple[Expr, Expr] = (0, 1)

    @contextmanager
    def each(self) -> Iterator[Turn]:
        with T.serial(0, self.blocks) as i:
            yield i, i + 1, i + 2, i


class SeenAlone:
    """The blocks of which a query sees a key.

    Parameters
    ----------
    prompt : Prompt
    words : Buffer
        The mask.
    shared : Buffer
    place : tuple of Expr
        Sequence, head, the first of the thread block's queries, and the thread.
    blocks : Expr
        The number of blocks.
    limit : callable
        Of a query, keys up to the last one that it may see.
    """

    def __init__(
        self,
        prompt: Prompt,
        words: Expr,
        shared: Expr,
        place: tuple[Expr, ...],
        blocks: Expr,
        limit: Callable[[Expr], Expr],
    ) -> None:
        self._prompt, self._words, self._shared, self.blocks = prompt, words, shared, blocks
        self._limit = limit
        self._batch, self._head, self._first, self._thread = place
        # The block, the one after it, the one after that, turns.
        self._state = local(4, "int32")
        self._look()
        T.evaluate(T.tvm_storage_sync("shared"))
        self._find(0, 0)
        self._find(1, self._state[0] + 1)
        T.buffer_store(self._state, T.int32(0), [3])
        self.first: tuple[Expr, Expr] = (self._state[0], self._state[1])

    @contextmanager
    def each(self) -> Iterator[Turn]:
        state = self._state
        with T.While(state[0] < self.blocks):
            self._find(2, state[1] + 1)
            yield state[0], state[1], state[2], state[3]
            for n, value in ((0, state[1]), (1, state[2]), (3, state[3] + 1)):
                T.buffer_store(state, value, [n])

    def word(self, row: Expr, block: Expr) -> Expr:
        """A query's bits of a block."""
        where = {"b": self._batch, "h": self._head, "m": T.min(row, self._prompt.queries - 1), "s": block}
        return self._words[tuple(where[axis] if axis in self._prompt.shape.mask else 0 for axis in "bhms")]

    def _byte(self, block: Expr) -> Expr:
        """Where what warps say of a block begins; of block -1, whether nothing may be passed over."""
        return self._prompt.flags_at + (block + 1) * self._prompt.warps

    def _look(self) -> None:
        """Half of a warp has a block of its sixteen queries."""
        lane, warp = self._thread % 32, self._thread // 32
        row, half = self._first + warp * ROWS + lane % 16, lane // 16
        seen, any_, said, limit = local(1, "int32"), local(1, "int32"), local(1, "uint32"), local(1, "int32")
        T.buffer_store(limit, self._limit(T.min(row, self._prompt.queries - 1)), [0])
        T.buffer_store(any_, T.int32(0), [0])
        with T.serial(0, (self.blocks + 1) // 2) as i:
            block = 2 * i + half
            T.buffer_store(seen, T.int32(0), [0])
            count = limit[0] - block * KEYS
            with T.If(T.And(block < self.blocks, count > 0)), T.Then():
                spare = T.Cast("uint64", KEYS - T.min(count, KEYS))
                there = T.shift_left(T.Cast("uint64", self.word(row, block)), spare)
                T.buffer_store(seen, T.Cast("int32", there != T.uint64(0)), [0])
            T.buffer_store(any_, T.bitwise_or(any_[0], seen[0]), [0])
            T.buffer_store(said, device.ballot(seen[0]), [0])
            with T.If(T.And(lane % 16 == 0, block < self.blocks)), T.Then():
                of_half = T.bitwise_and(T.shift_right(said[0], T.Cast("uint32", 16 * half)), T.uint32(0xFFFF))
                there = T.Cast("int32", of_half != T.uint32(0))
                T.evaluate(own.put_byte(self._shared.data, self._byte(block) + warp, there))
        T.buffer_store(any_, T.bitwise_or(any_[0], device.exchange_int(any_[0], 16)), [0])
        T.buffer_store(said, device.ballot(any_[0]), [0])
        with T.If(lane == 0), T.Then():
            hidden = self._prompt.shape.hidden
            whole: Expr = T.int32(1)
            if hidden is not None and hidden <= HIDDEN:
                whole = T.int32(0)
                if not math.isinf(hidden):
                    whole = T.Cast("int32", said[0] != T.uint32(0xFFFFFFFF))
            T.evaluate(own.put_byte(self._shared.data, self._byte(-1) + warp, whole))

    def _find(self, n: int, start: Expr) -> None:
        """The first block from one on that is seen, or the end."""
        state = self._state
        T.buffer_store(state, start, [n])
        # The end has no bytes: what is not before it is not looked up.
        with T.While(T.And(state[n] < self.blocks, T.Not(self._is_seen(state[n])))):
            T.buffer_store(state, state[n] + 1, [n])

    def _is_seen(self, block: Expr) -> Expr:
        said: Expr = T.uint32(0)
        for of in (block, -1):
            for four in range(0, self._prompt.warps, 4):
                said = T.bitwise_or(said, device.get_word(self._shared.data, self._byte(of) + four))
        return said != T.uint32(0)
