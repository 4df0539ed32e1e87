"""What of a CUDA matmul can be chosen: tiles, warps, stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CudaVariant:
    """One way to run a ternary matmul on a GPU and the largest M it serves; None serves every M.

    A block of threads makes ``rows`` rows times ``columns * warps_n`` outputs; each of its warps ``columns`` outputs of
    all rows, over a ``warps_k``-th of K. The sums of the warps along K are added in shared memory.

    Attributes
    ----------
    rows : int
        Rows of activations, a multiple of 8.
    columns : int
        out_features of a warp: 32 or 64.
    warps_n, warps_k : int
        Warps of a block along N and K.
    stages : int
        Steps of which a block holds operands in shared memory, at least 2: one is multiplied while the others arrive.
    shared : bool
        Whether the warps along N share the activations of a step, for many rows; else each thread copies what it needs,
        and threads never wait for one another.
    max_rows : int, optional
    """

    rows: int
    columns: int
    warps_n: int
    warps_k: int
    stages: int
    shared: bool = False
    max_rows: int | None = None

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_n * self.warps_k

    def serves(self, rows: int) -> bool:
        """Whether M = ``rows`` is within this variant's range."""
        return self.max_rows is None or rows <= self.max_rows
