"""Keys and values on their way into a cache: into the tail, from there into a block, and back.

A block is read twice: for the mean magnitudes, and with them for its numbers, a byte each, while what their scales are
fitted to is summed. Then the bytes are put together to words. A lane is an element of a head; only in the words of keys
it is a token, and there four bytes are moved as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, Select, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.ternary_keys import BLOCK, STEPS, Digits, digits
from tvm_ternary.schedule.cpu.attention.operands import ZERO, across, buffer, elements, place, zeros
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, strips, vector
from tvm_ternary.schedule.cpu.vector_math import ROUND, ROUND_BITS, isfinite

_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Part:
    """The keys or the values of a cache.

    Parameters
    ----------
    new, tail : Var
        Tokens in float, of layouts ``new_layout`` and ``layout``.
    new_layout, layout : str
    size : int
        Elements of a head.
    lanes : int
        Of a vector of float32.
    """

    new: Var
    tail: Var
    new_layout: str
    layout: str
    size: int
    lanes: int

    def take(self, head: Sequence[Expr], token: Expr, source: Expr) -> Stmt:
        """Put a new token into the tail."""
        return self._fill(head, token, lambda d: self.new[tuple(place(self.new_layout, head[0], head[1], source, d))])

    def move(self, head: Sequence[Expr], token: Expr) -> Stmt:
        """Move the token that is a block further on in the tail to this place."""
        return self._fill(head, token, lambda d: self._tail(head, token + BLOCK, d))

    def bring_back(self, at: Sequence[Expr], token: Expr) -> Stmt:
        """Put what a token of a block stands for into the tail."""
        raise NotImplementedError

    def pack(self, at: Sequence[Expr]) -> Stmt:
        """Make a block of the first tokens of the tail."""
        raise NotImplementedError

    def _tail_at(self, head: Sequence[Expr], token: Expr, d: Expr) -> list[Expr]:
        return place(self.layout, head[0], head[1], token, d)

    def _tail(self, head: Sequence[Expr], token: Expr, d: Expr) -> Expr:
        return self.tail[tuple(self._tail_at(head, token, d))]

    def _fill(self, head: Sequence[Expr], token: Expr, read: Callable[[Expr], Expr]) -> Stmt:
        return self._each(lambda d: BufferStore(self.tail, read(d), self._tail_at(head, token, d)))

    def _each(self, write: Callable[[Expr], Stmt]) -> Stmt:
        """A statement for each element of a head."""
        # The overlapped start of the last vector is written twice, the same each time.
        return sequence(
            strips(self.size, self.lanes, lambda base, width, _: vector(width, lambda lane: write(base + lane)))
        )


@dataclass(frozen=True)
class FloatPart(Part):
    """Blocks are float, too.

    Parameters
    ----------
    blocks : Var
        (batch, heads, blocks, `BLOCK`, size)
    """

    blocks: Var

    def bring_back(self, at: Sequence[Expr], token: Expr) -> Stmt:
        return self._fill(at[:2], token, lambda d: self.blocks[(*at, token, d)])

    def pack(self, at: Sequence[Expr]) -> Stmt:
        def element(token: Expr, d: Expr) -> Stmt:
            return BufferStore(self.blocks, self._tail(at[:2], token, d), [*at, token, d])

        return loop(BLOCK, lambda token: self._each(lambda d: element(token, d)), name="token")


@dataclass(frozen=True)
class TernaryPart(Part):
    """Blocks are words, an array for each of `digits`, and their scales.

    Parameters
    ----------
    words : sequence of Var
    scale : Var
    planes : int
    """

    words: Sequence[Var]
    scale: Var
    planes: int

    @property
    def fields(self) -> tuple[Digits, ...]:
        return digits(self.planes)

    @property
    def padded(self) -> int:
        """Bytes from one token's numbers to the next one's: whole words of keys, and whole groups of values."""
        return -(-self.size // LANES) * LANES

    def bring_back(self, at: Sequence[Expr], token: Expr) -> Stmt:
        head = at[:2]

        def element(d: Expr) -> Stmt:
            number = sum((self._weighted(at, n, token, d) for n in range(len(self.fields))), start=tirx.const(0))
            value = number.astype("float32") * self._scale(at, token, d)
            return BufferStore(self.tail, value, self._tail_at(head, token, d))

        return loop(self.size, element, name="d")

    def pack(self, at: Sequence[Expr]) -> Stmt:
        codes = [tirx.decl_buffer([index(BLOCK * self.padded)], "uint8", f"codes{n}") for n in range(len(self.fields))]
        # Words have no bit set behind the end.
        spare = [self._clear_behind(one) for one in codes] if self.padded > self.size else []
        words = [
            self._words(at, words, field, one) for words, field, one in zip(self.words, self.fields, codes, strict=True)
        ]
        return scope("pack", sequence(spare, self._round(at, codes), words), codes)

    def _round(self, at: Sequence[Expr], codes: Sequence[Var]) -> Stmt:
        """The numbers of a block as bytes, and its scales."""
        raise NotImplementedError

    def _words(self, at: Sequence[Expr], words: Var, field: Digits, codes: Var) -> Stmt:
        """The words of one field."""
        raise NotImplementedError

    def _scale(self, at: Sequence[Expr], token: Expr, d: Expr) -> Expr:
        raise NotImplementedError

    def _row_and_term(self, token: Expr, d: Expr) -> tuple[Expr, Expr]:
        """Where an element is in the matrix of a block."""
        raise NotImplementedError

    def _weighted(self, at: Sequence[Expr], n: int, token: Expr, d: Expr) -> Expr:
        """What one field says of an element's number."""
        field = self.fields[n]
        row, term = self._row_and_term(token, d)
        group, lane = tirx.floordiv(row, index(LANES)), tirx.floormod(row, index(LANES))
        word, term = tirx.floordiv(term, index(field.terms)), tirx.floormod(term, index(field.terms))
        shift = tirx.floormod(term, index(4)) * 8 + tirx.floordiv(term, index(4)) * field.bits
        bits = T.shift_right(self.words[n][(*at, group, word, lane)], shift.astype("uint32"))
        number = T.bitwise_and(bits, T.uint32(2**field.bits - 1)).astype("int32") - field.offset
        return number * field.weight

    def _clear_behind(self, codes: Var) -> Stmt:
        zero = tirx.const(0, "uint8")
        return loop(
            BLOCK,
            lambda j: loop(
                self.padded - self.size, lambda d: BufferStore(codes, zero, [j * self.padded + self.size + d])
            ),
            name="token",
        )

    def _inverse(self, mean: Expr) -> Expr:
        """What elements are multiplied by to be rounded."""
        step = mean * tirx.const(STEPS[self.planes], "float32")
        return Select(step >= tirx.const(_SMALLEST, "float32"), tirx.const(1.0, "float32") / step, ZERO)

    def _number(self, x: Expr, inverse: Expr) -> Expr:
        """The number of an element, int32; 0 of what is not finite."""
        most = tirx.const((3**self.planes - 1) // 2, "float32")
        c = x * inverse
        c = tirx.max(tirx.min(Select(isfinite(c), c, ZERO), most), ZERO - most)
        # To the nearest, the even one of two: of a small number it is in the low bits then. Bits, for TVM would take
        # away what is added, and not every CPU has an instruction.
        return tirx.reinterpret("int32", c + tirx.const(ROUND, "float32")) - ROUND_BITS

    def _fitted(self, mean: Expr, product: Expr, norm: Expr) -> Expr:
        """The scale, by least squares; NaN where an element is not finite."""
        fitted = product / Select(norm > ZERO, norm, tirx.const(1.0, "float32"))
        return Select(isfinite(mean), fitted, tirx.const(float("nan"), "float32"))

    def _store_number(self, codes: Sequence[Var], token: Expr, d: Expr, number: Expr) -> list[Stmt]:
        """The fields of a number: with all offsets added they are its digits, none below zero."""
        digit = (number + (3**self.planes - 1) // 2).astype("uint8")
        stores = []
        for one, field in zip(codes, self.fields, strict=True):
            high = tirx.truncdiv(digit, tirx.const(field.weight, "uint8")) if field.weight > 1 else digit
            digit = digit - high * tirx.const(field.weight, "uint8")
            stores.append(BufferStore(one, high, [token * self.padded + d]))
        return stores


class KeyPart(TernaryPart):
    """An element of a head has one scale in a block, and a word is of one token."""

    def _round(self, at: Sequence[Expr], codes: Sequence[Var]) -> Stmt:
        # The overlapped start of the last vector is done twice, the same each time.
        return sequence(strips(self.size, self.lanes, lambda base, width, _: self._channels(at, codes, base, width)))

    def _channels(self, at: Sequence[Expr], codes: Sequence[Var], base: Expr, width: int) -> Stmt:
        mean, inverse, product, norm = (buffer(name, width) for name in ("mean", "inverse", "product", "norm"))

        def x(token: Expr, lane: Expr) -> Expr:
            return self._tail(at[:2], token, base + lane)

        def add(token: Expr) -> Stmt:
            return vector(width, lambda i: BufferStore(mean, mean[i] + tirx.abs(x(token, i)), [i]))

        def start(i: Expr) -> Stmt:
            return sequence(
                BufferStore(mean, mean[i] * tirx.const(1 / BLOCK, "float32"), [i]),
                BufferStore(inverse, self._inverse(mean[i]), [i]),
            )

        def number(token: Expr, i: Expr) -> Stmt:
            whole = self._number(x(token, i), inverse[i])
            c = whole.astype("float32")
            return sequence(
                BufferStore(product, product[i] + x(token, i) * c, [i]),
                BufferStore(norm, norm[i] + c * c, [i]),
                self._store_number(codes, token, base + i, whole),
            )

        def finish(i: Expr) -> Stmt:
            return BufferStore(self.scale, self._fitted(mean[i], product[i], norm[i]), [*at, base + i])

        body = sequence(
            zeros([mean, product, norm], width),
            loop(BLOCK, add, name="token"),
            vector(width, start),
            loop(BLOCK, lambda token: vector(width, lambda i: number(token, i)), name="token"),
            vector(width, finish),
        )
        return scope("channels", body, [mean, inverse, product, norm])

    def _words(self, at: Sequence[Expr], words: Var, field: Digits, codes: Var) -> Stmt:
        def word(group: Expr, w: Expr, lane: Expr) -> Stmt:
            first = (group * LANES + lane) * self.padded + w * field.terms
            fours = [
                T.shift_left(
                    T.reinterpret(codes.vload([first + 4 * j], "uint8x4"), dtype="uint32"), T.uint32(field.bits * j)
                )
                for j in range(field.terms // 4)
            ]
            return BufferStore(words, reduce(T.bitwise_or, fours), [*at, group, w, lane])

        count = -(-self.size // field.terms)
        return loop(
            BLOCK // LANES,
            lambda group: loop(count, lambda w: loop(LANES, lambda lane: word(group, w, lane), name="lane"), name="w"),
            name="group",
        )

    def _scale(self, at: Sequence[Expr], token: Expr, d: Expr) -> Expr:
        return self.scale[(*at, d)]

    def _row_and_term(self, token: Expr, d: Expr) -> tuple[Expr, Expr]:
        return token, d


class ValuePart(TernaryPart):
    """A token has one scale, and a word is of one element of a head."""

    def _round(self, at: Sequence[Expr], codes: Sequence[Var]) -> Stmt:
        return loop(BLOCK, lambda token: self._token(at, codes, token), name="token")

    def _token(self, at: Sequence[Expr], codes: Sequence[Var], token: Expr) -> Stmt:
        total, product, norm = (buffer(name, self.lanes) for name in ("total", "product", "norm"))
        mean, inverse = buffer("mean", 1), buffer("inverse", 1)

        def x(d: Expr) -> Expr:
            return self._tail(at[:2], token, d)

        def lane_of(d: Expr) -> Expr:
            return tirx.floormod(d, index(self.lanes))

        def add(d: Expr) -> Stmt:
            i = lane_of(d)
            return BufferStore(total, total[i] + tirx.abs(x(d)), [i])

        def number(d: Expr) -> Stmt:
            i, whole = lane_of(d), self._number(x(d), inverse[0])
            c = whole.astype("float32")
            return sequence(
                BufferStore(product, product[i] + x(d) * c, [i]),
                BufferStore(norm, norm[i] + c * c, [i]),
                self._store_number(codes, token, d, whole),
            )

        def fold(one: Var) -> Stmt:
            return across(one, self.lanes, lambda a, b: a + b)

        body = sequence(
            zeros([total, product, norm], self.lanes),
            elements(index(self.size), self.lanes, add),
            fold(total),
            BufferStore(mean, total[0] / tirx.const(self.size, "float32"), [0]),
            BufferStore(inverse, self._inverse(mean[0]), [0]),
            elements(index(self.size), self.lanes, number),
            fold(product),
            fold(norm),
            BufferStore(self.scale, self._fitted(mean[0], product[0], norm[0]), [*at, token]),
        )
        return scope("token", body, [total, product, norm, mean, inverse])

    def _words(self, at: Sequence[Expr], words: Var, field: Digits, codes: Var) -> Stmt:
        def word(group: Expr, w: Expr, lane: Expr) -> Stmt:
            def term(t: int) -> Expr:
                byte = codes[(w * field.terms + t) * self.padded + group * LANES + lane]
                return T.shift_left(byte.astype("uint32"), T.uint32(8 * (t % 4) + field.bits * (t // 4)))

            terms = [term(t) for t in range(field.terms)]
            return BufferStore(words, reduce(T.bitwise_or, terms), [*at, group, w, lane])

        return loop(
            self.padded // LANES,
            lambda group: loop(
                BLOCK // field.terms, lambda w: vector(LANES, lambda lane: word(group, w, lane)), name="w"
            ),
            name="group",
        )

    def _scale(self, at: Sequence[Expr], token: Expr, d: Expr) -> Expr:
        return self.scale[(*at, token)]

    def _row_and_term(self, token: Expr, d: Expr) -> tuple[Expr, Expr]:
        return d, token
