"""The values that a weight may take: sums of a group's scales, each times -1, 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@lru_cache
def combinations(planes: int) -> npt.NDArray[np.int8]:
    """All 3^P ways to choose P trits: (3^P, P) int8."""
    return np.array(list(product((-1, 0, 1), repeat=planes)), dtype=np.int8)


@dataclass(frozen=True)
class Levels:
    """The levels of every group of a matrix (N, K).

    Parameters
    ----------
    scale : (U, N, G) float32
        U is P, each plane with its own scale; or 1, where all share one and have whole factors.
    factors : (P, N, G) int8 or None
        With shared scales, what each plane's trits count.
    planes : int
        P.
    group_size : int
        Columns of a group; the last may be shorter.
    """

    scale: Floats
    factors: npt.NDArray[np.int8] | None
    planes: int
    group_size: int

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return int(self.scale.shape[2])

    @property
    def plane_scales(self) -> Floats:
        """(P, N, G) float32."""
        if self.factors is None:
            return self.scale
        return np.asarray(self.scale[0] * self.factors.astype(np.float32), dtype=np.float32)

    def apart(self) -> Levels:
        """The same levels with a scale for each plane."""
        return Levels(self.plane_scales, None, self.planes, self.group_size)

    def with_scales(self, scale: Floats) -> Levels:
        """The same with other scales (U, N, G)."""
        return replace(self, scale=scale)

    def where(self, rows: npt.NDArray[np.bool_], other: Levels) -> Levels:
        """These levels in the given rows (N,), those of ``other`` elsewhere; their factors are the same."""
        return replace(self, scale=np.where(rows[None, :, None], self.scale, other.scale))

    @cached_property
    def _sorted(self) -> tuple[Floats, Floats, npt.NDArray[np.uint8]]:
        """For each group, values of its combinations in ascending order, midpoints, and which combination each is.

        (G, C, N), (G, C - 1, N) and (G, C, N): a group's rows lie together.
        """
        table = combinations(self.planes)
        values = np.einsum("cp,png->gcn", table.astype(np.float32), self.plane_scales)
        which = np.argsort(values, axis=1, kind="stable")
        values = np.take_along_axis(values, which, axis=1)
        return values, (values[:, 1:] + values[:, :-1]) / 2, which.astype(np.uint8)

    def nearest(self, x: Floats, column: int) -> tuple[npt.NDArray[np.uint8], Floats]:
        """The nearest level of each row in a column.

        Parameters
        ----------
        x : (N,) float32
        column : int

        Returns
        -------
        combination : (N,) uint8
            Row of `combinations`.
        value : (N,) float32
        """
        values, middles, which = self._sorted
        group = column // self.group_size
        position = (middles[group] < x).sum(axis=0, dtype=np.intp)
        row = np.arange(len(x))
        return which[group, position, row], values[group, position, row]

    def trits(self, chosen: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """The trits of combinations (N, K): (P, N, K) int8."""
        table = combinations(self.planes)
        return np.stack([table[:, p][chosen] for p in range(self.planes)])

    def basis(self, chosen: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """What each scale multiplies: (U, N, K) int8, trits, or sums of factors times trits."""
        trits = self.trits(chosen)
        if self.factors is None:
            return trits
        k = chosen.shape[1]
        spread = np.repeat(self.factors, self.group_size, axis=2)[:, :, :k]
        return np.asarray((trits * spread).sum(axis=0, dtype=np.int8)[None])

    def values(self, chosen: npt.NDArray[np.uint8]) -> Floats:
        """The weights that combinations stand for: (N, K) float32."""
        k = chosen.shape[1]
        out = np.zeros(chosen.shape, dtype=np.float32)
        for one, trits in zip(self.plane_scales, self.trits(chosen), strict=True):
            out += np.repeat(one, self.group_size, axis=1)[:, :k] * trits
        return out
