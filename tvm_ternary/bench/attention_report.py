"""Measurements of attention as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from tvm_ternary.analysis.report import Table
from tvm_ternary.bench.attention import AttentionMeasurement
from tvm_ternary.bench.attention_peers import ATTENTION_PEERS

_COLUMNS = (
    *("heads", "kind", "tokens", "threads", "cache", "ms", "p20", "p80"),
    *("GB/s", "Gop/s", "reached", "error", "loss", "B/token"),
)
_WORDS = {0, 1, 4}


def attention_table(measurements: Sequence[AttentionMeasurement]) -> Table:
    """A row a measurement: ours, then a peer's milliseconds and how many times ours that is."""
    peers = [name for name in ATTENTION_PEERS if any(name in one.peers for one in measurements)]
    columns = [*_COLUMNS, *(column for name in peers for column in (f"{name} ms", "ratio"))]
    rows = tuple(_cells(one, peers) for one in measurements)
    return Table(tuple(columns), rows, frozenset(range(len(columns))) - _WORDS)


def refusals_table(measurements: Sequence[AttentionMeasurement]) -> Table | None:
    """Which peers could not compute what, and why; None if all could."""
    found = {
        (name, str(one.case.shape), one.case.kind, why): None
        for one in measurements
        for name, why in one.left_out.items()
    }
    return Table(("left out", "heads", "of a", "because it"), tuple(found)) if found else None


def _cells(one: AttentionMeasurement, peers: Sequence[str]) -> tuple[str, ...]:
    spread, case = one.time, one.case
    cells = [str(case.shape), case.kind, str(case.keys), str(one.threads), str(one.scheme)]
    cells += [f"{value / 1e3:.3f}" for value in (spread.median, spread.p20, spread.p80)]
    cells += [f"{one.bytes / spread.median / 1e3:.1f}", f"{case.operations / spread.median / 1e3:.1f}"]
    cells += [f"{100 * one.reached:.0f}%", f"{one.error:.1e}", f"{one.loss:.1e}" if one.loss else ""]
    cells.append(f"{one.token_bytes:.0f}")
    for name in peers:
        there = name in one.peers
        cells += [f"{one.peers[name].median / 1e3:.3f}", f"{one.ratios[name]:.2f}x"] if there else ["", ""]
    return tuple(cells)
