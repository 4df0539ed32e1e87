"""The sizes that a ternary matmul is built for, and the tile that one step of it covers."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_ternary.formats import LANES, TernaryTensor


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

    def group_blocks(self, block: int) -> int:
        """Blocks of ``block`` k's that hold one group, its padding included."""
        return ceil_div(self.group_size, block)

    def padded_k(self, block: int) -> int:
        """Length of a row of activations once each group is padded to whole blocks."""
        return self.groups * self.group_blocks(block) * block


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
    """A tile and the largest M it serves; None serves every M."""

    tile: Tile
    max_rows: int | None

    def serves(self, rows: int) -> bool:
        """Whether M = ``rows`` is within this variant's range."""
        return self.max_rows is None or rows <= self.max_rows
