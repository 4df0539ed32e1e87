"""What of a step over a ternary cache is known when it is compiled, and where it puts things."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, packed_words

Expr = Any

WARPS = 4
"""Of a thread block, if their blocks fit its shared memory."""
SHARED_BYTES = 99 << 10
"""What a thread block has on any of the architectures."""
TILE = 4
"""Rows of a tensor core's eight columns."""
TOKENS = 8
"""Last tokens that a warp takes at once."""
STEP = 64
"""Terms of a sum that a warp multiplies at once: sixteen for each t."""
BLOCKS_OF_GPU = 4 * 132
"""Thread blocks that fill an H100: four on a multiprocessor."""
GRID = 65535
"""Thread blocks along a grid's y, or z, at most."""


@dataclass(frozen=True)
class Step:
    """What is known of a step when it is compiled, and where things lie in shared memory.

    Parameters
    ----------
    shape : Attention
    planes : tuple of int
        Of keys and of values.
    batch, queries, blocks, room : int
        Sequences, queries of each, the most packed blocks and last tokens of one.
    splits : int
        Thread blocks that share the tokens of a head.
    """

    shape: Attention
    planes: tuple[int, int]
    batch: int
    queries: int
    blocks: int
    room: int
    splits: int

    @property
    def all_rows(self) -> int:
        """Queries of a head of keys."""
        return self.shape.group * self.queries

    @property
    def row_tiles(self) -> int:
        """Thread blocks that share the rows of a head of keys."""
        return ceil_div(self.all_rows, self.rows)

    @property
    def tiles(self) -> int:
        """Of rows that a warp does at once: two where there are so many, for what is decoded serves both."""
        return 1 if self.all_rows <= TILE else 2

    @property
    def rows(self) -> int:
        return TILE * self.tiles

    @property
    def steps(self) -> int:
        """Of a product with a key."""
        return ceil_div(self.shape.size, STEP)

    @property
    def padded(self) -> int:
        """Elements of a row of queries in shared memory."""
        return STEP * self.steps

    @property
    def passes(self) -> int:
        """Over a value's elements, 32 at a time."""
        return ceil_div(self.shape.value_size, 2 * LANES)

    def pieces(self, operand: int) -> int:
        """Copies of 16 bytes that a thread needs for what it multiplies in a step: words of 16 terms."""
        return self.planes[operand]

    @property
    def key_copies(self) -> int:
        return 2 * self.steps * self.pieces(0)

    @property
    def value_copies(self) -> int:
        return self.passes * self.pieces(1)

    @property
    def query_bytes(self) -> int:
        return 4 * self.rows * self.padded

    @property
    def values_at(self) -> int:
        """Where a warp's words of values begin, behind those of keys."""
        return 512 * self.key_copies

    @property
    def key_scale_at(self) -> int:
        return self.values_at + 512 * self.value_copies

    @property
    def value_scale_at(self) -> int:
        return self.key_scale_at + 4 * self.padded

    @property
    def warp_bytes(self) -> int:
        return self.value_scale_at + 4 * BLOCK

    @property
    def partial(self) -> int:
        """Floats that a warp says of a row: the sums of values, m and l."""
        return 32 * self.passes + 2

    @property
    def warps(self) -> int:
        """Of a thread block."""
        return WARPS if self._bytes_with(WARPS) <= SHARED_BYTES else WARPS // 2

    @property
    def blocks_at_once(self) -> int:
        """Thread blocks on a multiprocessor that registers leave room for."""
        if max(self.shape.size, self.shape.value_size) > 2 * STEP:
            return 2
        return 4 if self.tiles == 1 else 3

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        return self._bytes_with(self.warps)

    def _bytes_with(self, warps: int) -> int:
        # In the end what a warp says lies where its blocks were.
        return self.query_bytes + warps * max(self.warp_bytes, 4 * self.rows * self.partial)


def at_once(blocks: int) -> Any:
    """What is within runs in so many thread blocks on a multiprocessor, or more.

    Without a word the assembler tries for one more than registers allow, and spills.
    """
    return T.attr(T.int32(0), "tirx.launch_bounds_min_blocks_per_sm", T.int32(blocks))


def with_splits(step: Step) -> Step:
    """With as many splits as fill a GPU, but a unit of work for each warp."""
    units = step.blocks + ceil_div(step.room, TOKENS)
    heads = step.batch * step.shape.kv_heads * step.row_tiles
    return replace(step, splits=max(1, min(BLOCKS_OF_GPU // heads, ceil_div(units, step.warps))))


def check_sizes(shape: Attention) -> None:
    """Refuse what these kernels do not do."""
    for name, size in (("size", shape.size), ("value_size", shape.value_size)):
        if size % 4:
            raise ValueError(f"a head's {name} of {size}; on a GPU expected a multiple of 4")
    for layout in (shape.query, shape.key, shape.value, shape.out):
        if layout[-1] != "d":
            raise ValueError(f"a layout {layout}; on a GPU elements of a head are neighbours")


def check_grid(heads: int, batch: int) -> None:
    """Refuse what no launch may have: thread blocks for heads along y, for sequences along z."""
    if max(heads, batch) > GRID:
        raise ValueError(f"{heads} by {batch} thread blocks for heads and sequences; on a GPU expected {GRID} at most")


def array(name: str, extents: Sequence[Expr], dtype: str = "float32") -> Expr:
    """A parameter. Kernels index its elements with 32 bits."""
    _check_extents(name, extents)
    return T.arg(name, T.buffer(tuple(extents), dtype))


def scratch(name: str, extents: Sequence[int], dtype: str) -> Expr:
    """Memory of a function's own, between its kernels; of as many elements as a parameter."""
    _check_extents(name, extents)
    return T.alloc_buffer(tuple(extents), dtype)


def _check_extents(name: str, extents: Sequence[Expr]) -> None:
    if math.prod(extent for extent in extents if isinstance(extent, int)) >= 2**31:
        raise ValueError(f"{name} has extents {list(extents)}; on a GPU expected fewer than 2^31 elements")


def declare(step: Step) -> dict[str, Expr]:
    """The parameters by name."""
    shape, made = step.shape, dict[str, Expr]()

    def declared(name: str, extents: Sequence[int], dtype: str = "float32") -> None:
        made[name] = array(name, extents, dtype)

    def laid(name: str, layout: str, heads: int, length: int, size: int) -> None:
        extents = {"b": step.batch, "h": heads, "l": length, "d": size}
        declared(name, [extents[axis] for axis in layout])

    outer = (step.batch, shape.kv_heads, step.blocks)
    laid("q", shape.query, shape.heads, step.queries, shape.size)
    matrices = {"key": (BLOCK, shape.size), "value": (shape.value_size, BLOCK)}
    for planes, (name, matrix) in zip(step.planes, matrices.items(), strict=True):
        for n, field in enumerate(digits(planes)):
            declared(f"{name}_words{n}", (*outer, *packed_words(*matrix, field)), "uint32")
        declared(f"{name}_scale", (*outer, shape.size if name == "key" else BLOCK))
    laid("k", shape.key, shape.kv_heads, step.room, shape.size)
    laid("v", shape.value, shape.kv_heads, step.room, shape.value_size)
    for name in ("full", "recent"):
        declared(name, (step.batch,), "int32")
    laid("out", shape.out, shape.heads, step.queries, shape.value_size)
    return made


def placed(layout: str, batch: Expr, head: Expr, position: Expr, d: Expr) -> list[Expr]:
    at = {"b": batch, "h": head, "l": position, "d": d}
    return [at[axis] for axis in layout]


def head_and_query(step: Step, kv: Expr, row: Expr) -> tuple[Expr, Expr]:
    """Of a row of a head of keys."""
    return kv * step.shape.group + row // step.queries, row % step.queries
