"""What differs between kinds of activation on a tensor core: how many registers an operand takes and how it is made.

A *step* is what a thread loads at once: four neighbouring outputs' weights, and the k's that belong to them of one row
in eight. `schedule.cuda.matmul` does everything else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.int8 import MIDDLE
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.device import BFLOAT16, FLOAT16, Device, HalfFormat

Expr = Any


def at(buffer: Expr, *index: Expr) -> Expr:
    """The address of an element."""
    return T.address_of(buffer[index])


@dataclass(frozen=True)
class Place:
    """Which weights a thread loads in a step: n-block, quarter of it, block of k and the one after it, plane."""

    n_block: Expr
    quad: Expr
    block: Expr
    next_block: Expr
    plane: Expr


class Operands(ABC):
    """The operands of a tensor core for one kernel and shape.

    Attributes
    ----------
    blocks : int
        Blocks of k that a warp takes in a step.
    piece_bytes, pieces : int
        How activations are copied: the bytes of a piece, and how many of them a row has in a step.
    word_registers, row_registers : int
        Registers that one output's weights become, and that a thread's activations take.
    accumulator : str
        dtype of the sums.
    sums : int
        Sums of each result that are kept apart.
    planes_apart : bool
        Whether each plane is multiplied by itself, rather than all of them added while they are decoded.
    """

    blocks = 4
    piece_bytes = 16
    sums = 1
    planes_apart = False
    pieces: int
    word_registers: int
    row_registers: int
    accumulator: str

    def __init__(self, shape: MatmulShape) -> None:
        self.shape = shape

    @property
    def words(self) -> int:
        """Words of weights that a thread loads in a step."""
        return 4 * self.shape.planes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of activations in a step."""
        return self.pieces * self.piece_bytes

    def zero(self) -> Expr:
        """Where a sum starts."""
        return T.int32(0) if self.accumulator == "int32" else T.float32(0)

    @abstractmethod
    def weight_addresses(self, b: dict[str, Expr], place: Place) -> list[Expr]:
        """Where a thread's weights of a step lie, 16 bytes each: `words` in all."""

    @abstractmethod
    def decode(self, to: Expr, place: Expr, packed: Expr, index: Expr, first: Expr, factors: list[Expr]) -> None:
        """Make the ``place``-th registers, of output ``index``, 0 to 3, of the words from ``first`` on."""

    @abstractmethod
    def row_address(self, b: dict[str, Expr], row: Expr, piece: Expr) -> Expr:
        """Where a piece of a row of activations lies."""

    @abstractmethod
    def multiply(self, acc: Expr, index: Expr, apart: int, weights: Expr, e: Expr, x: Expr) -> None:
        """Add a step's products to the four sums from ``index`` on, for the ``e``-th two outputs and eight rows.

        Sums of the same result lie ``apart``.
        """

    @abstractmethod
    def term(self, dot: Expr, scale: Expr, x_sum: Expr, x_scale: Expr) -> Expr:
        """What the sum of a segment, or of a whole row, adds to a result, float32.

        ``x_sum`` and ``x_scale`` are those of its activations, where the kernel has such operands.
        """

    def prepare_rows(self, x: Expr) -> None:  # noqa: B027
        """What a thread's activations of a step need before they are multiplied: mostly nothing."""

    def shared_offsets(self, row: Expr, t: Expr) -> list[Expr]:
        """Where thread t of four finds its activations in a row in shared memory, 16 bytes each."""
        return [t * 16]

    def piece_offset(self, row: Expr, piece: Expr) -> Expr:
        """Where in its row of shared memory a piece lies: so that a warp's reads meet all banks."""
        return piece * self.piece_bytes


class CodeOperands(Operands):
    """Weights as 2-bit codes; activations of 8 or 16 bits."""

    @property
    @abstractmethod
    def mma(self) -> Device:
        """The tensor core's instruction."""

    def weight_addresses(self, b: dict[str, Expr], place: Place) -> list[Expr]:
        planes = range(self.shape.planes)
        return [at(b["codes"], p, place.n_block, place.block, place.quad * 4) for p in planes]

    def multiply(self, acc: Expr, index: Expr, apart: int, weights: Expr, e: Expr, x: Expr) -> None:
        count = self.word_registers
        one, two = 2 * e * count, (2 * e + 1) * count
        for i in range(0, count, 2):
            left = (weights[one + i], weights[two + i], weights[one + i + 1], weights[two + i + 1])
            T.evaluate(self.mma(at(acc, index), *left, x[i], x[i + 1]))


class ByteOperands(CodeOperands):
    """int8 activations: weights are unsigned bytes that stand for w + `middle`."""

    pieces, word_registers, row_registers, accumulator = 4, 4, 4, "int32"
    mma = device.mma_bytes

    @property
    def middle(self) -> int:
        """What the byte of a zero weight is."""
        return 1 if self.shape.planes == 1 else MIDDLE

    def decode(self, to: Expr, place: Expr, packed: Expr, index: Expr, first: Expr, factors: list[Expr]) -> None:
        start, planes = at(to, place * 4), range(self.shape.planes)
        if self.shape.planes == 1:
            T.evaluate(device.decode_codes(start, packed[first + index]))
            return
        each = [device.byte_of(factors[p], index) for p in planes]
        T.evaluate(device.start_bytes(start, MIDDLE - sum(each[1:], each[0])))
        for p in planes:
            T.evaluate(device.add_bytes(start, packed[first + 4 * p + index], each[p]))

    def row_address(self, b: dict[str, Expr], row: Expr, piece: Expr) -> Expr:
        return at(b["x_q"], row, piece * 16)

    def term(self, dot: Expr, scale: Expr, x_sum: Expr, x_scale: Expr) -> Expr:
        return scale * (T.Cast("float32", dot - x_sum * self.middle) * x_scale)


class HalfOperands(CodeOperands):
    """float16 or bfloat16 activations: weights are whole numbers of that format."""

    pieces, word_registers, row_registers, accumulator = 8, 8, 8, "float32"

    def __init__(self, shape: MatmulShape, form: HalfFormat, mma: Device) -> None:
        super().__init__(shape)
        self.form, self._mma = form, mma

    @property
    def mma(self) -> Device:
        return self._mma

    def decode(self, to: Expr, place: Expr, packed: Expr, index: Expr, first: Expr, factors: list[Expr]) -> None:
        if self.shape.planes == 1:
            T.evaluate(self.form.decode(at(to, place * 8), packed[first + index]))
            return
        for i in range(8):
            T.buffer_store(to, T.uint32(0), [place * 8 + i])
        for p in range(self.shape.planes):
            factor = device.byte_of(factors[p], index)
            T.evaluate(self.form.add(at(to, place * 8), packed[first + 4 * p + index], factor))

    def row_address(self, b: dict[str, Expr], row: Expr, piece: Expr) -> Expr:
        return at(b["x_half"], row, piece * 8)

    def term(self, dot: Expr, scale: Expr, x_sum: Expr, x_scale: Expr) -> Expr:
        return scale * dot

    def shared_offsets(self, row: Expr, t: Expr) -> list[Expr]:
        return [self.piece_offset(row, 2 * t), self.piece_offset(row, 2 * t + 1)]

    def piece_offset(self, row: Expr, piece: Expr) -> Expr:
        # A row is 128 bytes long, all banks once: every other row has its pieces exchanged in pairs.
        return T.bitwise_xor(piece, T.bitwise_and(row, 1)) * 16


class BitOperands(Operands):
    """Ternary activations: both matrices as bits, nonzero and minus, 32 k's a word.

    What is counted: a b = (a+ b+) + (a- b-) - (a+ b-) - (a- b+); the first two in one sum, the others in a second one.
    """

    blocks, piece_bytes, pieces, word_registers, row_registers = 8, 8, 8, 4, 4
    accumulator, sums, planes_apart = "int32", 2, True

    @property
    def words(self) -> int:
        return 16

    def weight_addresses(self, b: dict[str, Expr], place: Place) -> list[Expr]:
        bits, blocks = b["bits"], (place.block, place.next_block)
        return [at(bits, place.plane, place.n_block, k, sign, place.quad * 4) for k in blocks for sign in range(2)]

    def decode(self, to: Expr, place: Expr, packed: Expr, index: Expr, first: Expr, factors: list[Expr]) -> None:
        for i in range(2):
            nonzero, minus = packed[first + 8 * i + index], packed[first + 8 * i + 4 + index]
            T.buffer_store(to, T.bitwise_and(nonzero, T.bitwise_not(minus)), [place * 4 + i])
            T.buffer_store(to, minus, [place * 4 + 2 + i])

    def row_address(self, b: dict[str, Expr], row: Expr, piece: Expr) -> Expr:
        return at(b["x_bits"], row, piece, 0)

    def prepare_rows(self, x: Expr) -> None:
        """(nonzero, minus) of two blocks become the plus of both, then the minus of both."""
        for i in (0, 2):
            T.buffer_store(x, T.bitwise_and(x[i], T.bitwise_not(x[i + 1])), [i])
        T.evaluate(device.swap(at(x, 1), at(x, 2)))

    def multiply(self, acc: Expr, index: Expr, apart: int, weights: Expr, e: Expr, x: Expr) -> None:
        one, two = 8 * e, 8 * e + 4
        for a in (0, 2):
            for b in (0, 2):
                left = (weights[one + a], weights[two + a], weights[one + a + 1], weights[two + a + 1])
                to = index if a == b else index + apart
                T.evaluate(device.mma_bits(at(acc, to), *left, x[b], x[b + 1]))

    def term(self, dot: Expr, scale: Expr, x_sum: Expr, x_scale: Expr) -> Expr:
        return scale * T.Cast("float32", dot)


def operands_of(kernel: MatmulKernel, shape: MatmulShape) -> Operands:
    """The operands of a kernel of `kernels.table`, for weights of ``shape``."""
    makers: dict[str, Callable[[], Operands]] = {
        "matmul_a8": lambda: ByteOperands(shape),
        "matmul_a1": lambda: BitOperands(shape),
        "matmul_a16": lambda: HalfOperands(shape, FLOAT16, device.mma_float16),
        "matmul_abf16": lambda: HalfOperands(shape, BFLOAT16, device.mma_bfloat16),
    }
    return makers[kernel.name]()
