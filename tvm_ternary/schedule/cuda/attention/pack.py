"""A block of tokens becomes ternary planes on a GPU: by one thread block, its numbers in shared memory on the way.

Sums are in the order of a CPU's with vectors of sixteen, and a product and its sum are rounded once, as CPUs with that
instruction do. So a block is, bit for bit, what that CPU packs; keys are so whatever the vectors, since a lane has all
tokens of an element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK, STEPS, Digits, digits, packed_words
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.warp import const, local

Expr = Any

THREADS = 128
_SMALLEST = float(np.finfo(np.float32).tiny)
_INFINITY_BITS = 0x7F800000
_SPARE = 4
"""Bytes between the numbers of two tokens, so that words of different tokens lie in different banks."""


@dataclass(frozen=True)
class Part:
    """The keys or the values.

    Parameters
    ----------
    operand : int
        0, or 1 of values.
    new, tail, scale : Buffer
    words : sequence of Buffer
        One for each of `digits`.
    new_layout, layout : str
    size, planes : int
    """

    operand: int
    new: Expr
    tail: Expr
    scale: Expr
    words: Sequence[Expr]
    new_layout: str
    layout: str
    size: int
    planes: int

    @property
    def fields(self) -> tuple[Digits, ...]:
        return digits(self.planes)

    @property
    def padded(self) -> int:
        return ceil_div(self.size, LANES) * LANES

    @property
    def row(self) -> int:
        """Bytes from one token's numbers to the next one's."""
        return self.padded + _SPARE

    @property
    def shared_bytes(self) -> int:
        return len(self.fields) * BLOCK * self.row

    def what_it_stands_for(self, batch: Expr, kv: Expr, block: Expr, token: Expr, d: Expr) -> Expr:
        """An element of a packed block."""
        row, term = (d, token) if self.operand else (token, d)
        number: Expr = 0
        for words, field in zip(self.words, self.fields, strict=True):
            inner = term % field.terms
            word = words[batch, kv, block, row // LANES, term // field.terms, row % LANES]
            shift = T.Cast("uint32", inner % 4 * 8 + inner // 4 * field.bits)
            bits = T.bitwise_and(T.shift_right(word, shift), T.uint32(2**field.bits - 1))
            number = number + (T.Cast("int32", bits) - field.offset) * field.weight
        scale = self.scale[batch, kv, block, token if self.operand else d]
        return own.multiply(T.Cast("float32", number), scale)


def numbers_of_keys(
    part: Part, codes: Expr, at: Sequence[Expr], thread: Expr, read: Callable[[Expr, Expr, Expr], None]
) -> None:
    """An element of a head has one scale in a block, and one thread."""
    x, fit = local(1), _Fit(part)
    with _strided(part.size, thread) as d:
        fit.clear()
        with T.serial(0, BLOCK) as token:
            read(token, d, x)
            fit.add_size(x[0])
        fit.start(fit.size * const(1 / BLOCK))
        with T.serial(0, BLOCK) as token:
            read(token, d, x)
            _store_number(part, codes, token, d, fit.add(x[0]))
        T.buffer_store(part.scale, fit.fitted(), [*at, d])


def numbers_of_values(
    part: Part, codes: Expr, at: Sequence[Expr], thread: Expr, read: Callable[[Expr, Expr, Expr], None]
) -> None:
    """A token has one scale, and sixteen threads."""
    x, fit = local(1), _Fit(part)
    lane = thread % LANES
    with T.serial(0, BLOCK // (THREADS // LANES)) as i:
        token = i * (THREADS // LANES) + thread // LANES

        def each(do: Callable[[Expr], None], token: Expr = token) -> None:
            with T.serial(0, ceil_div(part.size, LANES)) as step:
                d = step * LANES + lane
                with T.If(d < part.size), T.Then():
                    read(token, d, x)
                    do(d)

        fit.clear()
        each(lambda d: fit.add_size(x[0]))
        fit.fold(0)
        fit.start(fit.size / const(part.size))
        each(lambda d: _store_number(part, codes, token, d, fit.add(x[0])))
        fit.fold(2)
        fit.fold(3)
        with T.If(lane == 0), T.Then():
            T.buffer_store(part.scale, fit.fitted(), [*at, token])


class _Fit:
    """A thread's sums of what shares a scale: sizes, or their mean, and what the scale is fitted to."""

    def __init__(self, part: Part) -> None:
        self._part = part
        # Of magnitudes, then mean; inverse of the step; of elements times numbers; of squares of these.
        self._held, self._number = local(4), local(1, "int32")

    @property
    def size(self) -> Expr:
        return self._held[0]

    def clear(self) -> None:
        for i in range(4):
            T.buffer_store(self._held, const(0.0), [i])

    def add_size(self, x: Expr) -> None:
        T.buffer_store(self._held, self._held[0] + T.abs(x), [0])

    def fold(self, index: int) -> None:
        """Over the sixteen threads of a token."""
        for distance in (8, 4, 2, 1):
            T.buffer_store(self._held, self._held[index] + device.exchange_float(self._held[index], distance), [index])

    def start(self, mean: Expr) -> None:
        """With the mean magnitude known."""
        T.buffer_store(self._held, mean, [0])
        step = own.multiply(self._held[0], const(STEPS[self._part.planes]))
        T.buffer_store(self._held, T.Select(step >= const(_SMALLEST), const(1.0) / step, const(0.0)), [1])

    def add(self, x: Expr) -> Expr:
        """The number of an element, which is counted in the fit; 0 of what is not finite."""
        most = (3**self._part.planes - 1) // 2
        c = own.multiply(x, self._held[1])
        whole = T.Select(own.magnitude_bits(c) < _INFINITY_BITS, c, const(0.0))
        T.buffer_store(self._number, own.nearest(T.max(T.min(whole, const(most)), const(-most))), [0])
        c = T.Cast("float32", self._number[0])
        T.buffer_store(self._held, own.multiply_add(x, c, self._held[2]), [2])
        T.buffer_store(self._held, own.multiply_add(c, c, self._held[3]), [3])
        return self._number[0]

    def fitted(self) -> Expr:
        """The scale, by least squares; NaN where an element is not finite."""
        fitted = self._held[2] / T.Select(self._held[3] > const(0.0), self._held[3], const(1.0))
        finite = own.magnitude_bits(self._held[0]) < _INFINITY_BITS
        return T.Select(finite, fitted, const(float("nan")))


@contextmanager
def _strided(count: int, thread: Expr) -> Iterator[Expr]:
    """So many things, shared out among the threads of a block."""
    with T.serial(0, ceil_div(count, THREADS)) as i:
        index = i * THREADS + thread
        with T.If(index < count), T.Then():
            yield index


def clear_behind(part: Part, codes: Expr, thread: Expr) -> None:
    """Words have no bit set behind the end."""
    spare = part.padded - part.size
    if spare:
        with _strided(len(part.fields) * BLOCK * spare, thread) as index:
            T.buffer_store(codes, T.uint8(0), [index // spare * part.row + part.size + index % spare])


def _store_number(part: Part, codes: Expr, token: Expr, d: Expr, number: Expr) -> None:
    """The fields of a number: with all offsets added they are its digits, none below zero."""
    digit = number + (3**part.planes - 1) // 2
    for i, field in enumerate(part.fields):
        high = digit // field.weight if field.weight > 1 else digit
        T.buffer_store(codes, T.Cast("uint8", high), [(i * BLOCK + token) * part.row + d])
        digit = digit % field.weight


def words_of_keys(part: Part, i: int, field: Digits, codes: Expr, at: Sequence[Expr], thread: Expr) -> None:
    """A word is of one token: four numbers, as they lie, are moved as one."""
    _, count, _ = packed_words(BLOCK, part.size, field)
    with _strided(BLOCK * count, thread) as index:
        lane, w, group = index % LANES, index // LANES % count, index // (LANES * count)
        first = (i * BLOCK + group * LANES + lane) * part.row + w * field.terms
        fours = [
            T.shift_left(device.get_word(codes.data, first + 4 * j), T.uint32(field.bits * j))
            for j in range(field.terms // 4)
        ]
        T.buffer_store(part.words[i], reduce(T.bitwise_or, fours), [*at, group, w, lane])


def words_of_values(part: Part, i: int, field: Digits, codes: Expr, at: Sequence[Expr], thread: Expr) -> None:
    """A word is of one element."""
    groups, count, _ = packed_words(part.size, BLOCK, field)
    with _strided(groups * count * LANES, thread) as index:
        lane, w, group = index % LANES, index // LANES % count, index // (LANES * count)

        def term(t: int) -> Expr:
            byte = codes[(i * BLOCK + w * field.terms + t) * part.row + group * LANES + lane]
            return T.shift_left(T.Cast("uint32", byte), T.uint32(8 * (t % 4) + field.bits * (t // 4)))

        word = reduce(T.bitwise_or, [term(t) for t in range(field.terms)])
        T.buffer_store(part.words[i], word, [*at, group, w, lane])
