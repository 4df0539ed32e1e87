"""The sizes that a ternary matmul is built for, and the tile that one step of it covers."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_ternary.formats import LANES, TernaryTensor, group_segments


def ceil_div(a: int, b: int) -> int:
    """The smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class MatmulShape:
    """What of a ternary weight decides its code: sizes only, never values.

    Attributes
    ----------
    n : int
        out_features, the rows of the weight.
    k : int
        in_features.
    planes : int
        Trit planes P of the stack w = sum of s_p t_p.
    groups : int
        Scale groups along K; 1 for per-channel and per-tensor scales.
    group_size : int
        k's in a group; the last group may hold fewer.
    """

    n: int
    k: int
    planes: int
    groups: int
    group_size: int

    @classmethod
    def of(cls, weight: TernaryTensor) -> MatmulShape:
        """The sizes of ``weight``."""
        n, k = weight.shape
        granularity = weight.granularity
        return cls(n, k, weight.num_planes, granularity.groups(k), granularity.group_size(k))

    @property
    def blocks(self) -> int:
        """Blocks of 16 out_features."""
        return ceil_div(self.n, LANES)

    def splits(self, block: int) -> int:
        """Segments of one group: the stretches of K that a kernel with blocks of ``block`` k's sums at once."""
        return group_segments(self.group_size, block)[0]

    def segments(self, block: int) -> int:
        """Segments of all groups."""
        return self.groups * self.splits(block)

    def segment_blocks(self, block: int) -> int:
        """Blocks of ``block`` k's that hold one segment, its padding included."""
        return group_segments(self.group_size, block)[1]

    def padded_k(self, block: int) -> int:
        """Length of a row of activations once each group is padded to whole segments."""
        return self.segments(block) * self.segment_blocks(block) * block


@dataclass(frozen=True)
class Tile:
    """What one inner step computes: its accumulators stay in registers.

    Attributes
    ----------
    rows : int
        Rows of activations.
    blocks : int
        Blocks of 16 out_features.
    """

    rows: int
    blocks: int


@dataclass(frozen=True)
class Variant:
    """One way to run a matmul and the largest M it serves; None serves every M.

    Attributes
    ----------
    tile : Tile
    max_rows : int, optional
    panel : bool
        Whether the weights of a tile are decoded to bytes once for all rows, planes summed, rather than in registers
        for each tile of rows. For kernels that have a panel.
    tiles : bool
        Whether the panel is multiplied by tile registers (AMX). Rows of a tile then lie side by side: the last tile
        starts early enough to end with the last row, so that M must not be below the rows of a tile.
    threads : str
        What is spread over threads: ``n``, tiles of out_features; ``m``, chunks of rows; ``one``, nothing.
    """

    tile: Tile
    max_rows: int | None
    panel: bool = False
    tiles: bool = False
    threads: str = "n"

    def serves(self, rows: int) -> bool:
        """Whether M = ``rows`` is within this variant's range."""
        return self.max_rows is None or rows <= self.max_rows

    @property
    def chunk(self) -> int | None:
        """Rows taken at a time: a whole number of tiles; None takes all of them at once."""
        if self.threads == "m":
            return ceil_div(64, self.tile.rows) * self.tile.rows
        return ceil_div(256, self.tile.rows) * self.tile.rows if self.panel else None
