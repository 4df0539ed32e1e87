"""Measurements of models as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from tvm_ternary.analysis.report import Table, format_bytes
from tvm_ternary.bench.model import ModelMeasurement


def ratio_table(measurements: Sequence[ModelMeasurement]) -> Table:
    """A row a measurement: ours, then a peer's milliseconds and how many times ours that is."""
    peers = list(dict.fromkeys(name for one in measurements for name in one.peers))
    columns = ["model", "sizes", "threads", "scheme", "ms", "p20", "p80", "error"]
    columns += [column for name in peers for column in (f"{name} ms", "ratio", "its error")]
    rows = tuple(_cells(one, peers) for one in measurements)
    return Table(tuple(columns), rows, frozenset(range(len(columns))) - {0, 1, 3})


def costs_table(measurements: Sequence[ModelMeasurement]) -> Table:
    """A row a library: what compiling took, the peak of its memory over the float model, and the first result.

    The first result is the slowest over the shapes and numbers of threads.
    """
    columns = ("model", "scheme", "compile s", "peak memory", "float model", "ratio", "library", "first result ms")
    first: dict[tuple[str, str, float], list[ModelMeasurement]] = {}
    for one in measurements:
        first.setdefault((one.model, one.scheme, one.costs.seconds), []).append(one)
    rows = []
    for (model, scheme, seconds), same in first.items():
        costs = same[0].costs
        sizes = (costs.peak_bytes - costs.base_bytes, costs.model_bytes)
        slowest = max(one.first_seconds for one in same)
        cells = (f"{seconds:.1f}", *map(format_bytes, sizes), f"{costs.memory_ratio:.1f}x")
        rows.append((model, scheme, *cells, format_bytes(costs.library_bytes), f"{1e3 * slowest:.0f}"))
    return Table(columns, tuple(rows), frozenset(range(2, len(columns))))


def _cells(one: ModelMeasurement, peers: Sequence[str]) -> tuple[str, ...]:
    sizes = " ".join(f"{name}={size}" for name, size in one.dims.items())
    spread = (f"{value / 1e3:.3f}" for value in (one.time.median, one.time.p20, one.time.p80))
    cells = [one.model, sizes, str(one.threads), one.scheme, *spread, "" if one.error is None else f"{one.error:.1e}"]
    for name in peers:
        there = name in one.peers
        cells += [f"{one.peers[name].median / 1e3:.3f}", f"{one.ratios[name]:.2f}x"] if there else ["", ""]
        cells += [f"{one.peer_errors[name]:.1e}"] if there else [""]
    return tuple(cells)
