"""Products of floats with the numbers of packed blocks, without unpacking these to memory.

With a byte dot product, rows become bytes, by one scale each, or trits, and a vector of words is shifted and masked
once for four bytes a lane; else each number becomes a float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, Ramp, Select, Stmt, Var

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.ternary_keys import Digits, digits
from tvm_ternary.schedule.cpu.attention.operands import ZERO, across, buffer, elements
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, vector
from tvm_ternary.schedule.intrinsics import ByteDot
from tvm_ternary.schedule.intrinsics.common import field, four_bytes, prefetch

_MOST = 127.0
_MAGNITUDE = 0x7FFFFFFF
_LARGEST_FLOAT = 3.4028234663852886e38
# Added to a number of at most 2^22 it leaves the nearest whole number in the low bits.
_ROUND, _ROUND_BITS = 12582912.0, 0x4B400000
_TERMS = 16
"""Terms in a word of two bits: rows of what is multiplied are padded to a multiple."""


class Multiplied:
    """Rows of floats, and the numbers of blocks multiplied by them.

    Parameters
    ----------
    name : str
    rows : int
    terms : int
        Of a block.
    blocks : int
        The most whose products are summed.
    lanes : int
        Of a vector of float32.
    dot : ByteDot or None
        To multiply bytes; None for floats.
    planes : int
    trits : bool
        Whether rows become trits, as `activations.ternary_rows` has them; with a dot product.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        terms: int,
        blocks: int,
        lanes: int,
        dot: ByteDot | None,
        planes: int,
        *,
        trits: bool = False,
    ) -> None:
        self.rows, self.terms, self.lanes, self.dot, self.fields = rows, terms, lanes, dot, digits(planes)
        self.trits, self.padded = trits, -(-terms * blocks // _TERMS) * _TERMS
        self.largest = (3**planes - 1) // 2
        self.floats = buffer(f"{name}_floats", rows * self.padded)
        self.bytes = tirx.decl_buffer([index(rows * self.padded)], "int8", f"{name}_bytes")
        self.scale, self.total = buffer(f"{name}_scale", rows), buffer(f"{name}_total", rows)
        self.buffers = [self.floats, *([self.bytes, self.scale, self.total] if dot else [])]

    def clear(self) -> Stmt:
        """What is padded is zero, and stays it."""
        zero = tirx.const(0, "int8")
        bytes_ = [loop(self.rows * self.padded, lambda i: BufferStore(self.bytes, zero, [i]))] if self.dot else []
        return sequence(loop(self.rows * self.padded, lambda i: BufferStore(self.floats, ZERO, [i])), *bytes_)

    def load(self, row: Expr, count: Expr, read: Callable[[Expr], Expr]) -> Stmt:
        """Take so many elements of a row, and round them."""
        start = row * self.padded
        if not self.dot:
            return elements(count, self.lanes, lambda j: BufferStore(self.floats, read(j), [start + j]))
        return self._load_trits(row, count, read) if self.trits else self._load_bytes(row, count, read)

    def _load_bytes(self, row: Expr, count: Expr, read: Callable[[Expr], Expr]) -> Stmt:
        start = row * self.padded
        most, total = (tirx.decl_buffer([index(self.lanes)], "int32", name) for name in ("most", "sum"))
        inverse = buffer("inverse", 1)

        def lane(j: Expr) -> Expr:
            return tirx.floormod(j, index(self.lanes))

        def take(j: Expr) -> Stmt:
            # Magnitudes as whole numbers: what is no number is the largest.
            magnitude = tirx.bitwise_and(tirx.reinterpret("int32", self.floats[start + j]), tirx.const(_MAGNITUDE))
            return sequence(
                BufferStore(self.floats, read(j), [start + j]),
                BufferStore(most, tirx.max(most[lane(j)], magnitude), [lane(j)]),
            )

        def rounded(j: Expr) -> Stmt:
            moved = self.floats[start + j] * inverse[0] + tirx.const(_ROUND, "float32")
            number = tirx.reinterpret("int32", moved)
            return sequence(
                BufferStore(self.bytes, number.astype("int8"), [start + j]),
                BufferStore(total, total[lane(j)] + (number - tirx.const(_ROUND_BITS)), [lane(j)]),
            )

        def clear(one: Var) -> Stmt:
            return vector(self.lanes, lambda i: BufferStore(one, tirx.const(0), [i]))

        largest = tirx.reinterpret("float32", most[0])
        body = sequence(
            clear(most),
            elements(count, self.lanes, take),
            across(most, self.lanes, tirx.max),
            BufferStore(inverse, Select(largest > ZERO, tirx.const(_MOST, "float32") / largest, ZERO), [0]),
            BufferStore(self.scale, largest * tirx.const(1 / _MOST, "float32"), [row]),
            clear(total),
            elements(count, self.lanes, rounded),
            across(total, self.lanes, lambda a, b: a + b),
            BufferStore(self.total, total[0].astype("float32"), [row]),
        )
        return scope("rounded", body, [most, total, inverse])

    def _load_trits(self, row: Expr, count: Expr, read: Callable[[Expr], Expr]) -> Stmt:
        start, lanes, total = row * self.padded, self.lanes, tirx.decl_buffer([index(self.lanes)], "int32", "sum")
        limit, kept, some = (buffer(name, lanes) for name in ("limit", "kept", "some"))
        one, nan = tirx.const(1.0, "float32"), tirx.const(float("nan"), "float32")

        def lane(j: Expr) -> Expr:
            return tirx.floormod(j, index(lanes))

        def take(j: Expr) -> Stmt:
            return sequence(
                BufferStore(self.floats, read(j), [start + j]),
                BufferStore(limit, limit[lane(j)] + tirx.abs(self.floats[start + j]), [lane(j)]),
            )

        def rounded(j: Expr) -> Stmt:
            x = self.floats[start + j]
            is_some = tirx.abs(x) > limit[0]
            number = Select(is_some, Select(x > ZERO, tirx.const(1), tirx.const(-1)), tirx.const(0))
            return sequence(
                BufferStore(self.bytes, number.astype("int8"), [start + j]),
                BufferStore(total, total[lane(j)] + number, [lane(j)]),
                BufferStore(kept, kept[lane(j)] + Select(is_some, tirx.abs(x), ZERO), [lane(j)]),
                BufferStore(some, some[lane(j)] + Select(is_some, one, ZERO), [lane(j)]),
            )

        folded = [across(each, lanes, lambda a, b: a + b) for each in (total, kept, some)]
        mean = kept[0] / tirx.max(some[0], one)
        # Beside a limit that is not finite nothing was kept, and zeros would hide it.
        finite = limit[0] <= tirx.const(_LARGEST_FLOAT, "float32")
        body = sequence(
            vector(lanes, lambda i: BufferStore(total, tirx.const(0), [i])),
            [vector(lanes, lambda i, each=each: BufferStore(each, ZERO, [i])) for each in (limit, kept, some)],  # type: ignore[misc]
            elements(count, lanes, take),
            across(limit, lanes, lambda a, b: a + b),
            BufferStore(limit, limit[0] / (count.astype("float32") * tirx.const(2.0, "float32")), [0]),
            elements(count, lanes, rounded),
            *folded,
            BufferStore(self.scale, Select(finite, mean, nan), [row]),
            BufferStore(self.total, total[0].astype("float32"), [row]),
        )
        return scope("rounded", body, [total, limit, kept, some])

    def multiply(
        self,
        words: Sequence[Var],
        at: Callable[[Expr], list[Expr]],
        blocks: Expr,
        groups: int,
        registers: int,
        store: Callable[..., list[Stmt]],
    ) -> Stmt:
        """The product of all rows with all groups of sixteen rows of some blocks, summed over these.

        Parameters
        ----------
        words : sequence of Var
            One for each of `digits`.
        at : callable
            Gives the place of the n-th block.
        blocks : Expr
            How many.
        groups : int
        registers : int
            Of the vector unit.
        store : callable (row, start, lanes, value) -> statements
            Takes ``lanes`` float sums of a row of floats, from row ``start`` of the block on.
        """
        lanes = self.dot.lanes if self.dot else self.lanes
        # Sums beside each other hide the latency of adding to one; more than half of the registers would spill.
        at_once = max(1, registers // 2 * lanes // (LANES * self.rows))
        dtype = "int32" if self.dot else "float32"

        def together(part: range) -> Stmt:
            places = [(row, group, n) for row in range(self.rows) for group in part for n in range(0, LANES, lanes)]
            sums = [(tirx.decl_buffer([index(lanes)], dtype, f"acc{n}"), *place) for n, place in enumerate(places)]
            zero = T.Broadcast(tirx.const(0, dtype), lanes)
            body = [BufferStore(acc, zero, [Ramp(0, 1, lanes)]) for acc, *_ in sums]
            for fields, array in zip(self.fields, words, strict=True):
                if fields.first:
                    more = T.Broadcast(tirx.const(3**fields.count, dtype), lanes)
                    body += [BufferStore(acc, _load(acc, lanes) * more, [Ramp(0, 1, lanes)]) for acc, *_ in sums]
                body.append(self._add(sums, lanes, fields, array, at, blocks))
            for acc, row, group, n in sums:
                body += store(row, group * LANES + n, lanes, self._finished(acc, lanes, row))
            return scope("products", sequence(body), [acc for acc, *_ in sums])

        return sequence([together(range(n, min(n + at_once, groups))) for n in range(0, groups, at_once)])

    def _add(
        self,
        sums: list[tuple[Var, int, int, int]],
        lanes: int,
        fields: Digits,
        array: Var,
        at: Callable[[Expr], list[Expr]],
        blocks: Expr,
    ) -> Stmt:
        """Add the products with one of the arrays of words."""
        step = self._bytes if self.dot else self._numbers

        def word(block: Expr, w: Expr) -> Stmt:
            first = block * self.terms + w * fields.terms
            ahead = [[*at(block + 1), index(group), w, 0] for group in dict.fromkeys(group for _, _, group, _ in sums)]
            return sequence(
                # A block is a page or less, and what a CPU reads ahead by itself ends with a page.
                [prefetch(T.address_of(array[tuple(place)])) for place in ahead],
                [
                    step(
                        acc,
                        lanes,
                        fields,
                        array.vload([*at(block), index(group), w, n], f"uint32x{lanes}"),
                        row * self.padded + first,
                    )
                    for acc, row, group, n in sums
                ],
            )

        count = -(-self.terms // fields.terms)
        return loop(blocks, lambda block: loop(count, lambda w: word(block, w), name="word"), name="block")

    def _finished(self, acc: Var, lanes: int, row: int) -> Expr:
        total = _load(acc, lanes)
        if not self.dot:
            return total
        away = tirx.const(self.largest, "float32") * self.total[row]
        return (T.Cast(f"float32x{lanes}", total) - T.Broadcast(away, lanes)) * T.Broadcast(self.scale[row], lanes)

    def _bytes(self, acc: Var, lanes: int, fields: Digits, words: Expr, first: Expr) -> Stmt:
        """One word of each lane: its fields are bytes once they are shifted down."""
        assert self.dot is not None
        total = _load(acc, lanes)
        mask = 0x01010101 * (2**fields.bits - 1)
        for j in range(fields.terms // 4):
            bytes_ = T.reinterpret(field(words, fields.bits * j, mask, lanes), dtype=f"uint8x{4 * lanes}")
            total = self.dot.add(total, bytes_, four_bytes(self.bytes, first + 4 * j, lanes))
        return BufferStore(acc, total, [Ramp(0, 1, lanes)])

    def _numbers(self, acc: Var, lanes: int, fields: Digits, words: Expr, first: Expr) -> Stmt:
        total = _load(acc, lanes)
        for term in range(fields.terms):
            shift = 8 * (term % 4) + fields.bits * (term // 4)
            number = T.reinterpret(field(words, shift, 2**fields.bits - 1, lanes), dtype=f"int32x{lanes}")
            number = number - T.Broadcast(T.int32(fields.offset), lanes)
            x = self.floats[first + term]
            total = total + T.Cast(f"float32x{lanes}", number) * T.Broadcast(x, lanes)
        return BufferStore(acc, total, [Ramp(0, 1, lanes)])


def _load(acc: Var, lanes: int) -> Expr:
    return acc.vload([0], f"{acc.dtype}x{lanes}")
