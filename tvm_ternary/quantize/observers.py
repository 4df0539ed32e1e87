"""What a matrix's inputs are like: gathered batch by batch, in memory that does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import InputError

Floats = npt.NDArray[np.float32]

# Rows that are worked on at once. Fixed, so that the result does not depend on how rows were cut into batches, and so
# that batches of a few rows do not each touch all K * K sums.
_BLOCK = 512
# The sum of so many squares is still a float32.
_LARGEST = 1e17

# The histogram of |x|: 32 bins an octave, from 2^-24 to 2^16, read off the bits of float32, which are in the order of
# the values: 8 bits of exponent, then 5 of the mantissa. Bin 0 holds what is smaller, the last one also what is larger.
_DROPPED_BITS = 18
_FIRST = (127 - 24) << 5
_BINS = (24 + 16) * 32 + 1


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the rows x of a matrix's input, each column by itself.

    Attributes
    ----------
    count : int
        Rows seen, at least 1.
    mean, absmax, square : (K,) float32
        Mean, largest magnitude, mean square.
    hessian : (K, K) float32 or None
        Mean of x x^T, exactly symmetric; its diagonal is ``square`` up to rounding. None if it was not asked for.
    histogram : (K, B) uint32 or None
        Counts of |x|, for `percentile`. None if it was not asked for.
    drift : (K, K) float32 or None
        Mean of (f - x) x^T, with f the same row in the float model. None if that was not given.
    """

    count: int
    mean: Floats
    absmax: Floats
    square: Floats
    hessian: Floats | None
    histogram: npt.NDArray[np.uint32] | None = None
    drift: Floats | None = None

    def percentile(self, q: float) -> Floats:
        """A magnitude that q percent of each column's elements do not exceed.

        Parameters
        ----------
        q : float
            0 to 100.

        Returns
        -------
        (K,) float32
            With v the element of rank max(1, ceil(q / 100 * count)) in the order of magnitude, the upper end of v's
            bin, or ``absmax`` where that is less. So never below v, and above it by less than v / 32 where v is from
            2^-24 to 2^16, by at most 2^-24 where it is smaller.
        """
        assert self.histogram is not None, "observed without percentiles"
        assert 0 <= q <= 100, q
        rank = max(1, int(np.ceil(q / 100 * self.count)))
        # In the last bin rounding of q must not ask for more than there is.
        below = np.cumsum(self.histogram, axis=1, dtype=np.int64) < min(rank, self.count)
        position = np.count_nonzero(below, axis=1)
        end = ((position + _FIRST) << _DROPPED_BITS).astype(np.uint32).view(np.float32)
        return np.where(position == _BINS - 1, self.absmax, np.minimum(end, self.absmax))


class Observer:
    """Gathers `Statistics`.

    Sums run in float64, those of x x^T over blocks of 512 rows multiplied in float32. The same rows in the same order
    give the same bits, in whatever batches they come.

    Parameters
    ----------
    in_features : int
        K.
    hessian : bool
        Whether to gather the mean of x x^T, which takes 8 K^2 bytes and most of the time.
    percentiles : bool
        Whether to count magnitudes, which takes 5 KB a column.
    name : str
        What errors call the input.
    """

    def __init__(
        self, in_features: int, *, hessian: bool = True, percentiles: bool = True, name: str = "calibration input"
    ) -> None:
        self._name = name
        self._count = 0
        self._block = np.empty((_BLOCK, in_features), dtype=np.float32)
        self._filled = 0
        self._sums = _Sums(in_features, hessian, percentiles)
        self._drift: npt.NDArray[np.float64] | None = None

    def update(self, x: npt.NDArray[np.floating], original: npt.NDArray[np.floating] | None = None) -> None:
        """Take note of rows.

        Parameters
        ----------
        x : (M, K) float32
            Leading dimensions are flattened before: ``x.reshape(-1, K)``.
        original : (M, K) float32, optional
            What stands there in the float model; given for all rows or for none.

        Raises
        ------
        InputError
            If the shape is another one, or an element is NaN or above 1e17 in size.
        """
        columns = self._block.shape[1]
        if x.ndim != 2 or x.shape[1] != columns:
            raise InputError(self._name, f"shape {x.shape}, expected (rows, {columns})")
        within = np.abs(x) <= _LARGEST
        if not within.all():
            row, column = np.argwhere(~within)[0]
            wanted = f"finite values up to {_LARGEST:g}"
            problem = f"{x[row, column]:g} in row {self._count + row}, column {column}, expected {wanted}"
            raise InputError(
                self._name, problem, "check the calibration data, or leave the layers before this one float"
            )
        self._count += len(x)
        if original is not None:
            if self._drift is None:
                self._drift = np.zeros((columns, columns))
            self._drift += (original - x).T @ x
        start = 0
        while start < len(x):
            taken = min(_BLOCK - self._filled, len(x) - start)
            self._block[self._filled : self._filled + taken] = x[start : start + taken]
            self._filled += taken
            start += taken
            if self._filled == _BLOCK:
                self._sums.add(self._block)
                self._filled = 0

    def statistics(self) -> Statistics:
        """Compute what was seen so far; more may be added afterwards.

        Raises
        ------
        InputError
            If nothing was.
        """
        if not self._count:
            raise InputError(self._name, "no rows, expected at least one", "give more calibration data")
        drift = None if self._drift is None else (self._drift / self._count).astype(np.float32)
        return replace(self._sums.statistics(self._block[: self._filled], self._count), drift=drift)


class _Sums:
    """Sums over whole blocks."""

    def __init__(self, columns: int, hessian: bool, percentiles: bool) -> None:
        self.total = np.zeros(columns)
        self.squares = np.zeros(columns)
        self.absmax = np.zeros(columns, dtype=np.float32)
        self.products = np.zeros((columns, columns)) if hessian else None
        self.histogram = np.zeros((columns, _BINS), dtype=np.uint32) if percentiles else None

    def add(self, x: Floats) -> None:
        """Add a block."""
        self.total += x.sum(axis=0, dtype=np.float64)
        self.squares += _squares(x)
        np.maximum(self.absmax, np.abs(x).max(axis=0), out=self.absmax)
        if self.products is not None:
            self.products += x.T @ x
        if self.histogram is not None:
            np.add.at(self.histogram.reshape(-1), _bins(x), np.uint32(1))

    def statistics(self, x: Floats, count: int) -> Statistics:
        """Of the sums and one last block, which may be empty and is not added to them."""
        total = self.total + x.sum(axis=0, dtype=np.float64)
        squares = self.squares + _squares(x)
        absmax = np.maximum(self.absmax, np.abs(x).max(axis=0, initial=0.0))
        hessian = None if self.products is None else ((self.products + x.T @ x) / count).astype(np.float32)
        histogram = None if self.histogram is None else self.histogram.copy()
        if histogram is not None:
            np.add.at(histogram.reshape(-1), _bins(x), np.uint32(1))
        mean, square = ((each / count).astype(np.float32) for each in (total, squares))
        return Statistics(count, mean, absmax, square, hessian, histogram)


def _squares(x: Floats) -> npt.NDArray[np.float64]:
    return np.asarray(np.einsum("mk,mk->k", x, x, dtype=np.float64))


def _bins(x: Floats) -> npt.NDArray[np.intp]:
    """Where each element counts in the flattened histogram (K, B)."""
    bits = np.abs(x).view(np.uint32) >> np.uint32(_DROPPED_BITS)
    bins = np.clip(bits.astype(np.intp) - (_FIRST - 1), 0, _BINS - 1)
    return np.asarray((bins + _BINS * np.arange(x.shape[1])).reshape(-1))
