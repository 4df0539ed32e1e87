"""Images whose height and width are multiples: imported, cut, compiled, and run at several sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax

import tvm_ternary
from tests.graph.onnx.running import Compiled, relative_error, run_onnxruntime
from tests.models import FLOAT, GraphBuilder
from tvm_ternary.errors import InputError, UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.cut import cut
from tvm_ternary.graph.passes.define_dimensions import Place, define_dimensions, find_places
from tvm_ternary.runtime.sample import random_inputs

MULTIPLES = {"height": "8*rows", "width": "4*columns"}
SIZES = ({"batch": 1, "rows": 2, "columns": 3}, {"batch": 2, "rows": 1, "columns": 5})


def skipping() -> onnx.ModelProto:
    """Halved twice, doubled twice, and added to what it was; then a matrix over the channels."""
    g = GraphBuilder()
    x = g.input("image", FLOAT, ["batch", 8, "height", "width"])
    small = g.node("Conv", x, g.weight("down", 8, 8, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    small = g.node("MaxPool", small, kernel_shape=[2, 2], strides=[2, 2])
    large = g.node("ConvTranspose", small, g.weight("up", 8, 8, 2, 2), strides=[2, 2])
    large = g.node("Resize", large, "", g.constant([1.0, 1.0, 2.0, 2.0]), mode="nearest")
    last = g.node("Transpose", g.node("Add", x, large), perm=[0, 2, 3, 1])
    g.node("MatMul", last, g.weight("mix", 8, 5), output="y")
    g.output("y", FLOAT)
    return g.model()


def test_a_skip_needs_to_know() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"cannot be shown to agree; .* with --dim NAME=32\*NEW"):
        import_onnx(skipping())


def test_a_library_of_multiples(tmp_path: Path) -> None:
    onnx.save(skipping(), tmp_path / "skip.onnx")
    tvm_ternary.compile(tmp_path / "skip.onnx", tmp_path / "skip.so", dims=MULTIPLES, layers=[])
    module = tvm_ternary.load(tmp_path / "skip.so", threads=1)
    assert module.inputs[0].shape == ("batch", 8, "rows * 8", "columns * 4")
    assert module.outputs[0].shape == ("batch", "rows * 8", "columns * 4", 5)
    for sizes in SIZES:
        feeds = random_inputs(module.inputs, sizes, seed=1)
        (want,) = run_onnxruntime(skipping(), feeds)
        assert relative_error(module.run(None, feeds)[0], want) < 1e-5
    with pytest.raises(InputError, match="input 'image': has a dimension of 20; expected rows"):
        module.run(None, {"image": np.zeros((1, 8, 20, 8), np.float32)})


def test_segments_get_what_was_found() -> None:
    imported = import_onnx(skipping(), MULTIPLES)
    places = find_places(imported.module["main"].params[:1])
    assert {var.name: place for var, place in places.items()} == {
        "batch": Place(0, 0),
        "rows": Place(0, 2, 8),
        "columns": Place(0, 3, 4),
    }
    segments = cut(imported.module)
    feeds = random_inputs(imported.inputs, SIZES[0])
    shape = feeds["image"].shape
    live = dict(zip(segments.inputs, [tvm.runtime.tensor(feeds["image"])], strict=True))
    dimensions = tvm.runtime.ShapeTuple([place.size(shape[place.axis]) for place in segments.dimensions])
    for segment in segments.segments:
        machine = relax.VirtualMachine(tvm.compile(segment.module, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
        weights = [tvm.runtime.tensor(imported.params[name]) for name in segment.matrices]
        outputs = machine["main"](dimensions, *(live[n] for n in segment.inputs), *weights, *segment.constants)
        live.update(zip(segment.outputs, outputs, strict=True))
    (want,) = run_onnxruntime(skipping(), feeds)
    assert relative_error(live[segments.result][0].numpy(), want) < 1e-5


def test_a_dimension_that_stands_alone_somewhere() -> None:
    g = GraphBuilder()
    g.node(
        "Add",
        g.input("x", FLOAT, ["2*n", 3]),
        g.node("Concat", *[g.input("y", FLOAT, ["n", 3])] * 2, axis=0),
        output="z",
    )
    g.output("z", FLOAT)
    imported = import_onnx(g.model())
    assert define_dimensions(imported.module) is imported.module


def test_an_offset_and_a_file_that_says_so() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["3*n + 1", 4])
    halves = g.node("Add", x, g.input("y", FLOAT, ["6*n + 2 - (3*n + 1)", 4]), output="z")
    g.output(halves, FLOAT)
    imported = import_onnx(g.model())
    assert [spec.shape for spec in imported.inputs] == [("n * 3 + 1", 4)] * 2
    run = Compiled(replace(imported, module=define_dimensions(imported.module)))
    for n in (1, 5):
        feeds = random_inputs(imported.inputs, {"n": n})
        assert feeds["x"].shape == (3 * n + 1, 4)
        np.testing.assert_array_equal(run(feeds)[0], feeds["x"] + feeds["y"])
