"""What of attention of many queries is known when it is compiled, and where it puts things."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK, Digits, digits
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.attention import device as own

KEYS = BLOCK
"""Of a block: those that share scales, where they are packed."""
ROWS = 16
"""Queries of a warp."""
SPARE = 64
"""Bytes between rows in shared memory: those that a warp reads at once lie in different banks."""
WORD_ROW = 4 * LANES + 16
"""Bytes between words of sixteen rows there, for the same reason."""
LARGEST = 128
"""Elements of a head, beyond which a thread's results and queries leave no registers for the rest."""
PAIRS = ((0, 2), (1, 3), (4, 6), (5, 7))
"""Which of eight neighbours in a sum stand together in a register: those whose digits lie 16 bits apart in a word."""


@dataclass(frozen=True)
class Kind:
    """A float of 16 bits.

    Attributes
    ----------
    name : str
    pack, multiply : Device
    half : HalfFormat
    """

    name: str
    pack: device.Device
    multiply: device.Device
    half: device.HalfFormat


KINDS = {
    "float16": Kind("float16", own.pack_float16, device.mma_float16, device.FLOAT16),
    "bfloat16": Kind("bfloat16", own.pack_bfloat16, device.mma_bfloat16, device.BFLOAT16),
}


@dataclass(frozen=True)
class Matrix:
    """A block of keys, or of values, in shared memory: rows by terms of a sum, in 16 bits.

    Parameters
    ----------
    name : str
        ``key`` or ``value``.
    size : int
        Elements of a head.
    planes : int
        Of packed blocks; 0 where there are none.
    start : int
        Where it begins.
    """

    name: str
    size: int
    planes: int
    start: int

    @property
    def is_key(self) -> bool:
        return self.name == "key"

    @property
    def rows(self) -> int:
        """Keys, or elements of values, in products of eight."""
        return KEYS if self.is_key else ceil_div(self.size, 8) * 8

    @property
    def terms(self) -> int:
        """Elements of keys, in steps of 32, or tokens."""
        return ceil_div(self.size, 32) * 32 if self.is_key else KEYS

    @property
    def pieces(self) -> int:
        """Of a row, 16 bytes each."""
        return self.terms // 8

    @property
    def row(self) -> int:
        """Bytes between rows; 64 more than a multiple of 128."""
        return 2 * self.terms + (SPARE if self.terms % 64 == 0 else 2 * SPARE)

    @property
    def fields(self) -> tuple[Digits, ...]:
        return digits(self.planes) if self.planes else ()

    @property
    def groups(self) -> int:
        """Of sixteen rows, that a packed block has."""
        return ceil_div(KEYS if self.is_key else self.size, LANES)

    def words(self, field: Digits) -> int:
        """Of a row, that a packed block has."""
        return ceil_div(self.size if self.is_key else KEYS, field.terms)

    def words_at(self, number: int) -> int:
        """Where the words of a field begin in a packed block's place."""
        return sum(self.groups * self.words(field) * WORD_ROW for field in self.fields[:number])

    @property
    def packed_at(self) -> int:
        """Where places for two packed blocks begin."""
        return self.start + self.rows * self.row

    @property
    def packed_bytes(self) -> int:
        """Of one packed block: words, then scales, a float for each term."""
        return self.words_at(len(self.fields)) + 4 * self.terms if self.planes else 0

    @property
    def end(self) -> int:
        return self.packed_at + 2 * self.packed_bytes


@dataclass(frozen=True)
class Prompt:
    """What is known when it is compiled.

    Parameters
    ----------
    shape : Attention
    batch, queries : int
    causal : bool
    kind : Kind
    planes : (int, int)
        Of packed keys and values; 0 where there are none.
    floats : (int, int)
        The most keys and values that are read in float.
    most : int
        Keys that there may be.
    """

    shape: Attention
    batch: int
    queries: int
    causal: bool
    kind: Kind
    planes: tuple[int, int]
    floats: tuple[int, int]
    most: int

    @property
    def warps(self) -> int:
        return 4 if self.queries <= 4 * ROWS else 8

    @property
    def rows(self) -> int:
        return ROWS * self.warps

    @property
    def steps(self) -> int:
        """Of a product with a key, 32 elements each."""
        return ceil_div(self.shape.size, 32)

    @property
    def columns(self) -> int:
        """Products of values, eight elements each."""
        return ceil_div(self.shape.value_size, 8)

    @property
    def key(self) -> Matrix:
        return Matrix("key", self.shape.size, self.planes[0], 0)

    @property
    def value(self) -> Matrix:
        return Matrix("value", self.shape.value_size, self.planes[1], self.key.end)

    def float_blocks(self, matrix: Matrix) -> int:
        """Blocks that there is memory for in 16 bits."""
        return ceil_div(self.floats[0 if matrix.is_key else 1], KEYS)

    @property
    def flags_at(self) -> int:
        """Where warps say which blocks they see, a byte a warp and block, by a mask of bits."""
        return self.value.end

    @property
    def shared_bytes(self) -> int:
        flags = self.warps * (ceil_div(self.most, KEYS) + 1) if self.shape.hidden is not None else 0
        return self.flags_at + flags
