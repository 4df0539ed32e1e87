"""Write a matplotlib figure: to a file, or as text inside another document. Equal figures give equal bytes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_DPI = 110
# What a file says about its making would make two of the same figure differ.
_METADATA: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}


def require_format(path: Path) -> None:
    """Fail now rather than after minutes of measuring, if `save_figure` could not write such a file.

    Raises
    ------
    OptionError
        If the name ends otherwise than in ``.png`` or ``.svg``.
    HostError
        If matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(str(path), f"ends in {path.suffix!r}; expected {' or '.join(FORMATS)}", "name it otherwise")
    require_matplotlib()


def require_matplotlib() -> None:
    """Fail now if there is nothing to draw with.

    Raises
    ------
    HostError
        If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise HostError("plot", "needs the package matplotlib", "install tvm-ternary[plot]") from error


def save_figure(figure: Figure, path: Path, salt: str) -> None:
    """Write a figure.

    Parameters
    ----------
    figure : Figure
    path : Path
        ``.png`` or ``.svg``.
    salt : str
        Of the names inside an SVG; two figures in one document need two.

    Raises
    ------
    OptionError, HostError
        As `require_format`.
    OutputError
        If the file cannot be written.
    """
    require_format(path)
    with atomic_path(path) as temporary:
        _write(figure, temporary, path.suffix.lower(), salt)


def svg_element(figure: Figure, salt: str) -> str:
    """Give a figure as an ``<svg>`` element to stand in HTML."""
    buffer = io.StringIO()
    _write(figure, buffer, ".svg", salt)
    text = buffer.getvalue()
    # The declaration and the document type before it have no place in HTML.
    return text[text.index("<svg") :]


def png_address(figure: Figure) -> str:
    """Give a figure as a ``data:`` address, for pictures of more points than an SVG should hold."""
    buffer = io.BytesIO()
    _write(figure, buffer, ".png", "")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _write(figure: Figure, to: Any, suffix: str, salt: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(to, format=suffix.removeprefix("."), metadata=_METADATA[suffix], dpi=_DPI)
