"""Peers that may not be installed."""

from __future__ import annotations

import pytest

from tvm_ternary.bench.peers import PEERS
from tvm_ternary.bench.peers.base import Peer


def present(name: str) -> Peer:
    """The peer of that name; skips the test, with the reason, where something is missing."""
    missing = PEERS[name].missing()
    if missing is not None:
        pytest.skip(f"{name} {missing}")
    return PEERS[name]
