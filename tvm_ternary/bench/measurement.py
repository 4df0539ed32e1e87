"""One measured case, as numbers and as a line of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm_ternary.bench.timing import Spread

_PLAIN = ("n", "k", "m", "scheme", "cache", "threads", "target", "error", "bytes")


@dataclass(frozen=True)
class Measurement:
    """One of our schemes on one shape, M and state of the cache, beside the peers of the same turns.

    Attributes
    ----------
    n, k, m : int
    scheme : str
    cache : str
        ``warm``, or ``cold``: the weight comes from memory.
    threads : int
        Of every engine.
    target : str
        Of our kernels.
    time : Spread
        Microseconds from float32 to float32.
    error : float
        Relative, of the checked rows.
    bytes : int
        Weight, scales, activations and results.
    bandwidth : float
        Bytes a second that the machine reads with: warm a buffer of the weight's size, cold one far beyond the caches.
    peak : float
        Operations a second at most, in the kernel's arithmetic.
    peers : dict of str to Spread
    peer_bytes : dict of str to int
        As ``bytes``.
    left_out : dict of str to str
        Peers that cannot multiply by this matrix, and why.
    """

    n: int
    k: int
    m: int
    scheme: str
    cache: str
    threads: int
    target: str
    time: Spread
    error: float
    bytes: int
    bandwidth: float
    peak: float
    peers: dict[str, Spread] = field(default_factory=dict)
    peer_bytes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def operations(self) -> int:
        """2 M N K, however many planes the weight has."""
        return 2 * self.m * self.n * self.k

    @property
    def floor(self) -> float:
        """Microseconds that reading or computing takes at least."""
        return max(self.bytes / self.bandwidth, self.operations / self.peak) * 1e6

    @property
    def reached(self) -> float:
        """Floor over median: 1 is all that the machine can do."""
        return self.floor / self.time.median

    @property
    def best_peer(self) -> str | None:
        """The peer with the lowest median."""
        return min(self.peers, key=lambda name: self.peers[name].median, default=None)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each peer, by medians."""
        return {name: spread.median / self.time.median for name, spread in self.peers.items()}

    @property
    def ratio(self) -> float | None:
        """How many times faster than the best peer."""
        return None if self.best_peer is None else self.ratios[self.best_peer]

    def as_json(self) -> dict[str, Any]:
        """Numbers by name; times in microseconds, rates a second."""
        return {
            **{key: getattr(self, key) for key in (*_PLAIN, "best_peer", "peer_bytes", "left_out", "ratio", "ratios")},
            "us": vars(self.time),
            "peers_us": {name: vars(spread) for name, spread in self.peers.items()},
            "floor_us": self.floor,
            "floor_percent": 100 * self.reached,
            "gbs": self.bytes / self.time.median / 1e3,
            "gops": self.operations / self.time.median / 1e3,
            "bandwidth_gbs": self.bandwidth / 1e9,
            "peak_gops": self.peak / 1e9,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Measurement:
        """Read what `as_json` gives.

        Raises
        ------
        KeyError, TypeError
            If something is missing or of another type.
        """
        return cls(
            **{key: line[key] for key in _PLAIN},
            time=Spread(**line["us"]),
            bandwidth=line["bandwidth_gbs"] * 1e9,
            peak=line["peak_gops"] * 1e9,
            peers={name: Spread(**spread) for name, spread in line["peers_us"].items()},
            peer_bytes=dict(line["peer_bytes"]),
            left_out=dict(line["left_out"]),
        )
