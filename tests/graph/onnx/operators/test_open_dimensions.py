"""Operators whose result depends on places, with open dimensions, against the reference implementation of onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import tvm_ternary
from tests.graph.onnx.running import assert_matches, run_onnxruntime, run_reference
from tests.models import FLOAT, INT64, GraphBuilder
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_places() -> None:
    """One-hot rows as many as the sequence is long, sequences turned around, rows written into a ring."""
    g = GraphBuilder(opset=26)
    x, lengths = g.input("x", FLOAT, ["length", "batch", 3]), g.input("lengths", INT64, ["batch"])
    depth = g.node("Gather", g.node("Shape", x), g.constant(0), axis=0)
    g.node("OneHot", lengths, depth, g.constant(np.array([-1, 2], np.float32)), output="hot", axis=0)
    g.node("ReverseSequence", x, lengths, output="turned")
    ring = g.input("ring", FLOAT, ["batch", 8, 3])
    rows = g.node("Transpose", x, perm=[1, 0, 2])
    g.node("TensorScatter", ring, rows, lengths, output="written", mode="circular")
    g.node("EyeLike", g.node("Squeeze", g.node("Slice", x, *map(g.constant, ([0], [1], [2])))), output="eye", k=1)
    g.node("CumProd", x, g.constant(0), output="product", reverse=1, exclusive=1)
    for name in ("hot", "turned", "written", "eye", "product"):
        g.output(name, FLOAT)
    cases = [
        {"x": floats(length, batch, 3), "lengths": np.arange(1, batch + 1), "ring": floats(batch, 8, 3)}
        for length, batch in ((4, 2), (5, 4))
    ]
    assert_matches(g.model(), cases, run=run_reference)


def test_normalizations() -> None:
    g = GraphBuilder(opset=23)
    x = g.input("x", FLOAT, ["batch", "length", 6])
    g.node("RMSNormalization", x, g.weight("scale", 6), output="rms")
    g.node("RMSNormalization", x, g.weight("one", 1), output="all", axis=0)
    g.node("LpNormalization", x, output="lp", axis=1)
    g.nodes_of("LayerNormalization", x, g.weight("gain", 6), outputs=["layer", "mean", "inverse"])
    for name in ("rms", "all", "lp", "layer", "mean", "inverse"):
        g.output(name, FLOAT)
    assert_matches(g.model(), [{"x": floats(b, n, 6)} for b, n in ((1, 3), (2, 5))], run=run_reference)


def test_frames() -> None:
    g = GraphBuilder(opset=17)
    window = g.constant(np.hanning(16).astype(np.float32))
    g.node("STFT", g.input("x", FLOAT, ["batch", "length", 1]), g.constant(4), window, output="y")
    g.output("y", FLOAT)
    imported = assert_matches(g.model(), [{"x": floats(b, n, 1)} for b, n in ((1, 16), (2, 33))], run=run_reference)
    assert imported.outputs[0].shape[2:] == (9, 2)


def test_boxes(tmp_path: Path) -> None:
    """How many are kept is known at run time; also as the compiler schedules it."""
    g = GraphBuilder(opset=17)
    boxes, scores = g.input("boxes", FLOAT, ["batch", "n", 4]), g.input("scores", FLOAT, ["batch", 3, "n"])
    limits = [g.constant(5), g.constant(0.2), g.constant(0.3)]
    g.node("NonMaxSuppression", boxes, scores, *limits, output="kept")
    g.output("kept", INT64, ["m", 3])
    model = g.model()
    random = np.random.default_rng(0)
    cases = [
        {"boxes": random.random((b, n, 4), np.float32), "scores": random.random((b, 3, n), np.float32)}
        for b, n in ((1, 9), (2, 40))
    ]
    assert_matches(model, cases)
    onnx.save(model, tmp_path / "m.onnx")
    tvm_ternary.compile(tmp_path / "m.onnx", tmp_path / "m.so", layers=[])
    (kept,) = tvm_ternary.load(tmp_path / "m.so").run(None, cases[1])
    np.testing.assert_array_equal(kept, run_onnxruntime(model, cases[1])[0])


def test_a_transform_of_open_length_is_refused() -> None:
    g = GraphBuilder(opset=20)
    g.node("DFT", g.input("x", FLOAT, [1, "length", 1]), output="y")
    g.output("y", FLOAT)
    with pytest.raises(UnsupportedOperatorError, match="the length of its signal, length, is symbolic"):
        import_onnx(g.model())


def test_bits_of_another_width_are_refused() -> None:
    g = GraphBuilder(opset=26)
    g.node("BitCast", g.input("x", FLOAT, ["n"]), output="y", to=onnx.TensorProto.INT64)
    g.output("y", INT64)
    with pytest.raises(UnsupportedOperatorError, match="float32 as int64, which has another width"):
        import_onnx(g.model())
