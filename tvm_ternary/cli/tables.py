"""Print tables as plain text that can be pasted: aligned, whole, a row a line.

Nothing is folded or cut, on a narrow terminal neither: a line that the terminal wraps can still be copied and searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len

from tvm_ternary.analysis.report import Table
from tvm_ternary.cli.text import printable, write_out

_GAP = "   "


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables to standard output, an empty line between them."""
    write_out("\n".join(_text(table) for table in tables))


def _text(table: Table) -> str:
    rows = [[printable(cell) for cell in row] for row in table.rows]
    headed = any(table.columns)
    cells = [list(table.columns), *rows] if headed else rows
    # A wide character takes two places.
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths, table.numeric) for row in cells]
    if headed:
        lines.insert(1, _GAP.join("-" * width for width in widths))
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _line(row: Sequence[str], widths: Sequence[int], numeric: frozenset[int]) -> str:
    parts = []
    for position, (cell, width) in enumerate(zip(row, widths, strict=True)):
        space = " " * (width - cell_len(cell))
        parts.append(space + cell if position in numeric else cell + space)
    return _GAP.join(parts)
