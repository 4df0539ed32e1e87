"""The table and the picture of `benchmarks.attention_accuracy`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_ternary.analysis.report import Table
from tvm_ternary.bench.report import markdown as table_text

Line = dict[str, Any]

_COLUMNS = ("model", "mode", "planes", "window", "packed", "measure", "float", "rounded", "change", "output error")
_BOTH = "ternary-keys-values"
_SOME = 0.02
"""A share of packed keys below which a figure says nothing of them."""


@dataclass(frozen=True)
class Aim:
    """What two planes may cost behind a window of 64 tokens."""

    words: str
    change: Callable[[float, float], float]
    most: float


AIMS = {
    "lee pearson": Aim("at most 0.01 less", lambda before, after: before - after, 0.01),
    "perplexity": Aim("at most 1% more", lambda before, after: after / before - 1, 0.01),
}


def markdown(lines: Sequence[Line]) -> str:
    """Whether the aims are met, and all figures."""
    figures = [line for line in lines if line["kind"] == "figure"]
    if not figures:
        return ""
    aims = _table(("aim, two planes", "model", "mode", "window", "packed", "loses", "met"), _aims(figures), {4, 5})
    table = _table(_COLUMNS, [row for line in figures for row in _rows(line)], {2, 3, 4, 6, 7, 8, 9})
    text = (
        "Packed is the share of keys that a query found in planes, of all it saw; output error is the relative error of"
        " the model's first output.\n"
    )
    kept = [line for line in lines if line["kind"] == "library"]
    picture = "![errors of heads, and figures against planes](attention_accuracy.png)\n"
    return f"{text}\n{aims}\n{table}{_libraries(kept)}\n{picture}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], numeric: set[int]) -> str:
    return table_text(Table(columns, tuple(rows), frozenset(numeric)))


def _libraries(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    rows = [
        (
            one["model"],
            str(one["planes"]),
            str(one["window"]),
            *(f"{one[n]:.4f}" for n in ("float", "measure", "library")),
        )
        for one in lines
    ]
    text = (
        f"Perplexity of {lines[0]['texts']} texts, read token by token by a compiled library that keeps them inside:\n"
    )
    columns = "model", "planes", "window", "float", "as above", "library"
    return f"\n{text}\n{_table(columns, rows, {1, 2, 3, 4, 5})}"


def _aims(figures: Sequence[Line]) -> list[tuple[str, ...]]:
    rows = []
    for line in figures:
        if line["planes"] != 2 or line["rotated"]:
            continue
        for name, (before, after) in line["metrics"].items():
            if (aim := AIMS.get(name)) is not None:
                loses = aim.change(before, after)
                shown = f"{loses:+.2%}" if "%" in aim.words else f"{loses:+.4f}"
                where = line["model"], line["mode"], str(line["window"]), f"{line['packed_share']:.1%}"
                met = "yes" if loses <= aim.most else "no"
                met += ", but it reads next to nothing packed" if line["packed_share"] < _SOME else ""
                rows.append((f"{name}: {aim.words}", *where, shown, met))
    return rows


def _rows(line: Line) -> list[tuple[str, ...]]:
    """A row a measure."""
    planes = line["planes"]
    counts = ", ".join(map(str, planes)) if isinstance(planes, list) else str(planes)
    mode = line["mode"] + (", rotated" if line["rotated"] else "")
    head = line["model"], mode, counts, str(line["window"]), f"{line['packed_share']:.1%}"
    error = f"{line['output_error']:.3f}"
    return [
        (*head, name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", error)
        for name, (before, after) in line["metrics"].items()
    ]


def plot(lines: Sequence[Line], path: Path) -> None:
    """Above the errors of heads with two planes, below figures against planes; a column a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(line["model"] for line in lines))
    figure, grid = plt.subplots(
        2, len(models), figsize=(3.1 * len(models) + 0.6, 5.6), dpi=130, squeeze=False, layout="constrained"
    )
    image = None
    for column, model in enumerate(models):
        own = [line for line in lines if line["model"] == model]
        drawn = _heatmap(grid[0][column], [line for line in own if line["kind"] == "errors"])
        image = drawn or image
        grid[0][column].set_title(model, fontsize=9)
        _curves(grid[1][column], [line for line in own if line["kind"] == "figure"])
    if image is not None:
        figure.colorbar(image, ax=list(grid[0]), label="error of a head, two planes", pad=0.01)
    grid[1][-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _heatmap(axes: Any, errors: Sequence[Line]) -> Any:
    """Of no window, where the most is packed."""
    found = next((line for line in errors if line["window"] == 0), None)
    axes.set(xlabel="head", ylabel="layer")
    if found is None:
        return None
    heads = [[of_planes[1] for of_planes in layer] for layer in found["errors"].values()]
    widest = max(map(len, heads))
    cells = np.array([[*row, *[None] * (widest - len(row))] for row in heads], np.float64)
    axes.set(xticks=range(0, widest, max(1, widest // 6)), yticks=range(len(heads)))
    return axes.imshow(cells, vmin=0, vmax=0.4, cmap="viridis", aspect="auto")


def _curves(axes: Any, figures: Sequence[Line]) -> None:
    name = next(iter(figures[0]["metrics"])) if figures else ""
    for mode, window, style in (
        ("ternary-keys", 0, "o--"),
        ("ternary-keys", 64, "s--"),
        (_BOTH, 0, "o-"),
        (_BOTH, 64, "s-"),
    ):
        points = {
            line["planes"]: line["metrics"][name][1]
            for line in figures
            if (line["mode"], line["window"], line["rotated"]) == (mode, window, False)
        }
        axes.plot(list(points), list(points.values()), style, markersize=4, label=f"{mode}, window {window}")
    if figures:
        axes.axhline(figures[0]["metrics"][name][0], color="gray", linestyle=":", label="float")
    axes.set(xlabel="planes", ylabel=name, xticks=(1, 2, 3))
    axes.grid(alpha=0.3)
