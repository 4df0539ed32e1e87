"""How many weights share one scale: all of them, a row, or a group along a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError

# Elements worked on at once: 4 MiB of float32, so that temporaries stay small beside the matrix and near the cache.
BLOCK_ELEMENTS = 1 << 20


class Granularity(ABC):
    """Which weights of an (N, K) matrix share a scale. Only the last group of a row may be shorter than the others."""

    @abstractmethod
    def rows(self, n: int) -> int:
        """Rows of the scale for N rows of weights."""

    @abstractmethod
    def group_size(self, k: int) -> int:
        """Weights along K that share a scale: at least 1, and no more than K unless K is 0."""

    @property
    @abstractmethod
    def suffix(self) -> str:
        """How a scheme's short name writes this granularity."""

    def groups(self, k: int) -> int:
        """Groups along K: at least 1, also when K is 0."""
        return max(1, -(-k // self.group_size(k)))

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape (rows, groups) of one plane's scale for an (N, K) matrix."""
        return self.rows(n), self.groups(k)

    def spread(self, scale: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.float32]:
        """Give every column its group's scale.

        Parameters
        ----------
        scale : (R, groups) float32
            Any number of rows of one plane's scale.
        k : int
            Columns of the matrix.

        Returns
        -------
        (R, K) or (R, 1) float32
            Broadcasts against R rows of weights.
        """
        if scale.shape[1] == 1:
            return scale
        return np.repeat(scale, self.group_size(k), axis=1)[:, :k]


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole matrix: the scale's shape is (1, 1)."""

    def rows(self, n: int) -> int:
        return 1

    def group_size(self, k: int) -> int:
        return max(1, k)

    @property
    def suffix(self) -> str:
        return "pt"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each row (output feature): the scale's shape is (N, 1)."""

    def rows(self, n: int) -> int:
        return n

    def group_size(self, k: int) -> int:
        return max(1, k)

    @property
    def suffix(self) -> str:
        return ""


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each ``size`` weights along a row: the scale's shape is (N, ceil(K / size)).

    Parameters
    ----------
    size : int
        Weights in a group, at least 1; K need not be a multiple of it. A size above K means one group of K.

    Raises
    ------
    OptionError
        If size is not a positive int.
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise OptionError("PerGroup", f"size={self.size!r}, expected a positive int", "for example PerGroup(128)")

    def rows(self, n: int) -> int:
        return n

    def group_size(self, k: int) -> int:
        return min(self.size, max(1, k))

    @property
    def suffix(self) -> str:
        return f"g{self.size}"


def row_blocks(n: int, k: int, multiple: int = 1) -> Iterator[slice]:
    """Cut N rows of K into slices of about `BLOCK_ELEMENTS`, all but the last a multiple of ``multiple`` rows long."""
    step = max(1, BLOCK_ELEMENTS // max(1, k) // multiple) * multiple
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))
