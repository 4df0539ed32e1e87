"""Pictures of an evaluation and the report that holds them."""

from __future__ import annotations

import builtins
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tvm_ternary.analysis.gallery import pictures, write_pictures
from tvm_ternary.analysis.html import write_report
from tvm_ternary.analysis.pictures import svg_element
from tvm_ternary.analysis.plots import TradeoffPoint, plot_layers, plot_tradeoff, tradeoff_points
from tvm_ternary.errors import HostError, OutputError

from .evaluated import ALONE, EVALUATION, ONE, TWO, layer


def _texts(svg: str) -> list[str]:
    """What matplotlib wrote: it says in a comment what the shapes of letters spell."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_matrices_are_a_grid_of_blocks_and_kinds() -> None:
    texts = _texts(svg_element(plot_layers([ONE, TWO]), "a"))
    assert [text for text in texts if text.startswith("block")] == ["block 0", "block 1"]
    assert texts.count("query") == texts.count("dense") == 2
    # Outputs were observed, so theirs are shown: a tenth of the weights' error.
    assert [text for text in texts if re.fullmatch(r"0\.0\d\d", text)] == ["0.010", "0.020", "0.030", "0.040"] * 2
    assert "relative error of the output" in texts
    assert {"t2", "t3a8g64"} <= set(texts)


def test_matrices_without_blocks_are_bars() -> None:
    plain = replace(ONE, layers=(replace(layer("fc1.weight", 0.1), output_error=None), layer("table", 0, None)))
    texts = _texts(svg_element(plot_layers([plain]), "a"))
    assert "fc1" in texts
    assert "table" not in texts
    assert "relative error of the weights" in texts


def test_tradeoff_needs_two_points() -> None:
    ((name, (points, reference)),) = tradeoff_points([ONE, TWO]).items()
    assert (name, reference) == ("accuracy <top 1>", 0.9)
    assert [(point.label, point.bits, point.value) for point in points] == [("t2", 4.5, 0.85), ("t3a8g64", 6.5, 0.91)]
    assert tradeoff_points([ONE]) == {}
    assert tradeoff_points([ONE, replace(TWO, bits_per_weight=None)]) == {}
    without = [replace(one, metrics=()) for one in (ONE, TWO)]
    assert list(tradeoff_points(without)) == ["logits: cosine to float"]


def test_tradeoff_of_several_methods() -> None:
    points = [TradeoffPoint(method, f"t{i}", i + 0.5, i / 10) for method in ("rounding", "planes") for i in (1, 2)]
    texts = _texts(svg_element(plot_tradeoff(points, "Pearson", 0.656), "a"))
    assert {"rounding", "planes", "float, 0.656", "Pearson", "bits a weight, scales counted"} <= set(texts)


def test_files_are_reproducible(tmp_path: Path) -> None:
    first, second = (write_pictures(EVALUATION, tmp_path / "deep" / name) for name in "ab")
    names = ["tradeoff-1.svg", "outputs-1.png", "outputs-2.png", "matrices.svg"]
    assert [path.name for path in first] == names
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.name for path in write_pictures(ALONE, tmp_path / "c")] == ["outputs-1.png", "matrices.svg"]


class _Page(HTMLParser):
    """Counts elements and gathers what leads out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_report_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(EVALUATION, path)
    text = path.read_text("utf-8")
    page = _Page(text)
    assert {tag: page.counts[tag] for tag in ("svg", "img", "table", "script") if tag in page.counts} == {
        "svg": 2,
        "img": 2,
        "table": 6,
    }
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "accuracy &lt;top 1&gt;" in text
    assert "<top 1>" not in re.sub("<!--.*?-->", "", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
    write_report(EVALUATION, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text("utf-8") == text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made a folder"):
        write_pictures(EVALUATION, tmp_path / "file")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(HostError, match=r"install tvm-ternary\[plot\]"):
        write_report(EVALUATION, tmp_path / "a.html")
    with pytest.raises(HostError, match=r"install tvm-ternary\[plot\]"):
        list(pictures(EVALUATION))
