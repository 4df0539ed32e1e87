"""What is made of keys and values before attention over them: 16 bits, values transposed; packed blocks of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cuda.attention.pack import THREADS, Part, clear_behind, numbers_of_keys, words_of_keys
from tvm_ternary.schedule.cuda.attention.plan import at_once, placed
from tvm_ternary.schedule.cuda.attention.prompt_keys import Keys, Whole
from tvm_ternary.schedule.cuda.attention.prompt_plan import KEYS, PAIRS, Prompt
from tvm_ternary.schedule.cuda.attention.warp import const, local

Expr = Any


def pack_blocks(prompt: Prompt, source: Whole) -> None:
    """Fill the words and scales of the keys that are to be packed; `append` does the same behind a cache."""
    shape, b = prompt.shape, source.b
    words = [b[f"key_words{n}"] for n in range(len(prompt.key.fields))]
    part = Part(0, b["k"], b["k"], b["key_scale"], words, shape.key, shape.key, shape.size, source.planes[0])
    launch = T.launch_thread
    if source.packed == 0:
        return
    with (
        launch("blockIdx.x", source.packed) as block,
        launch("blockIdx.y", shape.kv_heads) as kv,
        launch("blockIdx.z", prompt.batch) as batch,
        launch("threadIdx.x", THREADS) as thread,
        at_once(8),
    ):
        numbers, where = T.alloc_buffer((part.shared_bytes,), "uint8", scope="shared.dyn"), [batch, kv, block]

        def read(token: Expr, d: Expr, to: Expr) -> None:
            T.buffer_store(to, b["k"][tuple(placed(shape.key, batch, kv, block * BLOCK + token, d))], [0])

        clear_behind(part, numbers, thread)
        numbers_of_keys(part, numbers, where, thread, read)
        T.evaluate(T.tvm_storage_sync("shared"))
        for n, field in enumerate(part.fields):
            words_of_keys(part, n, field, numbers, where, thread)


def round_keys_and_values(prompt: Prompt, source: Keys) -> None:
    """Fill ``keys`` and ``values``; zeros behind the ends. A thread makes 16 bytes.

    Eight neighbours in a sum are in the order of `PAIRS`.
    """
    shape, b, pieces, columns = prompt.shape, source.b, prompt.key.pieces, prompt.value.rows
    tokens = [KEYS * prompt.float_blocks(matrix) for matrix in (prompt.key, prompt.value)]
    of_keys, of_values = tokens[0] * pieces, columns * (tokens[1] // 8)
    launch = T.launch_thread
    with (
        launch("blockIdx.x", ceil_div(of_keys + of_values, THREADS)) as x,
        launch("blockIdx.y", shape.kv_heads) as kv,
        launch("blockIdx.z", prompt.batch) as batch,
        launch("threadIdx.x", THREADS) as thread,
    ):
        index, eight, words = x * THREADS + thread, local(8), local(4, "uint32")

        def made(name: str, of: Callable[[int], tuple[Expr, Expr]], place: list[Expr], piece: Expr) -> None:
            for i in range(8):
                token, d = of(i)
                size = shape.size if name == "k" else shape.value_size
                there, value = source.read(name, batch, kv, token, d)
                # Not a select, whose both sides would be read.
                T.buffer_store(eight, const(0.0), [i])
                with T.If(T.And(there, d < size)), T.Then():
                    T.buffer_store(eight, value(), [i])
            for i, (first, second) in enumerate(PAIRS):
                T.buffer_store(words, prompt.kind.pack(eight[first], eight[second]), [i])
            # Not by an address, of which TVM would see but the first word, and make the buffer smaller.
            to = b["keys" if name == "k" else "values"]
            T.buffer_store(to, words[T.Ramp(0, 1, 4)], [*place, T.Ramp(piece * 4, 1, 4)])

        def of_key() -> None:
            token, piece = index // pieces, index % pieces
            made("k", lambda i: (token, piece * 8 + i), [batch, kv, token], piece)

        def of_value() -> None:
            # Elements are neighbours, so that what is read is.
            rest = index - of_keys
            d, piece = rest % columns, rest // columns
            with T.If(rest < of_values), T.Then():
                made("v", lambda i: (piece * 8 + i, d), [batch, kv, d], piece)

        if of_keys == 0:
            of_value()
        else:
            with T.If(index < of_keys):
                with T.Then():
                    of_key()
                with T.Else():
                    of_value()
