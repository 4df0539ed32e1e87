"""An evaluation as one HTML file that needs nothing else: tables, and pictures inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from tvm_ternary.analysis.gallery import Picture, pictures
from tvm_ternary.analysis.pictures import png_address, svg_element
from tvm_ternary.analysis.quality import Evaluation
from tvm_ternary.analysis.quality_tables import (
    candidates_table,
    facts_table,
    layers_table,
    metrics_table,
    outputs_table,
)
from tvm_ternary.analysis.report import Table
from tvm_ternary.files import atomic_path

_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
figure { margin: 1rem 0 } figcaption { color: #555 }
.wide { overflow-x: auto } svg, img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 0.85rem } th, td { padding: 0.2rem 0.7rem; text-align: left }
th { border-bottom: 1px solid #888 } td { border-bottom: 1px solid #e4e4e4 }
.number { text-align: right; font-variant-numeric: tabular-nums }
details { margin: 0.6rem 0 } summary { cursor: pointer }
"""


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the report.

    Parameters
    ----------
    evaluation : Evaluation
    path : Path
        The HTML file; equal evaluations give equal files.

    Raises
    ------
    HostError
        If matplotlib is not installed.
    OutputError
        If the file cannot be written.
    """
    text = "\n".join(_document(evaluation)) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def _document(evaluation: Evaluation) -> Iterator[str]:
    candidates = evaluation.candidates
    drawn: dict[str, list[str]] = {}
    for picture in pictures(evaluation):
        drawn.setdefault(picture.chapter, []).append(_figure(picture))
    title = f"{escape(Path(evaluation.model).name)}: float against ternary"
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
    yield f"<style>\n{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    yield _table(facts_table(evaluation))
    yield "<h2>Size</h2>"
    yield _table(candidates_table(evaluation))
    if any(candidate.metrics for candidate in candidates):
        yield "<h2>Metrics</h2>"
        yield _table(metrics_table(candidates))
    yield from drawn.get("metrics", [])
    yield "<h2>Outputs</h2>"
    yield _table(outputs_table(candidates))
    yield from drawn.get("outputs", [])
    yield "<h2>Matrices</h2>"
    yield from drawn.get("matrices", [])
    for candidate in candidates:
        yield f"<details>\n<summary>{escape(candidate.name)}</summary>\n{_table(layers_table(candidate))}\n</details>"
    yield "</body>\n</html>"


def _figure(picture: Picture) -> str:
    caption = escape(picture.caption)
    image = (
        f'<img alt="{caption}" src="{png_address(picture.figure)}">'
        if picture.dense
        else svg_element(picture.figure, picture.name)
    )
    return f'<figure class="wide">\n{image}\n<figcaption>{caption}</figcaption>\n</figure>'


def _table(table: Table) -> str:
    head = f"<thead>{_row('th', table.columns, table.numeric)}</thead>\n" if any(table.columns) else ""
    body = "\n".join(_row("td", row, table.numeric) for row in table.rows)
    return f'<div class="wide"><table>\n{head}<tbody>\n{body}\n</tbody>\n</table></div>'


def _row(tag: str, cells: Sequence[str], numeric: frozenset[int]) -> str:
    parts = (
        f"<{tag}{' class=number' if position in numeric else ''}>{escape(cell)}</{tag}>"
        for position, cell in enumerate(cells)
    )
    return f"<tr>{''.join(parts)}</tr>"
