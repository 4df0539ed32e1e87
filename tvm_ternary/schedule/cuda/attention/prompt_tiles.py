"""How blocks of keys and values come to shared memory: copied as they are, or decoded from ternary planes.

Packed ones are copied as they are, too, one block ahead, and then made floats of 16 bits by all threads: digits become
a whole number in the lowest bits of a float, exactly, and are multiplied by their scale, which was rounded to 16 bits.
So an element is off by two roundings. The other way, scales multiplied into queries, rounds a query once for each block
instead of once for all; it was not taken because a warp's 16 queries are twice as many elements as its share of a
block's keys.

A thread has four rows at a time and eight terms, which have eight scales in common. Of 128 elements and two planes that
is 115 instructions of a warp for a block, copies included, beside 500 for what it does with it (sm_90's machine code).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own
from tvm_ternary.schedule.cuda.attention.prompt_plan import KEYS, PAIRS, WORD_ROW, Matrix, Prompt
from tvm_ternary.schedule.cuda.attention.warp import local
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import unrolled, when

Expr = Any


class Tile:
    """A thread block's place for a block of keys, or of values.

    Parameters
    ----------
    prompt : Prompt
    matrix : Matrix
        Which.
    buffers : dict of str to Buffer
    shared : Buffer
    where : (Expr, Expr, Expr)
        Sequence, head of keys, thread.
    packed : Expr
        How many of its blocks are packed.
    """

    def __init__(
        self,
        prompt: Prompt,
        matrix: Matrix,
        buffers: dict[str, Expr],
        shared: Expr,
        where: tuple[Expr, Expr, Expr],
        packed: Expr,
    ) -> None:
        self._floats = prompt.float_blocks(matrix) > 0
        self._matrix, self._kind, self._threads = matrix, prompt.kind, 32 * prompt.warps
        self._b, self._shared, self._packed = buffers, shared, packed
        self._batch, self._kv, self._thread = where

    def stage(self, block: Expr, end: Expr, turn: Expr) -> None:
        """Begin to copy a block's words and scales, for a turn, if it is a packed one before the end."""
        matrix = self._matrix
        if not matrix.planes:
            return
        place = matrix.packed_at + turn % 2 * matrix.packed_bytes
        with T.If(block < T.min(self._packed, end)), T.Then():
            for number, field in enumerate(matrix.fields):
                words, to = matrix.words(field), place + matrix.words_at(number)
                with self._shared_out(matrix.groups * words * 4) as index:
                    row, quarter = index // 4, index % 4
                    name = f"{matrix.name}_words{number}"
                    source = at(self._b[name], self._batch, self._kv, block, row // words, row % words, 4 * quarter)
                    self._copy(to + row * WORD_ROW + quarter * 16, source, 16)
            terms = matrix.size if matrix.is_key else KEYS
            to = place + matrix.words_at(len(matrix.fields))
            with self._shared_out(matrix.terms // 4) as piece:
                first = T.min(piece * 4, terms - 4)
                source = at(self._b[f"{matrix.name}_scale"], self._batch, self._kv, block, first)
                # What a word has behind the end stands for less than nothing.
                self._copy(to + piece * 16, source, T.Select(piece * 4 < terms, 16, 0))

    def fill(self, block: Expr, end: Expr, turn: Expr) -> None:
        """Decode a block before the end, which was staged for that turn, or begin to copy it."""
        with T.If(block < end), T.Then():
            if not self._matrix.planes:
                self._copy_floats(block)
            elif not self._floats:
                self._decode(turn)
            else:
                with T.If(block < self._packed):
                    with T.Then():
                        self._decode(turn)
                    with T.Else():
                        self._copy_floats(block - self._packed)

    def _shared_out(self, count: int) -> AbstractContextManager[Expr]:
        return shared_out(count, self._threads, self._thread)

    def _copy(self, to: Expr, source: Expr, size: Expr) -> None:
        T.evaluate(device.copy_rows(16)(self._shared.data, to, source, size))

    def _copy_floats(self, block: Expr) -> None:
        """Begin to copy a block of those that were rounded before."""
        matrix = self._matrix
        with self._shared_out(matrix.rows * matrix.pieces) as index:
            row, piece = index // matrix.pieces, index % matrix.pieces
            place = [block * KEYS + row, piece * 4] if matrix.is_key else [row, block * (KEYS // 2) + piece * 4]
            source = at(self._b[f"{matrix.name}s"], self._batch, self._kv, *place)
            self._copy(matrix.start + row * matrix.row + piece * 16, source, 16)

    def _decode(self, turn: Expr) -> None:
        matrix, pack = self._matrix, self._kind.pack
        place = matrix.packed_at + turn % 2 * matrix.packed_bytes
        scale, scales = local(8), local(4, "uint32")
        words = [local(4, "uint32") for _ in matrix.fields]
        made = local(4, "uint32")
        with self._shared_out(matrix.rows // 4 * matrix.pieces) as index:
            quad, piece = index // matrix.pieces, index % matrix.pieces
            scales_at = place + matrix.words_at(len(matrix.fields)) + piece * 32
            for half in range(2):
                T.evaluate(device.load_shared_floats(at(scale, 4 * half), self._shared.data, scales_at + 16 * half))
            for n, (first, second) in enumerate(PAIRS):
                T.buffer_store(scales, pack(scale[first], scale[second]), [n])
            for number, field in enumerate(matrix.fields):
                count, of_word = matrix.words(field), field.terms // 8
                word = T.min(piece // of_word, count - 1)
                row = quad // 4 * count + word
                source = place + matrix.words_at(number) + row * WORD_ROW + quad % 4 * 16
                T.evaluate(device.load_shared(at(words[number], 0), self._shared.data, source))
            # The digits of one plane that are wanted begin at bit 0 or 4.
            shift = T.Cast("uint32", piece % 2 * 4)
            for i in range(4):
                row_words = [
                    word[i] if field.bits == 4 else T.shift_right(word[i], shift)
                    for word, field in zip(words, matrix.fields, strict=True)
                ]
                T.evaluate(own.decode_eight(matrix.planes, self._kind.half)(at(made, 0), at(scales, 0), *row_words))
                to = matrix.start + (quad * 4 + i) * matrix.row + piece * 16
                T.evaluate(own.put_words(self._shared.data, to, *(made[n] for n in range(4))))


@contextmanager
def shared_out(count: int, threads: int, thread: Expr) -> Iterator[Expr]:
    """So many things, dealt out to threads."""
    with unrolled(ceil_div(count, threads)) as i:
        index = i * threads + thread
        with when(True if count % threads == 0 else index < count):
            yield index
