"""``Resize`` of images whose sides are open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tvm import relax

import tvm_ternary
from tests.graph.onnx.running import assert_matches, run_reference
from tests.models import FLOAT, GraphBuilder
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import ImportedModel, import_onnx


def resized(*scales: float, sides: tuple[int | str, ...] = ("high", "wide"), **attributes: object) -> onnx.ModelProto:
    g = GraphBuilder(opset=19)
    x = g.input("x", FLOAT, [1, 2, *sides])
    g.node("Resize", x, "", g.constant(np.array([1, 1, *scales], np.float32)), output="y", **attributes)
    g.output("y", FLOAT)
    return g.model()


def cases(*sizes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((1, 2, *size)).astype(np.float32)} for size in sizes]


def operators(imported: ImportedModel) -> set[str]:
    found = set()
    relax.analysis.post_order_visit(
        imported.module["main"], lambda e: found.add(e.op.name) if isinstance(e, relax.Call) else None
    )
    return found


@pytest.mark.parametrize(
    ("mode", "sides", "places"),
    [
        ("nearest", ("high", "wide"), {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
        ("nearest", ("high", "wide"), {}),
        ("linear", (3, 4), {}),
    ],
)
def test_a_whole_factor_is_the_operator_that_passes_know(
    mode: str, sides: tuple[int | str, ...], places: dict[str, str]
) -> None:
    sizes = [(3, 4), (7, 11)] if sides == ("high", "wide") else [(3, 4)]
    imported = assert_matches(resized(2, 3, sides=sides, mode=mode, **places), cases(*sizes), run=run_reference)
    assert operators(imported) == {"relax.image.resize2d"}
    if len(sizes) == 2:
        assert imported.outputs[0].shape == (1, 2, "high * 2", "wide * 3")


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
        {"mode": "cubic", "exclude_outside": 1},
        {"mode": "linear", "antialias": 1},
    ],
)
def test_a_scale_that_leaves_a_rest(attributes: dict[str, object]) -> None:
    """The size is rounded down; places are still counted by the scale."""
    assert_matches(resized(0.6, 1.5, **attributes), cases((7, 5), (11, 8)), run=run_reference)


def test_to_the_size_of_another_image(tmp_path: Path) -> None:
    """Also as the compiler schedules it: TVM's analysis of bounds once took a quotient of sizes for zero."""
    g = GraphBuilder(opset=19)
    x, other = g.input("x", FLOAT, [1, 2, "high", "wide"]), g.input("other", FLOAT, [1, 2, "h", "w"])
    g.node("Resize", x, "", "", g.node("Shape", other), output="y", mode="linear")
    g.output("y", FLOAT)
    random = np.random.default_rng(0)
    feeds = {
        name: random.standard_normal(s).astype(np.float32) for name, s in (("x", (1, 2, 5, 4)), ("other", (1, 2, 3, 9)))
    }
    model = g.model()
    assert_matches(model, [feeds], run=run_reference)
    onnx.save(model, tmp_path / "m.onnx")
    tvm_ternary.compile(tmp_path / "m.onnx", tmp_path / "m.so", layers=[])
    (y,) = tvm_ternary.load(tmp_path / "m.so").run(None, feeds)
    np.testing.assert_allclose(y, run_reference(model, feeds)[0], rtol=1e-5, atol=1e-6)


def test_a_scale_that_is_no_fraction_needs_known_sides() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"scale 1\.23456.* of the symbolic size high is no"):
        import_onnx(resized(1.2345678, 1.0))
