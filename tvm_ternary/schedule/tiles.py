"""Tile choices as data: ``schedules/<tier>/<kernel>.toml``, which a person can read and edit.

A file lists variants in ascending order of ``max_rows``; the last has none and serves every larger M::

    [[variant]]
    max_rows = 1     # serves M <= 1
    rows = 1         # rows of activations in a tile
    blocks = 4       # blocks of 16 out_features in a tile
    panel = false    # whether weights are decoded once for all rows (see `kernels.shape.Variant`); false if left out
    tiles = false    # whether AMX multiplies by the panel; false if left out

perhaps ``[[stacked]]`` tables, which take the place of these where there are several planes, and what tuning may try
instead, whole numbers::

    [space]
    rows = [1, 2, 4]
    blocks = [1, 2, 3]
    panel = [0, 1]    # 2: by AMX tiles
    threads = [0, 1]  # 0 spreads tiles of out_features over threads, 1 chunks of rows, 2 nothing

A tier without a file of its own takes the one of ``portable``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
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
DECISIONS = {"rows": 1, "blocks": 1, "panel": 0, "threads": 0}
"""What tuning decides, and the least value of each."""

_FLAGS = ("panel", "tiles")
_FOLDERS = (PACKAGE / "_schedules", PACKAGE.parent / "schedules")  # inside a wheel; in a source tree


@dataclass(frozen=True)
class TileTable:
    """The variants of one kernel on one tier, what tuning may try, and the file: ``<tier>/<kernel>.toml``."""

    variants: tuple[Variant, ...]
    stacked: tuple[Variant, ...]
    source: str
    space: Mapping[str, tuple[int, ...]] = field(hash=False)

    def of(self, planes: int) -> tuple[Variant, ...]:
        """The variants for that many planes."""
        return self.stacked if planes > 1 else self.variants


@cache
def load_tiles(kernel: str, tier: str) -> TileTable:
    """Read the tiles of ``kernel`` for ``tier``.

    Raises
    ------
    OptionError
        If the file is missing, not TOML, or lists variants that do not cover every M in ascending order.
    """
    path, table = read_schedule(kernel, tier, "portable")
    space, stacked = table.pop("space", {}), table.pop("stacked", None)
    variants = _variants(path, table)
    several = _variants(path, {"variant": stacked}) if stacked is not None else variants
    return TileTable(variants, several, f"{path.parent.name}/{path.name}", _space(path, space))


def read_schedule(kernel: str, tier: str, otherwise: str) -> tuple[Path, dict[str, Any]]:
    """Read the file of ``kernel`` for ``tier``, or for the tier ``otherwise``: its path and what it holds.

    Raises
    ------
    OptionError
        If there is neither, or it is no TOML.
    """
    root = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    paths = [root / name / f"{kernel}.toml" for name in (tier, otherwise)]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        problem = f"no such schedule file, nor one for the {otherwise} tier"
        raise OptionError(str(paths[0]), problem, "reinstall tvm-ternary")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(str(path), f"not valid TOML: {error}") from error


def _space(path: Path, space: Any) -> dict[str, tuple[int, ...]]:
    """Candidates of every decision; one that is left out has its least value alone."""
    if isinstance(space, dict) and set(space) <= set(DECISIONS):
        whole = {name: space.get(name, [least]) for name, least in DECISIONS.items()}
        if all(_candidates(values, DECISIONS[name]) for name, values in whole.items()):
            return {name: tuple(dict.fromkeys(values)) for name, values in whole.items()}
    decisions = ", ".join(f"{name} (from {least})" for name, least in DECISIONS.items())
    raise OptionError(str(path), f"[space] is {space}; expected lists of whole numbers: {decisions}")


def _candidates(values: Any, least: int) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is int and v >= least for v in values)


def _variants(path: Path, table: dict[str, Any]) -> tuple[Variant, ...]:
    expected = "expected [[variant]] tables with rows, blocks, perhaps panel and tiles; max_rows in all but the last"
    rows = table.get("variant")
    if set(table) != {"variant"} or not isinstance(rows, list) or not rows:
        raise OptionError(str(path), f"got keys {sorted(table)}; {expected}")
    variants = []
    for index, row in enumerate(rows):
        limit = set() if index == len(rows) - 1 else {"max_rows"}
        if not isinstance(row, dict) or set(row) - set(_FLAGS) != {"rows", "blocks"} | limit or not _sound(row):
            raise OptionError(str(path), f"variant {index} is {row}; {expected}")
        flags = {name: row.get(name, False) for name in _FLAGS}
        variants.append(Variant(Tile(row["rows"], row["blocks"]), row.get("max_rows"), **flags))
    limits = [v.max_rows for v in variants[:-1] if v.max_rows is not None]
    if limits != sorted(set(limits)):
        raise OptionError(str(path), f"max_rows are {limits}; {expected}")
    return tuple(variants)


def _sound(row: dict[str, Any]) -> bool:
    numbers = (value for key, value in row.items() if key not in _FLAGS)
    flags = (row.get(name, False) for name in _FLAGS)
    return all(type(value) is int and value > 0 for value in numbers) and all(type(flag) is bool for flag in flags)
