"""What the rows of a benchmark say together: geometric means over the shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tvm_ternary.analysis.report import Table
from tvm_ternary.bench.measurement import Measurement
from tvm_ternary.bench.timing import geometric_mean

Key = tuple[str, str, int]
"""Scheme, cache, M."""

# Column -> the peers whose best it is about.
_RIVALS: dict[str, tuple[str, ...]] = {
    "torch-int8": ("torch-int8",),
    "torch-fbgemm": ("torch-fbgemm",),
    "ort-int8": ("ort-int8",),
    "2-bit": ("ort-2bit", "llama-tq2_0"),
    "float32": ("ort-float32",),
    "bnn-lab": ("bnn-binary", "bnn-ternary"),
}


def mean_ratios(measurements: Iterable[Measurement], rivals: Sequence[str] | None = None) -> dict[Key, float]:
    """Geometric mean over the shapes of the ratio to the best peer of each row.

    Parameters
    ----------
    measurements : iterable of Measurement
    rivals : sequence of str, optional
        Peers to choose the best from; None: all. Rows without any of them do not count.
    """

    def ratio(one: Measurement) -> float | None:
        found = [value for name, value in one.ratios.items() if rivals is None or name in rivals]
        return min(found, default=None)

    return _means(measurements, ratio)


def means_table(measurements: Sequence[Measurement]) -> Table:
    """Means of the ratios to the best peer of each row, to the best of some of them, and of the floor reached.

    With several schemes, the first one is the yardstick of the others: what they cost, of its time.
    """
    rivals: dict[str, Sequence[str] | None] = {"best peer": None, **_RIVALS}
    ratios = {column: means for column, names in rivals.items() if (means := mean_ratios(measurements, names))}
    costs = mean_costs(measurements)
    reached = _means(measurements, lambda one: one.reached)
    base = measurements[0].scheme
    columns = (
        "scheme",
        "cache",
        "M",
        *(f"over {name}" for name in ratios),
        *((f"of {base}",) if costs else ()),
        "reached",
    )
    rows = tuple(
        (
            *(key[0], key[1], str(key[2])),
            *(_times(means.get(key)) for means in ratios.values()),
            *((_times(costs.get(key)),) if costs else ()),
            f"{100 * reached[key]:.0f}%",
        )
        for key in reached
    )
    return Table(columns, rows, frozenset(range(2, len(columns))))


def mean_costs(measurements: Sequence[Measurement]) -> dict[Key, float]:
    """Mean over the shapes of a scheme's time over that of the first scheme, which is left out itself."""
    base = measurements[0].scheme if measurements else None
    times = {(one.n, one.k, one.m, one.cache): one.time.median for one in measurements if one.scheme == base}

    def cost(one: Measurement) -> float | None:
        found = times.get((one.n, one.k, one.m, one.cache))
        return None if found is None or one.scheme == base else one.time.median / found

    return _means(measurements, cost)


def scaling_table(one_thread: Sequence[Measurement], several: Sequence[Measurement]) -> Table:
    """How many times faster several threads are than one: ours, and the best peer with several threads.

    Measurements of one thread that have no partner, or the other way round, do not count.
    """
    threads = several[0].threads if several else 0
    alone = {(one.n, one.k, one.m, one.cache, one.scheme): one for one in one_thread}
    pairs = [(alone.get((o.n, o.k, o.m, o.cache, o.scheme)), o) for o in several]
    own = {id(many): one.time.median / many.time.median for one, many in pairs if one is not None}
    others = {
        id(many): one.peers[many.best_peer].median / many.peers[many.best_peer].median
        for one, many in pairs
        if one is not None and many.best_peer is not None and many.best_peer in one.peers
    }
    ours = _means(several, lambda many: own.get(id(many)))
    peers = _means(several, lambda many: others.get(id(many)))
    rows = tuple((*key[:2], str(key[2]), _times(value), _times(peers.get(key))) for key, value in ours.items())
    return Table(("scheme", "cache", "M", f"{threads} threads", "best peer's"), rows, frozenset({2, 3, 4}))


def _means(measurements: Iterable[Measurement], value: Callable[[Measurement], float | None]) -> dict[Key, float]:
    values: dict[Key, list[float]] = {}
    for one in measurements:
        found = value(one)
        if found is not None:
            values.setdefault((one.scheme, one.cache, one.m), []).append(found)
    return {key: geometric_mean(several) for key, several in values.items()}


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
