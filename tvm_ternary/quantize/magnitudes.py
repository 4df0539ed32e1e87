"""Groups of weights in the order of magnitude, with prefix sums: what levels make of them, without touching each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tvm_ternary.quantize.levels import Floats, combinations

Doubles = npt.NDArray[np.float64]


@lru_cache
def half_combinations(planes: int) -> npt.NDArray[np.int8]:
    """Zeros, and of each pair of opposite combinations of P trits one: (C, P) int8."""
    table = combinations(planes)
    return np.ascontiguousarray(table[len(table) // 2 :])


@dataclass(frozen=True, eq=False)
class Moments:
    """The error of groups as a function of scales s, for trits fixed: s G s - 2 s t + c.

    Parameters
    ----------
    gram : (R, P, P) float64
        G, the sum of importance * t_p t_q.
    target : (R, P) float64
        t, the sum of importance * t_p w.
    square : (R,) float64
        c, the sum of importance * w^2.
    """

    gram: Doubles
    target: Doubles
    square: Doubles

    def error(self, scale: Doubles) -> Doubles:
        """Sum of importance * (w - s t)^2 of each group, at scales (R, P)."""
        half = np.einsum("rpq,rq->rp", self.gram, scale) - 2 * self.target
        return np.asarray(np.maximum(np.einsum("rp,rp->r", scale, half) + self.square, 0.0))

    def take(self, rows: npt.NDArray[np.bool_]) -> Moments:
        """Those of some groups."""
        return Moments(self.gram[rows], self.target[rows], self.square[rows])


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Groups (R, L), sorted.

    Parameters
    ----------
    order : (R, L) int
        Positions in ascending magnitude.
    negative : (R, L) bool
        Signs, in the groups' own order.
    sorted : (R, L) float32
        Magnitudes, ascending.
    weights, sums : (R, L + 1) float64
        Importance, and importance * magnitude, of the k smallest.
    square : (R,) float64
        Sum of importance * w^2.
    largest : (R,) float64
        The largest magnitude that has any importance, else 0.
    """

    order: npt.NDArray[np.intp]
    negative: npt.NDArray[np.bool_]
    sorted: Floats
    weights: Doubles
    sums: Doubles
    square: Doubles
    largest: Doubles

    @classmethod
    def of(cls, groups: Floats, importance: Floats | None = None) -> Magnitudes:
        """Sort groups; ``importance`` is (L,) or (R, L), 1 if left out."""
        magnitude = np.abs(groups)
        order = np.argsort(magnitude, axis=1, kind="stable")
        ascending = np.take_along_axis(magnitude, order, axis=1)
        weight = np.ones(ascending.shape)
        if importance is not None:
            weight = np.take_along_axis(np.broadcast_to(importance, groups.shape), order, axis=1).astype(np.float64)
        sums = weight * ascending
        square = np.einsum("rl,rl->r", sums, ascending, dtype=np.float64)
        largest = (ascending * (weight > 0)).max(axis=1, initial=0.0).astype(np.float64)
        return cls(order, groups < 0, ascending, _prefix(weight), _prefix(sums), square, largest)

    def moments(self, scale: Doubles, rows: npt.NDArray[np.intp] | None = None) -> Moments:
        """Give each weight its nearest level and sum up.

        Parameters
        ----------
        scale : (R, P) float64
            Of all groups, or of those in ``rows``.
        rows : (R,) int, optional
        """
        rows = np.arange(len(scale)) if rows is None else rows
        half, which, sign, ends = self._levels(scale, rows)
        ends = np.concatenate(
            [np.zeros((len(rows), 1), np.intp), ends, np.full((len(rows), 1), self.sorted.shape[1])], 1
        )
        count = np.diff(self.weights[rows[:, None], ends], axis=1)
        total = np.diff(self.sums[rows[:, None], ends], axis=1) * sign
        # Back in the order of the combinations, whose products are the same in all groups.
        counts, totals = np.empty_like(count), np.empty_like(total)
        np.put_along_axis(counts, which, count, axis=1)
        np.put_along_axis(totals, which, total, axis=1)
        planes = scale.shape[1]
        products = (half[:, :, None] * half[:, None, :]).reshape(len(half), -1)
        return Moments((counts @ products).reshape(-1, planes, planes), totals @ half, self.square[rows])

    def best_multiple(self, levels: Doubles, scale: Doubles) -> tuple[Doubles, Doubles]:
        """Give each weight the nearest of fixed levels times a scale, and move the scale to the best one for that.

        Parameters
        ----------
        levels : (C,) float64
            Ascending from 0.
        scale : (R,) float64

        Returns
        -------
        scale : (R,) float64
            sum(d |w| q) / sum(d q^2), with q the level of each weight and d its importance; 0 if all levels are.
        gain : (R,) float64
            By how much that lowers the error below sum(d w^2).
        """
        rows = np.arange(len(scale))
        count, total = self._between(self._below(scale[:, None] * ((levels[1:] + levels[:-1]) / 2), rows), rows)
        product, square = total @ levels, count @ (levels * levels)
        moved = product / np.where(square > 0, square, 1.0)
        return moved, moved * product

    def trits(self, scale: Doubles) -> npt.NDArray[np.int8]:
        """The trits of each weight's nearest level: (P, R, L) int8, for scales (R, P)."""
        groups, length = self.sorted.shape
        rows = np.arange(groups)
        _, which, sign, ends = self._levels(scale, rows)
        level = np.zeros((groups, length + 1), dtype=np.uint8)
        np.add.at(level, (rows[:, None], ends), np.uint8(1))
        level = np.cumsum(level[:, :length], axis=1, dtype=np.uint8)
        table = half_combinations(scale.shape[1])[which] * sign[:, :, None].astype(np.int8)
        found = np.empty((scale.shape[1], groups, length), dtype=np.int8)
        for p, plane in enumerate(found):
            np.put_along_axis(plane, self.order, np.take_along_axis(table[:, :, p], level, axis=1), axis=1)
        np.negative(found, out=found, where=self.negative)
        return found

    def _levels(
        self, scale: Doubles, rows: npt.NDArray[np.intp]
    ) -> tuple[Doubles, npt.NDArray[np.intp], Doubles, npt.NDArray[np.intp]]:
        """Half of the combinations (C, P); by the size of their level which, their sign, and where all but one end."""
        half = half_combinations(scale.shape[1]).astype(np.float64)
        value = scale @ half.T
        which = np.argsort(np.abs(value), axis=1, kind="stable")
        value = np.take_along_axis(value, which, axis=1)
        sign, size = np.where(value < 0, -1.0, 1.0), np.abs(value)
        return half, which, sign, self._below((size[:, 1:] + size[:, :-1]) / 2, rows)

    def _between(self, ends: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> tuple[Doubles, Doubles]:
        """Importance, and importance * magnitude, of what lies before the first end, up to the next, ..., the rest."""
        column = rows[:, None]
        weights, sums = self.weights[column, ends], self.sums[column, ends]
        low, high = self.weights[rows, :1], self.weights[rows, -1:]
        counts = np.diff(weights, axis=1, prepend=low, append=high)
        return counts, np.diff(sums, axis=1, prepend=self.sums[rows, :1], append=self.sums[rows, -1:])

    def _below(self, bound: Doubles, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """How many magnitudes of a group lie below each bound (R, B): a binary search of all at once."""
        length = self.sorted.shape[1]
        flat, offset = self.sorted.reshape(-1), rows[:, None] * length - 1
        found = np.zeros(bound.shape, dtype=np.intp)
        step = 1 << length.bit_length() >> 1
        while step:
            further = found + step
            inside = further <= length
            value = flat[offset + np.minimum(further, length)]
            found += step * (inside & (value < bound))
            step >>= 1
        return found


def _prefix(x: Doubles) -> Doubles:
    """Sums of the first k, k from 0."""
    return np.concatenate([np.zeros((len(x), 1)), np.cumsum(x, axis=1)], axis=1)
