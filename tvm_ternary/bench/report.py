"""Measurements as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm_ternary.analysis.report import Table
from tvm_ternary.bench.measurement import Measurement
from tvm_ternary.bench.roofline import Limits

_COLUMNS = ("N x K", "M", "cache", "scheme", "us", "p20", "p80", "GB/s", "Gop/s", "floor us", "reached")


def machine_table(facts: Mapping[str, Any], threads: int, target: str, absent: Mapping[str, str]) -> Table:
    """What was measured on, a fact a row, and which peers are not there."""
    caches = ", ".join(f"L{level} {size // 1024} KiB" for level, size in facts["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rows = [("cpu", facts["cpu"]), ("caches", caches or "not known"), ("threads", str(threads)), ("target", target)]
    rows += [("load before", f"{facts['load']:.1f}"), ("versions", versions)]
    rows += [("commit", facts["commit"] or "not a checkout")]
    rows += [("llama.cpp of", folder)] if (folder := facts.get("llama_cpp")) else []
    rows += [(f"no {name}", missing) for name, missing in absent.items()]
    return Table(("", ""), tuple(rows))


def limits_table(limits: Limits) -> Table:
    """The roofline: how fast each level is read, and how many operations of each kind are done at most."""
    rows = [(f"read {name}", f"{value / 1e9:.0f}", "GB/s") for name, value in limits.bandwidths.items()]
    rows += [(f"multiply {name}", f"{value / 1e9:.0f}", "Gop/s") for name, value in limits.peaks.items()]
    return Table(("limit", "at most", ""), tuple(rows), frozenset({1}))


def matmul_table(measurements: Sequence[Measurement]) -> Table:
    """A row a measurement; peers as median us, a column each, then the ratio to the best of them."""
    peers = list(dict.fromkeys(name for one in measurements for name in one.peers))
    columns = (*_COLUMNS, *peers, *(("ratio",) if peers else ()))
    rows = tuple(_cells(one, peers) for one in measurements)
    return Table(columns, rows, frozenset(range(len(columns))) - {0, 2, 3})


def left_out_table(measurements: Sequence[Measurement]) -> Table | None:
    """Which peers could not multiply by which matrix, and why; None if all could."""
    found = {(name, one.n, one.k): why for one in measurements for name, why in one.left_out.items()}
    rows = tuple((name, f"{n} x {k}", why) for (name, n, k), why in found.items())
    return Table(("left out", "N x K", "because it"), rows) if rows else None


def markdown(table: Table) -> str:
    """A table as Markdown."""
    rules = ["---:" if position in table.numeric else "---" for position in range(len(table.columns))]
    lines = [table.columns, rules, *table.rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in lines)


def _cells(one: Measurement, peers: Sequence[str]) -> tuple[str, ...]:
    spread = one.time
    ratio = () if not peers else ("",) if one.ratio is None else (f"{one.ratio:.2f}x",)
    return (
        f"{one.n} x {one.k}",
        str(one.m),
        one.cache,
        one.scheme,
        *(f"{value:.1f}" for value in (spread.median, spread.p20, spread.p80)),
        f"{one.bytes / spread.median / 1e3:.1f}",
        f"{one.operations / spread.median / 1e3:.0f}",
        f"{one.floor:.1f}",
        f"{100 * one.reached:.0f}%",
        *(f"{one.peers[name].median:.1f}" if name in one.peers else "" for name in peers),
        *ratio,
    )
