"""Pictures of an evaluation: the error a matrix, accuracy against bits a weight, outputs against the float model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_ternary.analysis.quality import Candidate, LayerQuality, OutputQuality
from tvm_ternary.quantize.blocks import blocks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*<>hp"
_SMALL, _TINY = 8, 7
# Above this many matrices without numbered blocks, names would not be readable.
_MOST_BARS = 40


@dataclass(frozen=True)
class TradeoffPoint:
    """One point of accuracy against bits a weight.

    Parameters
    ----------
    series : str
        Points of one series, a method for one, are joined by a line.
    label : str
        Stands beside the point.
    bits : float
        A weight, scales counted.
    value : float
    """

    series: str
    label: str
    bits: float
    value: float


def plot_layers(candidates: Sequence[Candidate]) -> Figure:
    """Draw the error of each matrix: block by kind where names number the blocks, bars otherwise.

    The error is that of the matrix's output where it was observed, that of its weights otherwise.
    """
    layers = [layer for candidate in candidates for layer in candidate.ternary]
    blocks = blocks_of(dict.fromkeys(layer.name for layer in layers))
    if len(set(blocks.values())) > 1:
        return _heatmaps(candidates, blocks)
    return _bars(candidates)


def plot_tradeoff(points: Sequence[TradeoffPoint], measure: str, reference: float | None = None) -> Figure:
    """Draw accuracy against bits a weight.

    Parameters
    ----------
    points : sequence of TradeoffPoint
    measure : str
        What the value is.
    reference : float, optional
        The float model's, drawn as a line.
    """
    figure, (axes,) = _figure(7.2, 4.4, 1)
    for position, name in enumerate(dict.fromkeys(point.series for point in points)):
        own = sorted((point for point in points if point.series == name), key=lambda point: point.bits)
        marker = _MARKERS[position % len(_MARKERS)]
        axes.plot([p.bits for p in own], [p.value for p in own], marker=marker, label=name, linewidth=1.2)
        for point in own:
            offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": _TINY}
            axes.annotate(point.label, (point.bits, point.value), **offset)
    if reference is not None:
        axes.axhline(reference, color="0.4", linestyle="--", linewidth=1, label=f"float, {reference:.4g}")
    axes.set(xlabel="bits a weight, scales counted", ylabel=measure)
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=_SMALL, frameon=False)
    return figure


def tradeoff_points(candidates: Sequence[Candidate]) -> dict[str, tuple[list[TradeoffPoint], float]]:
    """Give what `plot_tradeoff` draws: points and the float model's value, for each metric or else each output.

    Candidates without ternary weights have no point; a measure with fewer than two points is left out.
    """
    measures: dict[str, tuple[list[TradeoffPoint], float]] = {}
    for candidate in candidates:
        values = [(metric.name, metric.value, metric.reference) for metric in candidate.metrics]
        if not values:
            close = [(output.name, output.closeness) for output in candidate.outputs]
            values = [(f"{name}: cosine to float", c.cosine, 1.0) for name, c in close if c is not None]
        for name, value, reference in values:
            points, _ = measures.setdefault(name, ([], reference))
            if candidate.bits_per_weight is not None and math.isfinite(value):
                points.append(TradeoffPoint("ternary", _title(candidate), candidate.bits_per_weight, value))
    return {name: found for name, found in measures.items() if len(found[0]) > 1}


def plot_outputs(candidate: Candidate) -> Figure:
    """Draw some elements of each float output against the float model's: the nearer to the diagonal the better."""
    outputs = [output for output in candidate.outputs if output.points.size]
    figure, panels = _figure(3.6, 3.4, len(outputs))
    for axes, output in zip(panels, outputs, strict=True):
        _scatter(axes, output)
    return figure


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _error(layer: LayerQuality) -> float:
    error = layer.weight_error if layer.output_error is None else layer.output_error
    return math.nan if error is None else error


def _measure(layers: Sequence[LayerQuality]) -> str:
    observed = any(layer.output_error is not None for layer in layers)
    return "relative error of the output" if observed else "relative error of the weights"


def _heatmaps(candidates: Sequence[Candidate], blocks: dict[str, tuple[str, int]]) -> Figure:
    """Rows are blocks, columns kinds of matrices; all candidates share one scale of colours."""
    rows = sorted(set(blocks.values()))
    kinds = list(dict.fromkeys(_kind(name, block) for name, block in blocks.items()))
    width, height = 1.6 + 0.62 * len(kinds), 1.9 + 0.3 * len(rows)
    figure, panels = _figure(width, height, len(candidates))
    most = max(_error(layer) for candidate in candidates for layer in candidate.ternary if layer.name in blocks)
    same = len({prefix for prefix, _ in rows}) == 1
    labels = [f"block {number}" if same else f"{prefix} {number}" for prefix, number in rows]
    for axes, candidate in zip(panels, candidates, strict=True):
        grid = np.full((len(rows), len(kinds)), np.nan)
        for layer in candidate.ternary:
            if (block := blocks.get(layer.name)) is not None:
                grid[rows.index(block), kinds.index(_kind(layer.name, block))] = _error(layer)
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=most, aspect="auto")
        if axes is panels[-1]:
            figure.colorbar(image, ax=panels, label=_measure([layer for c in candidates for layer in c.ternary]))
        for (row, column), value in np.ndenumerate(grid):
            if math.isfinite(value):
                colour = "black" if value > 0.6 * most else "white"
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=_TINY, color=colour)
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=_TINY)
        axes.set_yticks(range(len(rows)), labels if axes is panels[0] else [], fontsize=_TINY)
        axes.set_title(_title(candidate), fontsize=_SMALL)
    return figure


def _title(candidate: Candidate) -> str:
    """The last part of a path, or a scheme."""
    return Path(candidate.name).name


def _kind(name: str, block: tuple[str, int]) -> str:
    """What stands behind the block's number, without the word that ends every name."""
    behind = name.removeprefix(f"{block[0]}.").removeprefix(f"{block[1]}.")
    return behind.removesuffix(".weight")


def _bars(candidates: Sequence[Candidate]) -> Figure:
    """A group of bars a matrix, a bar a candidate."""
    names = list(dict.fromkeys(layer.name for candidate in candidates for layer in candidate.ternary))[:_MOST_BARS]
    figure, (axes,) = _figure(3 + 0.45 * len(names), 3.8, 1)
    width = 0.8 / max(len(candidates), 1)
    for position, candidate in enumerate(candidates):
        errors = {layer.name: _error(layer) for layer in candidate.ternary}
        places = np.arange(len(names)) + (position - (len(candidates) - 1) / 2) * width
        axes.bar(places, [errors.get(name, math.nan) for name in names], width, label=_title(candidate))
    axes.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], rotation=40, ha="right")
    axes.set_ylabel(_measure([layer for c in candidates for layer in c.ternary]))
    axes.grid(alpha=0.25, axis="y")
    axes.legend(fontsize=_SMALL, frameon=False)
    return figure


def _scatter(axes: Axes, output: OutputQuality) -> None:
    reference, array = output.points
    axes.plot(reference, array, ".", markersize=2.5, alpha=0.5)
    finite = output.points[np.isfinite(output.points)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    axes.plot([low, high], [low, high], color="0.3", linewidth=0.8)
    cosine = "" if output.closeness is None else f", cosine {output.closeness.cosine:.4f}"
    axes.set_title(f"{output.name}{cosine}", fontsize=_SMALL)
    axes.set(xlabel="float", ylabel="ternary")
    axes.grid(alpha=0.25)
