"""Measurements that nobody measured."""

from __future__ import annotations

from tvm_ternary.bench.measurement import Measurement
from tvm_ternary.bench.timing import Spread


def spread(median: float) -> Spread:
    return Spread(median, median - 0.5, median + 0.5)


ONE = Measurement(
    n=100,
    k=50,
    m=2,
    scheme="t1a8",
    cache="warm",
    threads=1,
    target="avx2",
    time=Spread(4.0, 3.0, 5.0),
    error=0.001,
    bytes=1000,
    bandwidth=1e9,
    peak=10e9,
    peers={"slow": spread(9.0), "fast": spread(6.0)},
    peer_bytes={"slow": 2000, "fast": 4000},
)
"""20,000 operations; a floor of 2 us."""

FACTS = {
    "cpu": "Fast CPU",
    "caches": {"1": 49152},
    "load": 0.25,
    "system": "Linux",
    "python": "3.11",
    "versions": {"numpy": "2"},
    "commit": None,
}
