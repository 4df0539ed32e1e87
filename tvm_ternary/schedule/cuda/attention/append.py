"""Appending to a cache of ternary keys and values on a GPU, in place: what `schedule.cpu.attention.append` does.

The tokens of a sequence that are not packed yet are its tail, then the new ones: a token's number among them says where
it is read. So all blocks that become full are packed at once, a thread block each; then the tail takes what is behind
them, and at last the counts change. These are three kernels, since each reads what the next one changes. A tail moves
down by whole blocks, and a thread moves all tokens of one place in a block, the first ones first, so that none waits.

A sequence that is cut within a block has tokens before its tail that are read from there.

What a block becomes, `pack` says.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, packed_words
from tvm_ternary.schedule.cuda.attention.pack import (
    THREADS,
    Part,
    clear_behind,
    numbers_of_keys,
    numbers_of_values,
    words_of_keys,
    words_of_values,
)
from tvm_ternary.schedule.cuda.attention.plan import array, at_once, check_grid, check_sizes, placed
from tvm_ternary.schedule.cuda.attention.warp import local
from tvm_ternary.schedule.cuda.matmul import SCHEDULED, any_rows, root_block

Expr = Any
Head = tuple[Expr, Expr]
"""A sequence, and a head of keys."""


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
    check_grid(shape.kv_heads, 2 * batch)
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
            Part(n, fresh[n], tails[n], scales[n], words[n], new[n], layouts[n], sizes[n], planes[n]) for n in range(2)
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

    def _read(self, part: Part, state: _State, head: Head, token: Expr, d: Expr, to: Expr) -> None:
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

    def _move(self, part: Part, state: _State, head: Head, index: Expr) -> None:
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
            (numbers_of_keys, numbers_of_values),
            (words_of_keys, words_of_values),
            strict=True,
        ):
            with T.If(T.And(n < state.count, z % 2 == part.operand)), T.Then():
                at = [z // 2, kv, state.first + n]

                def read(token: Expr, d: Expr, to: Expr, part: Part = part) -> None:
                    self._read(part, state, (z // 2, kv), n * BLOCK + token, d, to)

                clear_behind(part, codes, thread)
                numbers(part, codes, at, thread, read)
                T.evaluate(T.tvm_storage_sync("shared"))
                for i, field in enumerate(part.fields):
                    words(part, i, field, codes, at, thread)
