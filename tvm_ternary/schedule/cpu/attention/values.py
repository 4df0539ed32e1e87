"""Values of a prompt on their way to 16-bit numbers: once for all queries that read them. A lane is an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import BufferStore, Select, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.paired_values import LARGEST_VALUE, SMALLEST, word_shape
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention.operands import ZERO, Values, buffer
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, vector
from tvm_ternary.schedule.cpu.vector_math import INFINITY_BITS, ROUND

_MAGNITUDE = 0x7FFFFFFF
_LOW_HALF = 0xFFFF


def paired(first: Expr, second: Expr) -> Expr:
    """A word of two 16-bit numbers, given as floats that `ROUND` was added to."""
    low, high = (tirx.reinterpret("int32", one) for one in (first, second))
    return tirx.bitwise_or(
        tirx.bitwise_and(low, tirx.const(_LOW_HALF, "int32")), tirx.shift_left(high, tirx.const(16, "int32"))
    )


@dataclass(frozen=True)
class PairedValues:
    """The rounded values of a batch of sequences, see `kernels.paired_values`.

    Parameters
    ----------
    shape : Attention
    batch, blocks : Expr
        Extents.
    """

    shape: Attention
    batch: Expr
    blocks: Expr

    @property
    def extents(self) -> list[tuple[list[Expr], str]]:
        """Shapes and dtypes of `params`."""
        outer, size = [self.batch, index(self.shape.kv_heads), self.blocks], self.shape.value_size
        return [([*outer, *map(index, word_shape(size))], "int32"), ([*outer, index(size)], "float32")]

    @property
    def params(self) -> list[Var]:
        """Words and scales."""
        return [self.words, self.scale]

    @cached_property
    def words(self) -> Var:
        return tirx.decl_buffer(*self.extents[0], "value_words")

    @cached_property
    def scale(self) -> Var:
        return tirx.decl_buffer(*self.extents[1], "value_scale")

    def place(self, block: Sequence[Expr], pair: Expr, d: Expr) -> list[Expr]:
        """Of the word of an element and a pair of tokens of a block, which is given by batch, head and number."""
        return [*block, tirx.floordiv(d, index(LANES)), pair, tirx.floormod(d, index(LANES))]

    def round(self, values: Values, lanes: int, block: Sequence[Expr]) -> Stmt:
        """Make a block.

        Parameters
        ----------
        values : Values
        lanes : int
            Of a vector of float32.
        block : sequence of Expr
            Batch, head and number.
        """
        parts, first, width = [], 0, min(lanes, LANES)
        while width:
            # What fills no vector is done by half as many lanes, and so on: none crosses a group of sixteen.
            count = (self.shape.value_size - first) // width
            if count:
                parts.append(self._strips(values, block, first, width, count))
            first, width = first + count * width, width // 2
        return sequence(parts)

    def _strips(self, values: Values, block: Sequence[Expr], first: int, width: int, count: int) -> Stmt:
        return loop(count, lambda n: self._strip(values, block, first + n * width, width), name="strip")

    def _strip(self, values: Values, block: Sequence[Expr], base: Expr, width: int) -> Stmt:
        """The elements ``base .. base + width`` of all tokens."""
        most, inverse = tirx.decl_buffer([index(width)], "int32", "most"), buffer("inverse", width)
        batch, head, number = block

        def value(token: Expr, i: Expr) -> Expr:
            return values.value_at(batch, head, number * BLOCK + token, base + i)

        def look(token: Expr, i: Expr) -> Stmt:
            # As whole numbers, floats without a sign are in order, and what is not finite is above all others.
            bits = tirx.bitwise_and(tirx.reinterpret("int32", value(token, i)), tirx.const(_MAGNITUDE, "int32"))
            return BufferStore(most, tirx.max(most[i], bits), [i])

        def scales(i: Expr) -> Stmt:
            largest = tirx.reinterpret("float32", most[i])
            some = largest >= tirx.const(SMALLEST, "float32")
            finite = most[i] < tirx.const(INFINITY_BITS, "int32")
            scale = Select(some, largest * tirx.const(1 / LARGEST_VALUE, "float32"), ZERO)
            scale = Select(finite, scale, tirx.const(float("nan"), "float32"))
            # Of what is not finite the numbers mean nothing, for their scale is NaN.
            return sequence(
                BufferStore(inverse, Select(some, tirx.const(LARGEST_VALUE, "float32") / largest, ZERO), [i]),
                BufferStore(self.scale, scale, [*block, base + i]),
            )

        def pair(n: Expr, i: Expr) -> Stmt:
            rounded = [value(2 * n + half, i) * inverse[i] + tirx.const(ROUND, "float32") for half in range(2)]
            return BufferStore(self.words, paired(*rounded), self.place(block, n, base + i))

        body = sequence(
            vector(width, lambda i: BufferStore(most, tirx.const(0, "int32"), [i])),
            loop(BLOCK, lambda token: vector(width, lambda i: look(token, i)), name="token"),
            vector(width, scales),
            loop(BLOCK // 2, lambda n: vector(width, lambda i: pair(n, i)), name="pair"),
        )
        return scope("strip", body, [most, inverse])
