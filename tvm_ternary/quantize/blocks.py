"""Where in a model a matrix stands: in the first or last of its equal blocks, behind them, or between.

Read off the names: exporters and checkpoints number the blocks (``encoder.layer.0.attention...``, ``h.3.mlp...``,
``layers.12...``), and list matrices in the order of their use.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

FIRST, LAST, ONLY, OUTPUT = "the first block", "the last block", "the only block", "the output layer"


def block_of(name: str) -> tuple[str, int] | None:
    """The block that a name tells: what stands before its first component that is a whole number, and the number."""
    parts = name.split(".")
    position = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    return None if position is None else (".".join(parts[:position]), int(parts[position]))


def blocks_of(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The block of each name that tells one.

    Components that all names share tell nothing (``model.0.auto_model.encoder.layer.1...``), unless there is no other
    number: then all names are of one block.
    """
    ordered = [name for name in names if block_of(name) is not None]
    parts = [name.split(".") for name in ordered]
    shared = ".".join(first[0] for first in _leading(parts))
    inner = {name: block_of(name[len(shared) :].removeprefix(".")) for name in ordered}
    outer = f"{shared}." if shared else ""
    found = {name: (f"{outer}{block[0]}".rstrip("."), block[1]) for name, block in inner.items() if block is not None}
    return found or {name: block for name in ordered if (block := block_of(name)) is not None}


def _leading(parts: list[list[str]]) -> list[tuple[str, ...]]:
    """The first components, as long as they are the same in all names."""
    return list(takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def find_places(names: Iterable[str]) -> dict[str, str]:
    """Tell of each matrix that stands at an edge where it stands.

    Parameters
    ----------
    names : iterable of str
        All matrices of a model, in the order of their use.

    Returns
    -------
    dict of str to str
        `FIRST`, `LAST` or `ONLY` for the matrices of those blocks, `OUTPUT` for those behind the last block: heads,
        poolers. Where nothing is numbered there are no blocks, and the last of several matrices is the output. Names
        that are missing stand in between.
    """
    ordered = list(names)
    of = blocks_of(ordered)
    if not of:
        return dict.fromkeys(ordered[-1:], OUTPUT) if len(ordered) > 1 else {}
    blocks = list(dict.fromkeys(of.values()))
    first, last = (FIRST, LAST) if len(blocks) > 1 else (ONLY, ONLY)
    end = max(position for position, name in enumerate(ordered) if name in of)
    places = dict.fromkeys(ordered[end + 1 :], OUTPUT)
    places |= {name: last for name, block in of.items() if block == blocks[-1]}
    return places | {name: first for name, block in of.items() if block == blocks[0]}
