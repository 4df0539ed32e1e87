"""All pictures of an evaluation, each with a name and a caption; written as files for documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_ternary.analysis.pictures import require_matplotlib, save_figure
from tvm_ternary.analysis.plots import plot_layers, plot_outputs, plot_tradeoff, tradeoff_points
from tvm_ternary.analysis.quality import Evaluation
from tvm_ternary.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure.

    Parameters
    ----------
    name : str
        Of its file, without an ending.
    chapter : str
        ``metrics``, ``outputs`` or ``matrices``.
    caption : str
    figure : Figure
    dense : bool
        Whether it has so many points that pixels are smaller than lines.
    """

    name: str
    chapter: str
    caption: str
    figure: Figure
    dense: bool = False


def pictures(evaluation: Evaluation) -> Iterator[Picture]:
    """Draw what there is to draw.

    Raises
    ------
    HostError
        If matplotlib is not installed.
    """
    require_matplotlib()
    candidates = evaluation.candidates
    for number, (measure, (points, reference)) in enumerate(tradeoff_points(candidates).items(), 1):
        figure = plot_tradeoff(points, measure, reference)
        yield Picture(f"tradeoff-{number}", "metrics", f"{measure} against bits a weight.", figure)
    for number, candidate in enumerate(candidates, 1):
        if any(output.points.size for output in candidate.outputs):
            caption = f"{candidate.name}: some elements of each output against the float model's."
            yield Picture(f"outputs-{number}", "outputs", caption, plot_outputs(candidate), dense=True)
    if drawn := [candidate for candidate in candidates if candidate.ternary]:
        yield Picture("matrices", "matrices", "Relative error of each matrix.", plot_layers(drawn))


def write_pictures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write each picture to a folder, as SVG, or PNG where it has many points.

    Raises
    ------
    HostError
        If matplotlib is not installed.
    OutputError
        If a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made a folder ({error.strerror or error})"
        raise OutputError(str(folder), problem, "choose another") from error
    paths = []
    for picture in pictures(evaluation):
        path = folder / f"{picture.name}{'.png' if picture.dense else '.svg'}"
        save_figure(picture.figure, path, picture.name)
        paths.append(path)
    return paths
