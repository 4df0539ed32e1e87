"""Measurements as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm_ternary.analysis.report import Table
from tvm_ternary.bench.matmul import Measurement, mean_ratios

_COLUMNS = ("N x K", "M", "cache", "scheme", "us", "p20", "p80", "GB/s", "Gop/s", "floor us", "reached")


def machine_table(facts: Mapping[str, Any], threads: int, target: str) -> Table:
    """What was measured on, a fact a row."""
    caches = ", ".join(f"L{level} {size // 1024} KiB" for level, size in facts["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rows = [("cpu", facts["cpu"]), ("caches", caches or "not known"), ("threads", str(threads)), ("target", target)]
    rows += [("versions", versions), ("commit", facts["commit"] or "not a checkout")]
    return Table(("", ""), tuple(rows))


def matmul_table(measurements: Sequence[Measurement]) -> Table:
    """A row a measurement; peers as median us, a column each, then the ratio to the best of them."""
    peers = list(dict.fromkeys(name for one in measurements for name in one.peers))
    columns = (*_COLUMNS, *peers, *(("ratio",) if peers else ()))
    rows = tuple(_cells(one, peers) for one in measurements)
    return Table(columns, rows, frozenset(range(len(columns))) - {0, 2, 3})


def means_table(measurements: Sequence[Measurement]) -> Table:
    """Geometric means over the shapes of the ratio to the best peer of each row."""
    means = mean_ratios(measurements)
    rows = tuple((scheme, cache, str(m), f"{mean:.2f}x") for (scheme, cache, m), mean in means.items())
    return Table(("scheme", "cache", "M", "geometric mean"), rows, frozenset({2, 3}))


def _cells(one: Measurement, peers: Sequence[str]) -> tuple[str, ...]:
    spread = one.time
    return (
        f"{one.n} x {one.k}",
        str(one.m),
        one.cache,
        one.scheme,
        *(f"{value:.1f}" for value in (spread.median, spread.p20, spread.p80)),
        f"{one.bytes / spread.median / 1e3:.1f}",
        f"{one.operations / spread.median / 1e3:.0f}",
        f"{one.floor:.1f}",
        f"{100 * one.floor / spread.median:.0f}%",
        *(f"{one.peers[name].median:.1f}" for name in peers),
        *(() if one.ratio is None else (f"{one.ratio:.2f}x",)),
    )
