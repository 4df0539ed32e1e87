"""Where a prompt's keys and values come from: given as a whole, some packed perhaps, or a cache and new ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, packed_words
from tvm_ternary.schedule.cuda.attention.plan import array, placed

Expr = Any
There = tuple[Expr, Callable[[], Expr]]
"""Whether there is an element, and what it is, which may be read only if there is."""


@dataclass(frozen=True)
class Whole:
    """All keys and values in float; of the keys, packed blocks are read instead of the first ones.

    Parameters
    ----------
    shape : Attention
    batch, keys : int
    planes : (int, int)
        Of packed keys, 0 where there are none; and 0.
    packed : int
        Blocks.
    b : dict of str to Buffer
        Those that were declared.
    """

    shape: Attention
    batch: int
    keys: int
    planes: tuple[int, int]
    packed: int
    b: dict[str, Expr] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Keys that there may be."""
        return self.keys

    @property
    def floats(self) -> tuple[int, int]:
        """The most keys and values that are read in float."""
        return self.keys - self.packed * BLOCK, self.keys

    def declare_packed(self) -> None:
        # No array is empty.
        _declare_packed(self, self.keys // BLOCK + 1)

    def declare_floats(self) -> None:
        for name, layout, size in _states(self.shape):
            self.b[name] = _laid(name, layout, self.batch, self.shape.kv_heads, self.keys, size)

    def total(self, batch: Expr) -> Expr:
        """Keys of a sequence."""
        return self.keys

    def packed_of(self, batch: Expr) -> Expr:
        """Packed blocks of a sequence."""
        return self.packed

    def read(self, name: str, batch: Expr, kv: Expr, token: Expr, d: Expr) -> There:
        """An element of a key or value that is read in float, by its number among those."""
        layout = self.shape.key if name == "k" else self.shape.value
        token = token + self.packed * BLOCK if name == "k" else token
        return token < self.keys, lambda: self.b[name][tuple(placed(layout, batch, kv, token, d))]


@dataclass(frozen=True)
class Cached:
    """A cache before new tokens are appended, and these.

    Parameters
    ----------
    shape : Attention
        With the layouts of the tail.
    batch, tokens, blocks, room : int
        New tokens, most packed blocks and the tail's room.
    planes : (int, int)
        Of keys and of values.
    new : (str, str)
        Layouts of the new keys and values.
    b : dict of str to Buffer
    """

    shape: Attention
    batch: int
    tokens: int
    blocks: int
    room: int
    planes: tuple[int, int]
    new: tuple[str, str]
    b: dict[str, Expr] = field(default_factory=dict)

    @property
    def most(self) -> int:
        return self.blocks * BLOCK + self.room + self.tokens

    @property
    def floats(self) -> tuple[int, int]:
        return self.room + self.tokens, self.room + self.tokens

    def declare_packed(self) -> None:
        _declare_packed(self, self.blocks)

    def declare_floats(self) -> None:
        heads = self.shape.kv_heads
        for name, layout, size in _states(self.shape):
            self.b[name] = _laid(name, layout, self.batch, heads, self.room, size)
        for (name, _, size), layout in zip(_states(self.shape), self.new, strict=True):
            self.b[f"new_{name}"] = _laid(f"new_{name}", layout, self.batch, heads, self.tokens, size)
        for name in ("full", "recent"):
            self.b[name] = array(name, [self.batch], "int32")

    def total(self, batch: Expr) -> Expr:
        return self.b["full"][batch] * BLOCK + self.b["recent"][batch] + self.tokens

    def packed_of(self, batch: Expr) -> Expr:
        return self.b["full"][batch]

    def read(self, name: str, batch: Expr, kv: Expr, token: Expr, d: Expr) -> There:
        recent, layout = self.b["recent"][batch], self.shape.key if name == "k" else self.shape.value

        def value() -> Expr:
            old = self.b[name][tuple(placed(layout, batch, kv, token, d))]
            new = placed(self.new[0 if name == "k" else 1], batch, kv, token - recent, d)
            return T.if_then_else(token < recent, old, self.b[f"new_{name}"][tuple(new)])

        return token < recent + self.tokens, value


Keys = Whole | Cached


def _states(shape: Attention) -> tuple[tuple[str, str, int], ...]:
    return ("k", shape.key, shape.size), ("v", shape.value, shape.value_size)


def _laid(name: str, layout: str, batch: int, heads: int, length: int, size: int) -> Expr:
    extents = {"b": batch, "h": heads, "l": length, "d": size}
    return array(name, [extents[axis] for axis in layout])


def _declare_packed(keys: Keys, blocks: int) -> None:
    """Words and scales, where there are planes."""
    shape, outer = keys.shape, (keys.batch, keys.shape.kv_heads, blocks)
    for name, planes, matrix in (
        ("key", keys.planes[0], (BLOCK, shape.size)),
        ("value", keys.planes[1], (shape.value_size, BLOCK)),
    ):
        for n, one in enumerate(digits(planes) if planes else ()):
            keys.b[f"{name}_words{n}"] = array(f"{name}_words{n}", (*outer, *packed_words(*matrix, one)), "uint32")
        if planes:
            keys.b[f"{name}_scale"] = array(f"{name}_scale", (*outer, shape.size if name == "key" else BLOCK))
