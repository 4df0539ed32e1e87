"""Attention as a picture: time and memory against the length of a cache, what is lost against its planes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_ternary.analysis.pictures import require_format, save_figure
from tvm_ternary.bench.attention import AttentionMeasurement
from tvm_ternary.bench.attention_peers import ATTENTION_PEERS
from tvm_ternary.bench.attention_planes import planes_losses
from tvm_ternary.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = (5.2, 3.6)
_HALF = 0.5

Group = tuple[str, int]
"""Heads, threads."""
Lines = dict[str, dict[int, float]]
"""Label to the points of a line."""


def plot_attention(measurements: Iterable[AttentionMeasurement], cpu: str, path: Path) -> None:
    """Draw the steps: a row of panels for each shape and number of threads.

    The last panel is not of what was measured but of `planes_losses`.

    Parameters
    ----------
    measurements : iterable of AttentionMeasurement
        Those of prompts are left out.
    cpu : str
        What was measured on.
    path : Path
        ``.png`` or ``.svg``.

    Raises
    ------
    OptionError
        If there is no step among them, or as `require_format`.
    HostError
        As `require_format`.
    OutputError
        If the file cannot be written.
    """
    require_format(path)
    groups: dict[Group, list[AttentionMeasurement]] = {}
    for one in measurements:
        if one.case.step:
            groups.setdefault((str(one.case.shape), one.threads), []).append(one)
    if not groups:
        raise OptionError(str(path), "would show steps, and none was measured", "measure some with --cached")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 8}):
        size = (4 * _PANEL[0], len(groups) * _PANEL[1])
        figure, axes = plt.subplots(len(groups), 4, figsize=size, squeeze=False, layout="constrained")
        for row, ((shape, threads), group) in zip(axes, groups.items(), strict=True):
            _draw(row[0], _times(group), "cached tokens", "ms a step")
            _draw(row[1], _sizes(group), "cached tokens", "MiB of keys and values, a layer")
            _draw(row[2], _losses(group), "planes", "relative error by quantizing", power=False)
            made_up = planes_losses(group[0].case.shape)
            _draw(row[3], made_up, "planes", "relative error, made-up keys", power=False)
            row[0].set_title(f"{shape}, {threads} thread{'' if threads == 1 else 's'}")
        figure.suptitle(f"{cpu}: attention of one token over a cache")
        save_figure(figure, path, "attention")
        plt.close(figure)


def _times(group: Sequence[AttentionMeasurement]) -> Lines:
    """Ours, then the peers'."""
    lines: Lines = {}
    for one in group:
        lines.setdefault(str(one.scheme), {})[one.case.keys] = one.time.median / 1e3
    for one in group:
        for name, spread in one.peers.items():
            lines.setdefault(name, {})[one.case.keys] = spread.median / 1e3
    return lines


def _sizes(group: Sequence[AttentionMeasurement]) -> Lines:
    """Ours, however it is multiplied, and bfloat16 beside float32."""
    lines: Lines = {}
    for one in group:
        planes, size = one.scheme.planes, one.cache_bytes / 2**20
        name = f"{planes} plane{'' if planes == 1 else 's'}" if planes else "float32"
        lines.setdefault(name, {})[one.case.keys] = size
        if not planes:
            lines.setdefault("bfloat16", {})[one.case.keys] = size * _HALF
    return lines


def _losses(group: Sequence[AttentionMeasurement]) -> Lines:
    """Of every length; how queries are rounded has no part in it."""
    lines: Lines = {}
    for one in group:
        if one.scheme.planes:
            lines.setdefault(f"{one.case.keys} tokens", {})[one.scheme.planes] = one.loss
    return lines


def _draw(axes: Axes, lines: Lines, x: str, y: str, *, power: bool = True) -> None:
    axes.set(xlabel=x, ylabel=y, yscale="log")
    for name, points in lines.items():
        style = "--" if name in ATTENTION_PEERS else "-"
        axes.plot(*zip(*sorted(points.items()), strict=True), style, marker="o", markersize=4, label=name)
    ticks = sorted({at for points in lines.values() for at in points})
    if power and ticks:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(at) for at in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.2)
    if lines:
        # Beside the lines, which cross all of a panel.
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
