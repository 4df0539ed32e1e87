"""Mixed precision: for each matrix one of several candidates, the least error for a number of bits or the reverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError

Doubles = npt.NDArray[np.float64]

# Partial choices that are kept: far more than are needed where the bound prunes, which is nearly always.
_STATES = 50_000


@dataclass(frozen=True)
class Candidate:
    """What a matrix may become.

    Attributes
    ----------
    label : str
        A scheme's name, or ``float``.
    bits : float
        Of the whole matrix, scales counted.
    error : float
        What it adds to the sum that is made small, at least 0: for example its squared output error.
    """

    label: str
    bits: float
    error: float

    def times(self, weight: float) -> Candidate:
        """The same, its error multiplied."""
        return replace(self, error=self.error * weight)


@dataclass(frozen=True)
class Decision:
    """What a matrix becomes, and why, in one line."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Mixture:
    """A choice for all matrices.

    Attributes
    ----------
    decisions : dict of str to Decision
        In the order of the candidates given.
    bound : float
        No choice within the budget has an error below this.
    exact : bool
        Whether this one is known to be the best: it is, unless ever more than 50,000 partial choices were in the run.
    """

    decisions: dict[str, Decision]
    bound: float
    exact: bool

    @property
    def bits(self) -> float:
        """Of all matrices."""
        return sum(decision.candidate.bits for decision in self.decisions.values())

    @property
    def error(self) -> float:
        """The sum over all matrices."""
        return sum(decision.candidate.error for decision in self.decisions.values())


def within_error(candidates: Mapping[str, Sequence[Candidate]], limit: float) -> dict[str, Decision | None]:
    """Choose for each matrix the fewest bits whose error is at most ``limit``.

    Parameters
    ----------
    candidates : mapping of str to sequence of Candidate
    limit : float
        For each matrix by itself.

    Returns
    -------
    dict of str to Decision or None
        None where no candidate reaches the limit: such a matrix stays float.
    """
    chosen: dict[str, Decision | None] = {}
    for name, options in candidates.items():
        front = _front(options)
        best = next((i for i, one in enumerate(front) if one.error <= limit), None)
        if best is None:
            chosen[name] = None
            continue
        cheaper = f"; {front[best - 1].label} has {front[best - 1].error:.3g}" if best else "; nothing takes fewer bits"
        chosen[name] = Decision(front[best], f"error {front[best].error:.3g} of at most {limit:.3g}{cheaper}")
    return chosen


def within_bits(candidates: Mapping[str, Sequence[Candidate]], budget: float) -> Mixture:
    """Choose for each matrix one candidate, so that all together take at most ``budget`` bits with the least error.

    This is the multiple-choice knapsack problem. Its linear relaxation, solved by the convex hull of each matrix's
    candidates, gives a bound and a first choice; partial choices are then extended matrix by matrix, without those that
    another beats in bits and error, and without those whose bound is above the first choice.

    Parameters
    ----------
    candidates : mapping of str to sequence of Candidate
        At least one for each matrix.
    budget : float
        Bits.

    Returns
    -------
    Mixture
        The same for the same candidates in the same order.

    Raises
    ------
    OptionError
        If even the cheapest candidates take more.

    References
    ----------
    Kellerer, Pferschy and Pisinger, "Knapsack Problems", Springer 2004, chapter 11: section 11.2 for the relaxation,
    11.5 for dynamic programming with it as the bound.
    """
    fronts = {name: _front(options) for name, options in candidates.items()}
    least = sum(front[0].bits for front in fronts.values())
    if least > budget:
        problem = f"{budget:,.0f} bits, but the smallest candidates of all matrices take {least:,.0f}"
        raise OptionError("bit budget", problem, "raise it, or leave more layers out")
    listed = list(fronts.values())
    bounds = [_Relaxation(listed[i:]) for i in range(len(listed) + 1)]
    picks, exact = _search(listed, bounds, _round_down(listed, budget), budget)
    decisions = {
        name: Decision(front[pick], _reason(front, pick))
        for (name, front), pick in zip(fronts.items(), picks, strict=True)
    }
    return Mixture(decisions, float(bounds[0].error(np.array([budget]))[0]), exact)


def _front(options: Sequence[Candidate]) -> list[Candidate]:
    """Candidates in ascending bits and falling error, without those that another one beats."""
    front: list[Candidate] = []
    for one in sorted(options, key=lambda candidate: (candidate.bits, candidate.error)):
        if not front or one.error < front[-1].error:
            front.append(one)
    return front


def _steps(front: Sequence[Candidate]) -> list[tuple[float, int, int]]:
    """Edges of the lower convex hull, from cheap to dear: (error saved for each bit, from, to)."""
    steps: list[tuple[float, int, int]] = []
    for end in range(1, len(front)):
        start = end - 1
        rate = (front[start].error - front[end].error) / (front[end].bits - front[start].bits)
        while steps and steps[-1][0] <= rate:
            start = steps.pop()[1]
            rate = (front[start].error - front[end].error) / (front[end].bits - front[start].bits)
        steps.append((rate, start, end))
    return steps


class _Relaxation:
    """The least error of matrices whose candidates may be mixed, as a function of bits: piecewise linear, convex."""

    def __init__(self, fronts: Sequence[Sequence[Candidate]]) -> None:
        steps = [(rate, front[a], front[b]) for front in fronts for rate, a, b in _steps(front)]
        steps.sort(key=lambda step: -step[0])
        self.least = sum(front[0].bits for front in fronts)
        spent = [b.bits - a.bits for _, a, b in steps]
        saved = [a.error - b.error for _, a, b in steps]
        self._bits = self.least + np.concatenate([[0.0], np.cumsum(spent)])
        self._error = sum(front[0].error for front in fronts) - np.concatenate([[0.0], np.cumsum(saved)])

    def error(self, bits: Doubles) -> Doubles:
        """At least what any choice with so many bits has; infinite where there is none."""
        return np.where(bits < self.least, np.inf, np.interp(bits, self._bits, self._error))


def _round_down(fronts: Sequence[Sequence[Candidate]], budget: float) -> list[int]:
    """The relaxation's solution without its one fraction, the bits left over spent on later steps where they fit."""
    picks = [0] * len(fronts)
    left = budget - sum(front[0].bits for front in fronts)
    steps = [(-rate, i, a, b) for i, front in enumerate(fronts) for rate, a, b in _steps(front)]
    for _, i, a, b in sorted(steps):
        cost = fronts[i][b].bits - fronts[i][a].bits
        if picks[i] == a and cost <= left:
            picks[i], left = b, left - cost
    return picks


def _search(
    fronts: Sequence[Sequence[Candidate]], bounds: Sequence[_Relaxation], first: list[int], budget: float
) -> tuple[list[int], bool]:
    """The best picks, and whether no partial choice had to be dropped for their number."""
    limit = sum(front[pick].error for front, pick in zip(fronts, first, strict=True))
    # Sums in another order may differ by rounding; the first choice itself must survive.
    limit += 1e-12 * sum(front[0].error for front in fronts)
    bits, error, exact = np.zeros(1), np.zeros(1), True
    trail: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for front, rest in zip(fronts, bounds[1:], strict=True):
        more = np.array([[one.bits, one.error] for one in front])
        new_bits = (bits[:, None] + more[:, 0]).reshape(-1)
        new_error = (error[:, None] + more[:, 1]).reshape(-1)
        keep = np.flatnonzero(new_error + rest.error(budget - new_bits) <= limit)
        keep = keep[np.lexsort((new_error[keep], new_bits[keep]))]
        lowest = np.minimum.accumulate(np.concatenate([[np.inf], new_error[keep]]))
        keep = keep[new_error[keep] < lowest[:-1]]
        if len(keep) > _STATES:
            exact, keep = False, keep[np.unique(np.linspace(0, len(keep) - 1, _STATES).astype(np.intp))]
        if not len(keep):
            return first, exact
        bits, error = new_bits[keep], new_error[keep]
        trail.append((keep // len(front), keep % len(front)))
    picks, state = [], int(error.argmin())
    for parent, pick in reversed(trail):
        picks.append(int(pick[state]))
        state = int(parent[state])
    picks.reverse()
    return picks, exact


def _reason(front: Sequence[Candidate], pick: int) -> str:
    """What the neighbours of a choice would have brought."""
    chosen = front[pick]
    parts = [f"error {chosen.error:.3g}"]
    if pick:
        cheaper = front[pick - 1]
        share = 1 - cheaper.bits / chosen.bits
        parts.append(f"{cheaper.label} would have {cheaper.error:.3g} with {share:.0%} fewer bits")
    if pick + 1 < len(front):
        better = front[pick + 1]
        parts.append(f"{better.label} {better.error:.3g} with {better.bits / chosen.bits - 1:.0%} more")
    return "; ".join(parts) if len(parts) > 1 else f"{parts[0]}; there is no other candidate"
