"""What a peer is, and what it is built for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.engines import Engine, Floats
from tvm_ternary.kernels.table import KERNELS


@dataclass(frozen=True)
class Problem:
    """A ternary matrix with one scale a row, which every peer represents without loss.

    Attributes
    ----------
    trits : (N, K) int8
    scale : (N,) float32
        w[n, k] = scale[n] * trits[n, k]; no more than eight significant bits, so that float16 and bfloat16 hold it.
    threads : int
    cache : int
        Bytes that the copies of the weight exceed together; 0 for one copy.
    """

    trits: npt.NDArray[np.int8]
    scale: Floats
    threads: int
    cache: int

    @classmethod
    def random(cls, n: int, k: int, threads: int, cache: int, seed: int = 1) -> Problem:
        """A third of the trits zero; scales from 0.5 to 1.5 that differ."""
        rng = np.random.default_rng(seed)
        trits = rng.integers(-1, 2, (n, k), dtype=np.int8)
        return cls(trits, (rng.integers(64, 192, n) / 128).astype(np.float32), threads, cache)

    @cached_property
    def dense(self) -> Floats:
        """w, (N, K)."""
        return self.trits * self.scale[:, None]


def fits_any(n: int, k: int) -> str | None:
    """No shape is refused."""
    return None


class Installable(Protocol):
    """What may not be here; ``missing`` as for `Peer`."""

    @property
    def missing(self) -> Callable[[], str | None]: ...


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Attributes
    ----------
    make : callable
        (its name, Problem) -> Engine. Called on the thread that will call the engine: OpenMP keeps the number of
        threads by the thread that asks for them.
    missing : callable
        -> what this host lacks for it, such as ``needs the package torch``; None if nothing.
    refuses : callable
        (N, K) -> why it cannot multiply by such a matrix, None if it can.
    activation_bits : frozenset of int
        Of the schemes that it is compared with.
    """

    make: Callable[[str, Problem], Engine]
    missing: Callable[[], str | None]
    refuses: Callable[[int, int], str | None] = fits_any
    activation_bits: frozenset[int] = frozenset(KERNELS)


def needs(package: str) -> Callable[[], str | None]:
    """A value for `Peer.missing`: whether a module can be imported, without importing it."""
    return partial(_absent, package)


def _absent(package: str) -> str | None:
    return None if find_spec(package) is not None else f"needs the package {package}"
