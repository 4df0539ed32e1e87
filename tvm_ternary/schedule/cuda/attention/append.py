"""Appending to a cache of ternary keys and values on a GPU, in place: what `schedule.cpu.attention.append` does.

The tokens of a sequence that are not packed yet are its tail, then the new ones: a token's number among them says where
it is read. So all blocks that become full are packed at once, a thread block each; then the tail takes what is behind
them, and at last the counts change. These are three kernels, since each reads what the next one changes. A tail moves
down by whole blocks, and a thread moves all tokens of one place in a block, the first ones first, so that none waits.

A sequence that is cut within a block has tokens before its tail that are read from there.

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
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK, STEPS, Digits, digits, packed_words
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.plan import array, at_once, check_sizes, placed
from tvm_ternary.schedule.cuda.attention.warp import const, local
from tvm_ternary.schedule.cuda.matmul import SCHEDULED, any_rows, root_block

Expr = Any
Head = tuple[Expr, Expr]
"""A sequence, and a head of keys."""

THREADS = 128
_SMALLEST = float(np.finfo(np.float32).tiny)
_INFINITY_BITS = 0x7F800000
_SPARE = 4
"""Bytes between the numbers of two tokens, so that words of different tokens lie in different banks."""


def append_tokens(
    shape: Attention,
    planes: tuple[int, int],
    window: int,
    lengths: tuple[int, int | None, int, int],
    new: tuple[str, str] = ("blhd", "blhd"),
) -> tirx.PrimFunc:
    """The scheduled function ``(k, v, past, key words ..., key_scale, ..., tail k, tail v, full, recent)``.

    Parameters
    ----------
    shape : Attention
        ``key`` and ``value`` are the layouts of the tail.
    planes : tuple of int
        Of keys and of values.
    window : int
        A multiple of `BLOCK`: a block is packed as soon as so many newer tokens are there.
    lengths : tuple of (int or None)
        Batch, new tokens (None where they are known at run time, none of them among others), most blocks, tail's room.
    new : tuple of (str, str)
        Layouts of the new keys and values.

    Returns
    -------
    PrimFunc
        As `schedule.cpu.attention.append.append_tokens`, whose words about ``past`` and rounding hold here.

    Raises
    ------
    ValueError
        If the window is no multiple of a block, the tail has no room for it, or `attention_step` refuses the sizes.
    """
    check_sizes(shape)
    batch, tokens, blocks, room = lengths
    if window < 0 or window % BLOCK:
        raise ValueError(f"a window of {window} tokens; expected a multiple of {BLOCK}")
    if room < window + BLOCK:
        raise ValueError(f"a tail with room for {room} tokens; a window of {window} needs {window + BLOCK}")
    count = tirx.Var("tokens", "int64") if tokens is None else tokens
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("append_tokens")
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1})
        append = _Append(shape, planes, window, (batch, blocks, room), count, new)
        with root_block():
            append.emit()
    return builder.get()


@dataclass(frozen=True)
class _Part:
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


class _State:
    """What a thread knows of a sequence: blocks that stay, tokens before the new ones, blocks that become full."""

    def __init__(self, append: _Append, batch: Expr) -> None:
        held = local(4, "int32")
        full, recent, past = (append.counts[name][batch] for name in ("full", "recent", "past"))
        T.buffer_store(held, T.max(T.min(past, full * BLOCK + recent), 0), [0])
        T.buffer_store(held, T.min(full, held[0] // BLOCK), [1])
        T.buffer_store(held, held[0] - held[1] * BLOCK, [2])
        T.buffer_store(held, T.max(held[2] + append.tokens - append.window, 0) // BLOCK, [3])
        self.first, self.recent, self.count = held[1], held[2], held[3]
        self.cut = held[1] < full


class _Append:
    """Emits the kernels."""

    def __init__(
        self,
        shape: Attention,
        planes: tuple[int, int],
        window: int,
        extents: tuple[int, int, int],
        tokens: Expr,
        new: tuple[str, str],
    ) -> None:
        self.batch, blocks, room = extents
        self.kv_heads, self.window, self.given = shape.kv_heads, window, tokens
        self.tokens = tokens if isinstance(tokens, int) else T.Cast("int32", tokens)
        outer, sizes = (self.batch, self.kv_heads, blocks), (shape.size, shape.value_size)

        def laid(name: str, layout: str, length: Expr, size: int) -> Expr:
            extents = {"b": self.batch, "h": self.kv_heads, "l": length, "d": size}
            return array(name, [extents[axis] for axis in layout])

        fresh = [laid(f"new_{name}", new[n], tokens, sizes[n]) for n, name in enumerate("kv")]
        self.counts = {"past": array("past", [self.batch], "int32")}
        words, scales = [], []
        for n, (name, matrix) in enumerate((("key", (BLOCK, shape.size)), ("value", (shape.value_size, BLOCK)))):
            arrays = [(*outer, *packed_words(*matrix, field)) for field in digits(planes[n])]
            words.append([array(f"{name}_words{i}", one, "uint32") for i, one in enumerate(arrays)])
            scales.append(array(f"{name}_scale", (*outer, BLOCK if n else shape.size)))
        layouts = (shape.key, shape.value)
        tails = [laid(name, layouts[n], room, sizes[n]) for n, name in enumerate("kv")]
        for name in ("full", "recent"):
            self.counts[name] = array(name, [self.batch], "int32")
        self.parts = [
            _Part(n, fresh[n], tails[n], scales[n], words[n], new[n], layouts[n], sizes[n], planes[n]) for n in range(2)
        ]

    def emit(self) -> None:
        launch = T.launch_thread
        with (
            any_rows(self.given),
            launch("blockIdx.x", (self.given + (BLOCK - 1)) // BLOCK) as x,
            launch("blockIdx.y", self.kv_heads) as kv,
            launch("blockIdx.z", 2 * self.batch) as z,
            launch("threadIdx.x", THREADS) as thread,
            at_once(8),
        ):
            self._pack(T.Cast("int32", x), kv, z, thread)
        largest = max(part.size for part in self.parts)
        with (
            launch("blockIdx.x", ceil_div(BLOCK * largest, THREADS)) as x,
            launch("blockIdx.y", self.kv_heads) as kv,
            launch("blockIdx.z", 2 * self.batch) as z,
            launch("threadIdx.x", THREADS) as thread,
        ):
            state = _State(self, z // 2)
            for part in self.parts:
                with T.If(z % 2 == part.operand), T.Then():
                    self._move(part, state, (z // 2, kv), x * THREADS + thread)
        with launch("blockIdx.x", ceil_div(self.batch, 32)) as x, launch("threadIdx.x", 32) as thread:
            batch = x * 32 + thread
            with T.If(batch < self.batch), T.Then():
                state = _State(self, batch)
                recent = state.recent + self.tokens - state.count * BLOCK
                T.buffer_store(self.counts["full"], state.first + state.count, [batch])
                T.buffer_store(self.counts["recent"], recent, [batch])

    def _read(self, part: _Part, state: _State, head: Head, token: Expr, d: Expr, to: Expr) -> None:
        """An element of a token that is not packed, counted from the first of these."""
        with T.If(token < state.recent):
            with T.Then(), T.If(state.cut):
                with T.Then():
                    T.buffer_store(to, part.what_it_stands_for(*head, state.first, token, d), [0])
                with T.Else():
                    T.buffer_store(to, part.tail[tuple(placed(part.layout, *head, token, d))], [0])
            with T.Else():
                source = placed(part.new_layout, *head, token - state.recent, d)
                T.buffer_store(to, part.new[tuple(source)], [0])

    def _move(self, part: _Part, state: _State, head: Head, index: Expr) -> None:
        """What one element of the tail, and those whole blocks behind it, become."""
        x = local(1)
        place, d = index // part.size, index % part.size
        recent = state.recent + self.tokens - state.count * BLOCK
        with T.If(place < BLOCK), T.Then(), T.serial(0, T.max(recent - place + (BLOCK - 1), 0) // BLOCK) as n:
            token = place + n * BLOCK
            source = state.count * BLOCK + token
            stays = T.And(T.And(source < state.recent, state.count == 0), T.Not(state.cut))
            with T.If(T.Not(stays)), T.Then():
                self._read(part, state, head, source, d, x)
                T.buffer_store(part.tail, x[0], placed(part.layout, *head, token, d))

    # --- a block ----------------------------------------------------------------------------------------------------

    def _pack(self, n: Expr, kv: Expr, z: Expr, thread: Expr) -> None:
        """One that becomes full, of keys or of values."""
        codes = T.alloc_buffer((max(part.shared_bytes for part in self.parts),), "uint8", scope="shared.dyn")
        state = _State(self, z // 2)
        for part, numbers, words in zip(
            self.parts,
            (self._numbers_of_keys, self._numbers_of_values),
            (_words_of_keys, _words_of_values),
            strict=True,
        ):
            with T.If(T.And(n < state.count, z % 2 == part.operand)), T.Then():
                at = [z // 2, kv, state.first + n]

                def read(token: Expr, d: Expr, to: Expr, part: _Part = part) -> None:
                    self._read(part, state, (z // 2, kv), n * BLOCK + token, d, to)

                _clear_behind(part, codes, thread)
                numbers(part, codes, at, thread, read)
                T.evaluate(T.tvm_storage_sync("shared"))
                for i, field in enumerate(part.fields):
                    words(part, i, field, codes, at, thread)

    def _numbers_of_keys(
        self, part: _Part, codes: Expr, at: Sequence[Expr], thread: Expr, read: Callable[[Expr, Expr, Expr], None]
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

    def _numbers_of_values(
        self, part: _Part, codes: Expr, at: Sequence[Expr], thread: Expr, read: Callable[[Expr, Expr, Expr], None]
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

    def __init__(self, part: _Part) -> None:
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


def _clear_behind(part: _Part, codes: Expr, thread: Expr) -> None:
    """Words have no bit set behind the end."""
    spare = part.padded - part.size
    if spare:
        with _strided(len(part.fields) * BLOCK * spare, thread) as index:
            T.buffer_store(codes, T.uint8(0), [index // spare * part.row + part.size + index % spare])


def _store_number(part: _Part, codes: Expr, token: Expr, d: Expr, number: Expr) -> None:
    """The fields of a number: with all offsets added they are its digits, none below zero."""
    digit = number + (3**part.planes - 1) // 2
    for i, field in enumerate(part.fields):
        high = digit // field.weight if field.weight > 1 else digit
        T.buffer_store(codes, T.Cast("uint8", high), [(i * BLOCK + token) * part.row + d])
        digit = digit % field.weight


def _words_of_keys(part: _Part, i: int, field: Digits, codes: Expr, at: Sequence[Expr], thread: Expr) -> None:
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


def _words_of_values(part: _Part, i: int, field: Digits, codes: Expr, at: Sequence[Expr], thread: Expr) -> None:
    """A word is of one element."""
    groups, count, _ = packed_words(part.size, BLOCK, field)
    with _strided(groups * count * LANES, thread) as index:
        lane, w, group = index % LANES, index // LANES % count, index // (LANES * count)

        def term(t: int) -> Expr:
            byte = codes[(i * BLOCK + w * field.terms + t) * part.row + group * LANES + lane]
            return T.shift_left(T.Cast("uint32", byte), T.uint32(8 * (t % 4) + field.bits * (t // 4)))

        word = reduce(T.bitwise_or, [term(t) for t in range(field.terms)])
        T.buffer_store(part.words[i], word, [*at, group, w, lane])
