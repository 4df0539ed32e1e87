"""The roofline as a picture: operations a second against operations a byte, ours and the peers', under the limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_ternary.analysis.pictures import require_format, save_figure
from tvm_ternary.bench.lines import Results
from tvm_ternary.bench.measurement import Measurement
from tvm_ternary.bench.roofline import Limits
from tvm_ternary.formats.scheme import parse_packed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^vDPX*<>hp"
_PANEL = (8.4, 5.2)
_WIDE = 2
_PEAK_OF = {32: "float32", 8: "int8", 1: "trits"}

Panel = tuple[str, int, str]
"""Target, threads, cache."""


def plot_roofline(results: Results, path: Path) -> None:
    """Draw a panel for each target, number of threads and state of the cache.

    Parameters
    ----------
    results : Results
    path : Path
        ``.png`` or ``.svg``.

    Raises
    ------
    OptionError, HostError
        As `require_format`.
    OutputError
        If the file cannot be written.
    """
    require_format(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(results.measurements)
    engines = list(dict.fromkeys([one.scheme for one in results.measurements]))
    engines += list(dict.fromkeys(name for one in results.measurements for name in one.peers))
    palette = plt.get_cmap("tab20" if len(engines) > 10 else "tab10")
    colours = {name: palette(position % palette.N) for position, name in enumerate(engines)}
    sizes = sorted({one.m for one in results.measurements})
    markers = {m: _MARKERS[position % len(_MARKERS)] for position, m in enumerate(sizes)}
    columns = min(len(panels), _WIDE)
    rows = math.ceil(len(panels) / columns)
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(_PANEL[0] * columns, _PANEL[1] * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (panel, group) in zip(axes.flat, panels.items(), strict=False):
            _draw(axis, panel, group, results.limits.get(panel[:2]), colours, markers)
        _legend(figure, colours, markers)
        figure.suptitle(f"{results.facts['cpu']}: $y = x w^T$ by a ternary w, float32 to float32")
        save_figure(figure, path, "roofline")
        plt.close(figure)


def _panels(measurements: Sequence[Measurement]) -> dict[Panel, list[Measurement]]:
    panels: dict[Panel, list[Measurement]] = {}
    for one in measurements:
        panels.setdefault((one.target, one.threads, one.cache), []).append(one)
    return panels


def _points(one: Measurement) -> Iterator[tuple[str, float, float]]:
    """Engine, operations a byte, Gop/s."""
    yield one.scheme, one.operations / one.bytes, one.operations / one.time.median / 1e3
    for name, spread in one.peers.items():
        yield name, one.operations / one.peer_bytes[name], one.operations / spread.median / 1e3


def _draw(
    axes: Axes,
    panel: Panel,
    measurements: Sequence[Measurement],
    limits: Limits | None,
    colours: dict[str, Any],
    markers: dict[int, str],
) -> None:
    target, threads, cache = panel
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="Gop/s")
    points = [(name, one.m, x, y) for one in measurements for name, x, y in _points(one)]
    own = {one.scheme for one in measurements}
    # Ours above the peers', with an edge.
    for name, m, x, y in sorted(dict.fromkeys(points), key=lambda point: point[0] in own):
        size, edge = (6, 0.8) if name in own else (4, 0)
        axes.plot(x, y, markers[m], color=colours[name], markersize=size, markeredgecolor="black", markeredgewidth=edge)
    low, high = min(x for *_, x, _ in points), max(x for *_, x, _ in points)
    if limits is not None:
        kinds = {_PEAK_OF[parse_packed(one.scheme)[0].activation_bits] for one in measurements}
        kinds |= {"int8 tiles"} if "int8" in kinds else set()
        peaks = {name: peak for name, peak in limits.peaks.items() if name in kinds}
        # Where even the fastest level no longer keeps the arithmetic busy shall be seen.
        low = min([low, *(min(peaks.values()) / bandwidth for bandwidth in limits.bandwidths.values())])
        _ceilings(axes, limits.bandwidths, peaks, low / 1.5, high * 1.5)
    plural = "" if threads == 1 else "s"
    axes.set(xlim=(low / 1.5, high * 1.5), ylim=(min(y for *_, y in points) / 1.5, None))
    axes.set_title(f"{target}, {threads} thread{plural}, {cache}")
    axes.grid(alpha=0.2, which="both")


def _ceilings(axes: Axes, bandwidths: dict[str, float], peaks: dict[str, float], low: float, high: float) -> None:
    """Lines that no point is above: what each level of memory feeds, up to the highest peak, and the peaks."""
    top = max(peaks.values())
    for name, bandwidth in bandwidths.items():
        end = min(top / bandwidth, high)
        axes.plot([low, end], [low * bandwidth / 1e9, end * bandwidth / 1e9], color="0.45", linewidth=1)
        _note(axes, f"{name} {bandwidth / 1e9:.0f} GB/s", end, end * bandwidth / 1e9, ha="left", rotation=45)
    start = max(low, min(peaks.values()) / max(bandwidths.values())) if bandwidths else low
    for name, peak in peaks.items():
        axes.plot([start, high], [peak / 1e9] * 2, color="0.2", linewidth=1, linestyle="--")
        _note(axes, f"{name} {peak / 1e9:.0f} Gop/s", high, peak / 1e9, ha="right")
    # Room for what stands at their ends.
    axes.set_ylim(top=4 * top / 1e9)


def _note(axes: Axes, text: str, x: float, y: float, **options: Any) -> None:
    """Say what a line is, at its end."""
    offset = (-3 if options["ha"] == "right" else 0, 3)
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=7, color="0.25", **options)


def _legend(figure: Any, colours: dict[str, Any], markers: dict[int, str]) -> None:
    """A colour an engine, a marker an M."""
    from matplotlib.lines import Line2D

    entries = [(name, colour, "o") for name, colour in colours.items()]
    entries += [(f"M = {m}", "0.3", marker) for m, marker in markers.items()]
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=text) for text, colour, marker in entries
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
