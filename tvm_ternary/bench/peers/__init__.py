"""The others: engines that a user could take instead. A new peer is a function and a row in its library's table.

Every peer multiplies float32 by a ternary matrix with one scale a row, and gives float32. What a library does at most
once for a weight (packing it) is done before anything is timed.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm_ternary.bench.peers import bnn_lab, llama_cpp, onnxruntime, torch
from tvm_ternary.bench.peers.base import Installable, Peer
from tvm_ternary.errors import OptionError

PEERS: dict[str, Peer] = {**onnxruntime.PEERS, **torch.PEERS, **llama_cpp.PEERS, **bnn_lab.PEERS}
"""Name to peer, in the order of the columns."""


def choose_peers(text: str, table: Mapping[str, Installable] = PEERS) -> tuple[str, ...]:
    """Read ``auto`` (all that are here), ``none`` or names divided by commas, each a key of ``table``.

    Raises
    ------
    OptionError
        If a name is no peer's, or what it needs is not here.
    """
    if text == "none":
        return ()
    if text == "auto":
        return tuple(name for name, peer in table.items() if peer.missing() is None)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in table:
            raise OptionError(f"peer {name!r}", f"does not exist; expected auto, none or of {', '.join(table)}")
        missing = table[name].missing()
        if missing is not None:
            raise OptionError(f"peer {name!r}", missing, "install tvm-ternary[peers], or leave it out")
    return names


def absent_peers(table: Mapping[str, Installable] = PEERS) -> dict[str, str]:
    """Name to what is missing, of the peers that are not here."""
    found = {name: peer.missing() for name, peer in table.items()}
    return {name: missing for name, missing in found.items() if missing is not None}
