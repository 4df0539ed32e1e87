"""Attention of many queries on a GPU: tensor cores on 16 bits, scores that never leave a warp's registers.

A first kernel rounds keys and values once, values with tokens for neighbours. Then a thread block has 64 queries of a
head, or 128, sixteen a warp, and goes through the keys, 64 at a time. Those are copied asynchronously to shared memory,
the next keys while values are multiplied, and the reverse; blocks behind the last key that any of its queries sees are
not touched. Blocks that are ternary planes are decoded there (`prompt_tiles`).

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
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.plan import array, at_once, check_sizes, placed
from tvm_ternary.schedule.cuda.attention.prompt_keys import Cached, Keys, Whole
from tvm_ternary.schedule.cuda.attention.prompt_plan import KEYS, KINDS, LARGEST, PAIRS, ROWS, Prompt
from tvm_ternary.schedule.cuda.attention.prompt_round import round_keys_and_values
from tvm_ternary.schedule.cuda.attention.prompt_tiles import Tile
from tvm_ternary.schedule.cuda.attention.warp import NOTHING, OVER_T, add, const, fold, local
from tvm_ternary.schedule.cuda.matmul import SCHEDULED, root_block
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import unrolled

Expr = Any
LOG2E = math.log2(math.e)


def attention_prompt(
    shape: Attention,
    lengths: tuple[int, int, int],
    *,
    causal: bool = False,
    kind: str = "bfloat16",
    planes: int = 0,
    window: int = 0,
) -> tirx.PrimFunc:
    """The scheduled function ``(q[, key words ..., key_scale], k, v[, mask], out)``, floats in float32.

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
    planes : int
        Of keys in packed blocks, as `schedule.cpu.attention.rounded.pack_keys` gives them. Each number is multiplied by
        its scale, scale and product rounded to ``kind``. 0: there are no such parameters.
    window : int
        Last keys that are read from ``k``, with those before them that fill no block of 64.

    Raises
    ------
    ValueError
        If there is no such kind, sizes are no multiples of four or above 128, or elements of a head are not neighbours.
    """
    batch, queries, keys = lengths
    source = Whole(shape, batch, keys, (planes, 0), max(keys - window, 0) // BLOCK if planes else 0)
    return _function("attention_prompt", source, queries, causal, kind)


def attention_prompt_cached(
    shape: Attention,
    planes: tuple[int, int],
    lengths: tuple[int, int, int, int],
    *,
    causal: bool = True,
    kind: str = "bfloat16",
    new: tuple[str, str] = ("blhd", "blhd"),
) -> tirx.PrimFunc:
    """The scheduled function of a prompt behind a cache, before it is appended.

    Its parameters: ``(q, key words ..., key_scale, value words ..., value_scale, tail k, tail v, new k, new v, full,
    recent[, mask], out)``.

    Parameters
    ----------
    shape : Attention
        ``key`` and ``value`` are the layouts of the tail. A mask's axis of keys is the number of a token in its
        sequence, and is as long as all that there may be.
    planes : tuple of int
        Of keys and of values. Both are numbers times scales, scales and products rounded to ``kind``.
    lengths : tuple of int
        Batch, queries, which are as many as new tokens, most blocks, and the tail's room.
    causal : bool
        A query sees the cache, and the new tokens up to its own; otherwise all.
    kind : str
    new : tuple of str
        Layouts of the new keys and values, which end in ``d``.

    Raises
    ------
    ValueError
        As of `attention_prompt`.
    """
    batch, queries, blocks, room = lengths
    source = Cached(shape, batch, queries, blocks, room, planes, new)
    return _function("attention_prompt_cached", source, queries, causal, kind)


def _function(name: str, source: Keys, queries: int, causal: bool, kind: str) -> tirx.PrimFunc:
    shape, b = source.shape, source.b
    check_sizes(shape)
    if max(shape.size, shape.value_size) > LARGEST:
        largest = max(shape.size, shape.value_size)
        raise ValueError(f"a head of {largest} elements; for many queries on a GPU expected {LARGEST} at most")
    if kind not in KINDS:
        raise ValueError(f"attention in {kind}; on a GPU expected one of {', '.join(KINDS)}")
    if shape.joined:
        raise ValueError("keys in two parts; on a GPU they are one array")
    prompt = Prompt(shape, source.batch, queries, causal, KINDS[kind], source.planes, source.floats)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1})

        def laid(name: str, layout: str, size: int) -> Expr:
            extents = {"b": source.batch, "h": shape.heads, "l": queries, "d": size}
            return array(name, [extents[axis] for axis in layout])

        b["q"] = laid("q", shape.query, shape.size)
        source.declare()
        if shape.mask:
            extents = {"b": source.batch, "h": shape.heads, "m": queries, "s": source.most}
            b["mask"] = array("mask", [extents[axis] if axis in shape.mask else 1 for axis in "bhms"])
        b["out"] = laid("out", shape.out, shape.value_size)
        with root_block():
            outer = source.batch, shape.kv_heads
            for matrix in (prompt.key, prompt.value):
                tokens, terms = KEYS * prompt.float_blocks(matrix), matrix.terms
                extents = (tokens, terms // 2) if matrix.is_key else (matrix.rows, tokens // 2)
                if tokens:
                    # Two numbers of 16 bits each.
                    b[f"{matrix.name}s"] = T.alloc_buffer((*outer, *extents), "uint32")
            round_keys_and_values(prompt, source, b)
            _attend(prompt, source)
    return builder.get()


def _attend(prompt: Prompt, source: Keys) -> None:
    launch = T.launch_thread
    with (
        launch("blockIdx.x", ceil_div(prompt.queries, prompt.rows)) as x,
        launch("blockIdx.y", prompt.shape.heads) as y,
        launch("blockIdx.z", prompt.batch) as z,
        launch("threadIdx.x", 32 * prompt.warps) as thread,
        at_once(1),
    ):
        _Rows(prompt, source, (x, y, z), thread).write()


class _Rows:
    """What a thread block makes of its queries.

    A thread has of its rows g and g + 8: scores of a block's keys ``32 n + 8 t + 2 j + c`` at ``16 n + 4 j + c``,
    those of row g + 8 two places behind, and results of elements ``8 n + 2 t + c`` at ``4 n + c``.
    """

    def __init__(self, prompt: Prompt, source: Keys, block: tuple[Expr, Expr, Expr], thread: Expr) -> None:
        self.prompt, self.shape, self.b = prompt, prompt.shape, source.b
        x, self.head, self.batch = block
        self.kv = self.head // self.shape.group
        self.g, self.t = thread % 32 // 4, thread % 4
        self.first = x * prompt.rows
        self.row = self.first + thread // 32 * ROWS + self.g
        self.total, packed = source.total(self.batch), source.packed_of(self.batch)
        self.shared = T.alloc_buffer((prompt.shared_bytes,), "uint8", scope="shared.dyn")
        self.q = local(8 * prompt.steps, "uint32")
        self.o, self.m, self.l = local(4 * prompt.columns), local(2), local(2)
        self.scores, self.fade = local(KEYS // 2), local(2)
        where = self.batch, self.kv, thread
        self.keys, self.values = (
            Tile(prompt, matrix, self.b, self.shared, where, packed) for matrix in (prompt.key, prompt.value)
        )

    def write(self) -> None:
        """All keys."""
        prompt = self.prompt
        blocks = self._blocks()
        if any(prompt.planes):
            for tile in (self.keys, self.values):
                tile.stage(0, blocks)
            T.evaluate(device.commit_copies())
            T.evaluate(device.wait_copies(0)())
            T.evaluate(T.tvm_storage_sync("shared"))
        for tile in (self.keys, self.values):
            self._prepare(tile, 0, blocks)
        self._fetch_queries()
        with unrolled(4 * prompt.columns) as i:
            T.buffer_store(self.o, const(0.0), [i])
        for half in range(2):
            T.buffer_store(self.m, const(NOTHING), [half])
            T.buffer_store(self.l, const(0.0), [half])
        with T.serial(0, blocks) as i:
            self._block(i, blocks)
        T.evaluate(device.wait_copies(0)())
        self._store()

    def _blocks(self) -> Expr:
        """That any of the queries sees."""
        last = self.total
        if self.prompt.causal:
            last = T.min(self.first + self.prompt.rows, self.prompt.queries) + (last - self.prompt.queries)
            last = T.max(last, 0)
        return (last + (KEYS - 1)) // KEYS

    @staticmethod
    def _prepare(tile: Tile, block: Expr, blocks: Expr) -> None:
        """Make a block before the end ready, or begin to; and the one behind it, if it is packed."""
        tile.fill(block, blocks)
        tile.stage(block + 1, blocks)
        T.evaluate(device.commit_copies())

    def _fetch_queries(self) -> None:
        """Of thread (g, t) eight neighbouring elements of both rows for each step; zeros behind the ends."""
        prompt, pack = self.prompt, self.prompt.kind.pack
        four = local(4)
        with unrolled(prompt.steps) as s, unrolled(2) as half, unrolled(2) as quad:
            row, d = self.row + 8 * half, 32 * s + 8 * self.t + 4 * quad
            for i in range(4):
                T.buffer_store(four, const(0.0), [i])
            with T.If(T.And(row < prompt.queries, d < self.shape.size)), T.Then():
                source = placed(self.shape.query, self.batch, self.head, row, d)
                T.evaluate(device.load_floats(at(four, 0), at(self.b["q"], *source)))
            for i in range(2):
                # As `PAIRS` says.
                word = pack(four[i], four[i + 2])
                T.buffer_store(self.q, word, [(s * 2 + quad) * 4 + 2 * i + half])

    def _block(self, block: Expr, blocks: Expr) -> None:
        self._arrived()
        self._multiply_keys()
        T.evaluate(T.tvm_storage_sync("shared"))
        self._prepare(self.keys, block + 1, blocks)
        self._mask(block)
        self._softmax()
        self._arrived()
        self._multiply_values()
        T.evaluate(T.tvm_storage_sync("shared"))
        self._prepare(self.values, block + 1, blocks)

    @staticmethod
    def _arrived() -> None:
        """Wait for the older one of two groups of copies, of all threads."""
        T.evaluate(device.wait_copies(1)())
        T.evaluate(T.tvm_storage_sync("shared"))

    def _multiply_keys(self) -> None:
        matrix, multiply = self.prompt.key, self.prompt.kind.multiply
        words = local(4, "uint32")
        with unrolled(KEYS // 2) as i:
            T.buffer_store(self.scores, const(0.0), [i])
        with unrolled(self.prompt.steps) as s, unrolled(KEYS // 32) as n, unrolled(4) as j:
            key = 32 * n + self.g // 2 * 8 + 2 * j + self.g % 2
            place = matrix.start + key * matrix.row + (s * 4 + self.t) * 16
            T.evaluate(device.load_shared(at(words, 0), self.shared.data, place))
            for half in range(2):
                left = [self.q[(s * 2 + half) * 4 + i] for i in range(4)]
                T.evaluate(multiply(at(self.scores, 4 * (4 * n + j)), *left, words[2 * half], words[2 * half + 1]))

    def _mask(self, block: Expr) -> None:
        """Scores in powers of two, or with a mask of e; minus infinity where a row must not look, or is no key."""
        prompt = self.prompt
        scale = self.shape.scale if self.shape.mask else self.shape.scale * LOG2E
        visible = local(2, "int32")
        for half in range(2):
            limit = self.total
            if prompt.causal:
                limit = T.min(self.row + (8 * half + 1 - prompt.queries) + limit, limit)
            T.buffer_store(visible, limit - block * KEYS, [half])
        with unrolled(KEYS // 32) as n, unrolled(4) as j, unrolled(4) as c:
            key, half = 32 * n + 8 * self.t + 2 * j + c % 2, c // 2
            place = 4 * (4 * n + j) + c
            score = self.scores[place] * const(scale)
            if self.shape.mask:
                # Added before anything else is done, so that what an importer's mask swallows is what its sum would.
                row = T.min(self.row + 8 * half, prompt.queries - 1)
                score = score + self._mask_at(row, T.min(block * KEYS + key, self.total - 1))
            T.buffer_store(self.scores, T.Select(key < visible[half], score, const(NOTHING)), [place])

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
            T.buffer_store(self.fade, self._power(self.m[half] - safe[half]), [half])
            T.buffer_store(self.m, best[half], [half])
            T.buffer_store(self.l, self.l[half] * self.fade[half], [half])
        with unrolled(KEYS // 8) as n, unrolled(4) as c:
            place = 4 * n + c
            T.buffer_store(self.scores, self._power(self.scores[place] - safe[c // 2]), [place])
            T.buffer_store(self.l, self.l[c // 2] + self.scores[place], [c // 2])
        with unrolled(self.prompt.columns) as n, unrolled(4) as c:
            T.buffer_store(self.o, self.o[4 * n + c] * self.fade[c // 2], [4 * n + c])

    def _power(self, score: Expr) -> Expr:
        return own.exp2(score * const(LOG2E) if self.shape.mask else score)

    def _multiply_values(self) -> None:
        matrix, kind = self.prompt.value, self.prompt.kind
        left, words = local(8, "uint32"), local(4, "uint32")
        with unrolled(KEYS // 32) as n:
            for i, pair in enumerate(PAIRS):
                for half in range(2):
                    two = [self.scores[4 * (4 * n + token // 2) + 2 * half + token % 2] for token in pair]
                    T.buffer_store(left, kind.pack(*two), [2 * i + half])
            with unrolled(self.prompt.columns) as column:
                place = matrix.start + (8 * column + self.g) * matrix.row + (4 * n + self.t) * 16
                T.evaluate(device.load_shared(at(words, 0), self.shared.data, place))
                for step in range(2):
                    four = [left[4 * step + i] for i in range(4)]
                    T.evaluate(kind.multiply(at(self.o, 4 * column), *four, words[2 * step], words[2 * step + 1]))

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
