"""Attention of many queries in float on a GPU: tensor cores on 16 bits, scores that never leave a warp's registers.

A first kernel rounds keys and values once, values with tokens for neighbours. Then a thread block has 64 queries of a
head, or 128, sixteen a warp, and goes through the keys, 64 at a time. Those are copied asynchronously to shared memory,
the next keys while values are multiplied, and the reverse; blocks behind the last key that any of its queries sees are
not touched.

Which terms of a sum stand where in a tensor core's registers does not matter if both operands agree. So thread ``lane =
4 g + t`` has eight neighbouring elements of a query and of a key, which is one load of 16 bytes for two products, and
keys are dealt out to the columns so that its weights of four products are those of eight neighbouring tokens: they
become the left operand of the product with values as they are.

What limits it: a product of 16 x 8 x 16 takes 256 bytes of shared memory, two cycles of a multiprocessor, and three to
four of its tensor cores by the instruction that all architectures have (sm_90's own, wgmma, would need half as many).

References
----------
Dao, "FlashAttention-2", 2023: queries shared out among warps, keys in the inner loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.plan import array, check_sizes, placed
from tvm_ternary.schedule.cuda.attention.warp import NOTHING, OVER_T, add, const, fold, local
from tvm_ternary.schedule.cuda.matmul import SCHEDULED, root_block
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any

KEYS = 64
"""Of a block."""
ROWS = 16
"""Queries of a warp."""
SPARE = 64
"""Bytes between rows in shared memory: those that a warp reads at once lie in different banks."""
THREADS = 128
"""Of the kernel that rounds."""
_KINDS = {
    "float16": (own.pack_float16, device.mma_float16),
    "bfloat16": (own.pack_bfloat16, device.mma_bfloat16),
}


@dataclass(frozen=True)
class Prompt:
    """What is known when it is compiled.

    Parameters
    ----------
    shape : Attention
    batch, queries, keys : int
    causal : bool
    kind : str
    """

    shape: Attention
    batch: int
    queries: int
    keys: int
    causal: bool
    kind: str

    @property
    def warps(self) -> int:
        return 4 if self.queries <= 4 * ROWS else 8

    @property
    def rows(self) -> int:
        return ROWS * self.warps

    @property
    def blocks(self) -> int:
        return ceil_div(self.keys, KEYS)

    @property
    def steps(self) -> int:
        """Of a product with a key, 32 elements each."""
        return ceil_div(self.shape.size, 32)

    @property
    def columns(self) -> int:
        """Products of values, eight elements each."""
        return ceil_div(self.shape.value_size, 8)

    @property
    def key_row(self) -> int:
        """Bytes of a key in shared memory; 64 more than a multiple of 128."""
        return 64 * self.steps + (SPARE if self.steps % 2 == 0 else 2 * SPARE)

    @property
    def value_row(self) -> int:
        """Bytes of an element's values of a block."""
        return 2 * KEYS + SPARE

    @property
    def values_at(self) -> int:
        return KEYS * self.key_row

    @property
    def shared_bytes(self) -> int:
        return self.values_at + 8 * self.columns * self.value_row


def attention_prompt(
    shape: Attention, lengths: tuple[int, int, int], *, causal: bool = False, kind: str = "bfloat16"
) -> tirx.PrimFunc:
    """The scheduled function ``(q, k, v[, mask], out)``, all float32.

    Parameters
    ----------
    shape : Attention
        Layouts end in ``d``; not `Attention.joined`.
    lengths : tuple of int
        Batch, queries and keys.
    causal : bool
        The queries are those of the last keys, and see none behind their own.
    kind : str
        ``bfloat16`` or ``float16``: what queries, keys, values and weights are rounded to. Sums are float32. What is
        above 65,504 becomes infinite in the latter.

    Raises
    ------
    ValueError
        If there is no such kind, sizes are no multiples of four, or elements of a head are not neighbours.
    """
    check_sizes(shape)
    if kind not in _KINDS:
        raise ValueError(f"attention in {kind}; on a GPU expected one of {', '.join(_KINDS)}")
    if shape.joined:
        raise ValueError("keys in two parts; on a GPU they are one array")
    batch, queries, keys = lengths
    prompt = Prompt(shape, batch, queries, keys, causal, kind)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_prompt")
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1})

        def laid(name: str, layout: str, heads: int, length: int, size: int) -> Expr:
            extents = {"b": batch, "h": heads, "l": length, "d": size}
            return array(name, [extents[axis] for axis in layout])

        b = {
            "q": laid("q", shape.query, shape.heads, queries, shape.size),
            "k": laid("k", shape.key, shape.kv_heads, keys, shape.size),
            "v": laid("v", shape.value, shape.kv_heads, keys, shape.value_size),
        }
        if shape.mask:
            extents = {"b": batch, "h": shape.heads, "m": queries, "s": keys}
            b["mask"] = array("mask", [extents[axis] if axis in shape.mask else 1 for axis in "bhms"])
        b["out"] = laid("out", shape.out, shape.heads, queries, shape.value_size)
        with root_block():
            # Two numbers of 16 bits each.
            outer = (batch, shape.kv_heads)
            b["keys"] = T.alloc_buffer((*outer, KEYS * prompt.blocks, 16 * prompt.steps), "uint32")
            b["values"] = T.alloc_buffer((*outer, 8 * prompt.columns, KEYS // 2 * prompt.blocks), "uint32")
            _round(prompt, b)
            _attend(prompt, b)
    return builder.get()


# --- rounding ---------------------------------------------------------------------------------------------------------


def _round(prompt: Prompt, b: dict[str, Expr]) -> None:
    """Keys as they lie and values transposed; zeros behind the ends. A thread makes 16 bytes."""
    shape, tokens = prompt.shape, KEYS * prompt.blocks
    of_keys, of_values = tokens * prompt.steps * 4, 8 * prompt.columns * (tokens // 8)
    launch = T.launch_thread
    with (
        launch("blockIdx.x", ceil_div(of_keys + of_values, THREADS)) as x,
        launch("blockIdx.y", shape.kv_heads) as kv,
        launch("blockIdx.z", prompt.batch) as batch,
        launch("threadIdx.x", THREADS) as thread,
    ):
        index, eight, words = x * THREADS + thread, local(8), local(4, "uint32")

        def made(read: Callable[[int], tuple[Expr, Expr]], to: Expr, place: list[Expr], piece: Expr) -> None:
            for i in range(8):
                there, value = read(i)
                # Not a select, whose both sides would be read.
                T.buffer_store(eight, const(0.0), [i])
                with T.If(there), T.Then():
                    T.buffer_store(eight, value, [i])
            for i in range(4):
                T.buffer_store(words, _KINDS[prompt.kind][0](eight[2 * i], eight[2 * i + 1]), [i])
            # Not by an address, of which TVM would see but the first word, and make the buffer smaller.
            T.buffer_store(to, words[T.Ramp(0, 1, 4)], [*place, T.Ramp(piece * 4, 1, 4)])

        def key(token: Expr, d: Expr) -> tuple[Expr, Expr]:
            value = b["k"][tuple(placed(shape.key, batch, kv, token, d))]
            return T.And(token < prompt.keys, d < shape.size), value

        def value(token: Expr, d: Expr) -> tuple[Expr, Expr]:
            value = b["v"][tuple(placed(shape.value, batch, kv, token, d))]
            return T.And(token < prompt.keys, d < shape.value_size), value

        with T.If(index < of_keys):
            with T.Then():
                token, piece = index // (prompt.steps * 4), index % (prompt.steps * 4)
                made(lambda i: key(token, piece * 8 + i), b["keys"], [batch, kv, token], piece)
            with T.Else(), T.If(index < of_keys + of_values), T.Then():
                # Elements are neighbours, so that what is read is.
                rest = index - of_keys
                d, piece = rest % (8 * prompt.columns), rest // (8 * prompt.columns)
                made(lambda i: value(piece * 8 + i, d), b["values"], [batch, kv, d], piece)


# --- attention --------------------------------------------------------------------------------------------------------


def _attend(prompt: Prompt, b: dict[str, Expr]) -> None:
    launch = T.launch_thread
    with (
        launch("blockIdx.x", ceil_div(prompt.queries, prompt.rows)) as x,
        launch("blockIdx.y", prompt.shape.heads) as y,
        launch("blockIdx.z", prompt.batch) as z,
        launch("threadIdx.x", 32 * prompt.warps) as thread,
    ):
        _Rows(prompt, b, (x, y, z), thread).write()


class _Rows:
    """What a thread block makes of its queries.

    A thread has of its rows g and g + 8: scores of a block's keys ``32 n + 8 t + 2 j + c`` at ``16 n + 4 j + c``,
    those of row g + 8 two places behind, and results of elements ``8 n + 2 t + c`` at ``4 n + c``.
    """

    def __init__(self, prompt: Prompt, b: dict[str, Expr], block: tuple[Expr, Expr, Expr], thread: Expr) -> None:
        self.prompt, self.shape, self.b = prompt, prompt.shape, b
        x, self.head, self.batch = block
        self.kv, self.thread = self.head // self.shape.group, thread
        self.g, self.t = thread % 32 // 4, thread % 4
        self.first = x * prompt.rows
        self.row = self.first + thread // 32 * ROWS + self.g
        self.shared = T.alloc_buffer((prompt.shared_bytes,), "uint8", scope="shared.dyn")
        self.q = local(8 * prompt.steps, "uint32")
        self.o, self.m, self.l = local(4 * prompt.columns), local(2), local(2)
        self.scores, self.fade = local(KEYS // 2), local(2)

    def write(self) -> None:
        """All keys."""
        prompt = self.prompt
        blocks = prompt.blocks
        if prompt.causal:
            last = T.min(self.first + prompt.rows, prompt.queries) + (prompt.keys - prompt.queries)
            blocks = T.max(last + (KEYS - 1), 0) // KEYS
        with T.If(blocks > 0), T.Then():
            self._copy_keys(0)
        T.evaluate(device.commit_copies())
        with T.If(blocks > 0), T.Then():
            self._copy_values(0)
        T.evaluate(device.commit_copies())
        self._fetch_queries()
        with unrolled(4 * prompt.columns) as i:
            T.buffer_store(self.o, const(0.0), [i])
        for half in range(2):
            T.buffer_store(self.m, const(NOTHING), [half])
            T.buffer_store(self.l, const(0.0), [half])
        with T.serial(0, blocks) as i:
            self._block(i, i + 1 < blocks)
        T.evaluate(device.wait_copies(0)())
        self._store()

    def _fetch_queries(self) -> None:
        """Of thread (g, t) eight neighbouring elements of both rows for each step; zeros behind the ends."""
        prompt, pack = self.prompt, _KINDS[self.prompt.kind][0]
        four = local(4)
        with unrolled(prompt.steps) as s, unrolled(2) as half, unrolled(2) as quad:
            row, d = self.row + 8 * half, 32 * s + 8 * self.t + 4 * quad
            for i in range(4):
                T.buffer_store(four, const(0.0), [i])
            with T.If(T.And(row < prompt.queries, d < self.shape.size)), T.Then():
                source = placed(self.shape.query, self.batch, self.head, row, d)
                T.evaluate(device.load_floats(at(four, 0), at(self.b["q"], *source)))
            for i in range(2):
                word = pack(four[2 * i], four[2 * i + 1])
                T.buffer_store(self.q, word, [(s * 2 + quad) * 4 + 2 * i + half])

    def _copy(self, rows: int, pieces: int, source: Callable[[Expr, Expr], Expr], to: Callable[[Expr], Expr]) -> None:
        """Begin to copy so many rows of pieces of 16 bytes."""
        threads = 32 * self.prompt.warps
        with unrolled(ceil_div(rows * pieces, threads)) as i:
            index = i * threads + self.thread
            with T.If(index < rows * pieces), T.Then():
                row, piece = index // pieces, index % pieces
                place = to(row) + piece * 16
                T.evaluate(device.copy_rows(16)(self.shared.data, place, source(row, piece * 4), 16))

    def _copy_keys(self, block: Expr) -> None:
        def source(row: Expr, word: Expr) -> Expr:
            return at(self.b["keys"], self.batch, self.kv, block * KEYS + row, word)

        self._copy(KEYS, 4 * self.prompt.steps, source, lambda row: row * self.prompt.key_row)

    def _copy_values(self, block: Expr) -> None:
        def source(row: Expr, word: Expr) -> Expr:
            return at(self.b["values"], self.batch, self.kv, row, block * (KEYS // 2) + word)

        prompt = self.prompt
        self._copy(8 * prompt.columns, KEYS // 8, source, lambda row: prompt.values_at + row * prompt.value_row)

    def _block(self, block: Expr, more: Expr) -> None:
        self._arrived()
        self._multiply_keys()
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(more), T.Then():
            self._copy_keys(block + 1)
        T.evaluate(device.commit_copies())
        self._mask(block)
        self._softmax()
        self._arrived()
        self._multiply_values()
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(more), T.Then():
            self._copy_values(block + 1)
        T.evaluate(device.commit_copies())

    @staticmethod
    def _arrived() -> None:
        """Wait for the older one of two groups of copies, of all threads."""
        T.evaluate(device.wait_copies(1)())
        T.evaluate(T.tvm_storage_sync("shared"))

    def _multiply_keys(self) -> None:
        prompt, multiply = self.prompt, _KINDS[self.prompt.kind][1]
        words = local(4, "uint32")
        with unrolled(KEYS // 2) as i:
            T.buffer_store(self.scores, const(0.0), [i])
        with unrolled(prompt.steps) as s, unrolled(KEYS // 32) as n, unrolled(4) as j:
            key = 32 * n + self.g // 2 * 8 + 2 * j + self.g % 2
            place = key * prompt.key_row + (s * 4 + self.t) * 16
            T.evaluate(device.load_shared(at(words, 0), self.shared.data, place))
            for half in range(2):
                left = [self.q[(s * 2 + half) * 4 + i] for i in range(4)]
                T.evaluate(multiply(at(self.scores, 4 * (4 * n + j)), *left, words[2 * half], words[2 * half + 1]))

    def _mask(self, block: Expr) -> None:
        """Scores in powers of two; minus infinity where a row must not look, or there is no key."""
        prompt, scale = self.prompt, self.shape.scale * math.log2(math.e)
        visible = local(2, "int32")
        for half in range(2):
            limit: Expr = prompt.keys
            if prompt.causal:
                limit = T.min(self.row + (8 * half + 1 + prompt.keys - prompt.queries), prompt.keys)
            T.buffer_store(visible, limit - block * KEYS, [half])
        with unrolled(KEYS // 32) as n, unrolled(4) as j, unrolled(4) as c:
            key, half = 32 * n + 8 * self.t + 2 * j + c % 2, c // 2
            place = 4 * (4 * n + j) + c
            T.buffer_store(self.scores, self.scores[place] * const(scale), [place])
            if self.shape.mask:
                row = self.row + 8 * half
                with T.If(T.And(row < prompt.queries, block * KEYS + key < prompt.keys)), T.Then():
                    added = self._mask_at(row, block * KEYS + key) * const(math.log2(math.e))
                    T.buffer_store(self.scores, self.scores[place] + added, [place])
            with T.If(key >= visible[half]), T.Then():
                T.buffer_store(self.scores, const(NOTHING), [place])

    def _mask_at(self, row: Expr, key: Expr) -> Expr:
        where = {"b": self.batch, "h": self.head, "m": row, "s": key}
        return self.b["mask"][tuple(where[axis] if axis in self.shape.mask else 0 for axis in "bhms")]

    def _softmax(self) -> None:
        best, safe = local(2), local(2)
        for half in range(2):
            T.buffer_store(best, const(NOTHING), [half])
        with unrolled(KEYS // 8) as n, unrolled(4) as c:
            T.buffer_store(best, T.max(best[c // 2], self.scores[4 * n + c]), [c // 2])
        for half in range(2):
            fold(best, half, OVER_T, T.max)
            T.buffer_store(best, T.max(best[half], self.m[half]), [half])
            # Where there is nothing yet all differences are to be minus infinity.
            T.buffer_store(safe, T.Select(best[half] > const(NOTHING), best[half], const(0.0)), [half])
            T.buffer_store(self.fade, own.exp2(self.m[half] - safe[half]), [half])
            T.buffer_store(self.m, best[half], [half])
            T.buffer_store(self.l, self.l[half] * self.fade[half], [half])
        with unrolled(KEYS // 8) as n, unrolled(4) as c:
            place = 4 * n + c
            T.buffer_store(self.scores, own.exp2(self.scores[place] - safe[c // 2]), [place])
            T.buffer_store(self.l, self.l[c // 2] + self.scores[place], [c // 2])
        with unrolled(self.prompt.columns) as n, unrolled(4) as c:
            T.buffer_store(self.o, self.o[4 * n + c] * self.fade[c // 2], [4 * n + c])

    def _multiply_values(self) -> None:
        prompt, (pack, multiply) = self.prompt, _KINDS[self.prompt.kind]
        left, words = local(8, "uint32"), local(4, "uint32")
        with unrolled(KEYS // 32) as n:
            with unrolled(4) as j, unrolled(2) as half:
                start = 4 * (4 * n + j) + 2 * half
                T.buffer_store(left, pack(self.scores[start], self.scores[start + 1]), [2 * j + half])
            with unrolled(prompt.columns) as column:
                place = prompt.values_at + (8 * column + self.g) * prompt.value_row + (4 * n + self.t) * 16
                T.evaluate(device.load_shared(at(words, 0), self.shared.data, place))
                for step in range(2):
                    four = [left[4 * step + i] for i in range(4)]
                    T.evaluate(multiply(at(self.o, 4 * column), *four, words[2 * step], words[2 * step + 1]))

    def _store(self) -> None:
        prompt, inverse = self.prompt, local(2)
        for half in range(2):
            fold(self.l, half, OVER_T, add)
            # Of no keys nothing; what is not a number stays so.
            value = T.Select(self.l[half] == const(0.0), const(0.0), const(1.0) / self.l[half])
            T.buffer_store(inverse, value, [half])
        with unrolled(2) as half:
            row = self.row + 8 * half
            with T.If(row < prompt.queries), T.Then(), unrolled(prompt.columns) as n:
                d = 8 * n + 2 * self.t
                with T.If(d < self.shape.value_size), T.Then():
                    two = [self.o[4 * n + 2 * half + c] * inverse[half] for c in range(2)]
                    to = placed(self.shape.out, self.batch, self.head, row, d)
                    T.evaluate(own.store_two(at(self.b["out"], *to), *two))
