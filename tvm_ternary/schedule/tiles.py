"""Tile choices as data: ``schedules/<tier>/<kernel>.toml``, which a person can read and edit.

A file lists variants in ascending order of ``max_rows``; the last has none and serves every larger M::

    [[variant]]
    max_rows = 1     # serves M <= 1
    rows = 1         # rows of activations in a tile
    blocks = 4       # blocks of 16 out_features in a tile

A tier without a file of its own takes the one of ``portable``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tvm_ternary.errors import OptionError
from tvm_ternary.kernels.shape import Tile, Variant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (PACKAGE / "_schedules", PACKAGE.parent / "schedules")  # inside a wheel; in a source tree


@dataclass(frozen=True)
class TileTable:
    """The variants of one kernel on one tier, and where they were read: ``<tier>/<kernel>.toml``."""

    variants: tuple[Variant, ...]
    source: str


@cache
def load_tiles(kernel: str, tier: str) -> TileTable:
    """Read the tiles of ``kernel`` for ``tier``.

    Raises
    ------
    OptionError
        If the file is missing, not TOML, or lists variants that do not cover every M in ascending order.
    """
    root = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    paths = [root / name / f"{kernel}.toml" for name in (tier, "portable")]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise OptionError(
            str(paths[0]), "no such schedule file, nor one for the portable tier", "reinstall tvm-ternary"
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(str(path), f"not valid TOML: {error}") from error
    return TileTable(_variants(path, table), f"{path.parent.name}/{path.name}")


def _variants(path: Path, table: dict[str, Any]) -> tuple[Variant, ...]:
    expected = "expected [[variant]] tables with rows, blocks and, in all but the last, an ascending max_rows"
    rows = table.get("variant")
    if set(table) != {"variant"} or not isinstance(rows, list) or not rows:
        raise OptionError(str(path), f"got keys {sorted(table)}; {expected}")
    variants = []
    for index, row in enumerate(rows):
        last = index == len(rows) - 1
        keys = {"rows", "blocks"} if last else {"rows", "blocks", "max_rows"}
        if not isinstance(row, dict) or set(row) != keys or not all(type(v) is int and v > 0 for v in row.values()):
            raise OptionError(str(path), f"variant {index} is {row}; {expected}")
        variants.append(Variant(Tile(row["rows"], row["blocks"]), row.get("max_rows")))
    limits = [v.max_rows for v in variants[:-1] if v.max_rows is not None]
    if limits != sorted(set(limits)):
        raise OptionError(str(path), f"max_rows are {limits}; {expected}")
    return tuple(variants)
