"""``Conv`` against onnxruntime, as a convolution and as a product by a matrix; ternary ones against that product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.graph.onnx.running import assert_matches, weight_products
from tests.models import GraphBuilder
from tvm_ternary.compiler import Artifact, compile
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.runtime.module import load

FLOAT = TensorProto.FLOAT
DIMS = {1: ["batch", 6, "length"], 2: ["batch", 6, "height", 9]}
ATTRIBUTES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((3,), {"strides": [2], "pads": [1, 2]}),
    ((2,), {"auto_pad": "SAME_LOWER"}),
    ((2,), {"dilations": [3]}),
    ((1, 1), {}),
    ((1, 1), {"strides": [2, 3]}),
    ((3, 2), {"pads": [1, 0, 2, 1], "dilations": [2, 1], "strides": [1, 2]}),
    ((2, 2), {"auto_pad": "SAME_UPPER"}),
    ((3, 3), {"auto_pad": "VALID"}),
    ((3, 3), {"pads": [1, 1, 1, 1], "group": 2}),
)


def convolutions(rank: int) -> onnx.ModelProto:
    """One convolution for each of the attributes that fits the rank; every second has a bias."""
    g = GraphBuilder("convolutions")
    x = g.input("x", FLOAT, DIMS[rank])
    for number, (taps, attributes) in enumerate(ATTRIBUTES):
        if len(taps) != rank:
            continue
        weight = g.weight(f"block.{number}.weight", 4, 6 // attributes.get("group", 1), *taps)
        bias = [g.weight(f"block.{number}.bias", 4)] if number % 2 else []
        g.node("Conv", x, weight, *bias, output=f"y{number}", **attributes)
        g.output(f"y{number}", FLOAT, [None] * (rank + 2))
    return g.model()


def feeds(rank: int, seed: int, size: int) -> dict[str, np.ndarray]:
    shape = [2, 6, size, 9][: rank + 2]
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("rank", [1, 2])
def test_every_attribute(rank: int) -> None:
    cases = [feeds(rank, 1, 7), feeds(rank, 2, 12)]
    imported = assert_matches(convolutions(rank), cases)
    assert not imported.shapes
    grouped = [reason for _, reason in imported.others.values() if "groups" in reason]
    assert grouped == ["a convolution of 2 groups"] * (rank - 1)
    products = assert_matches(convolutions(rank), cases, convolutions=lambda name: True)
    assert set(weight_products(products).values()) == {1}
    assert len(products.shapes) == sum(len(taps) == rank for taps, _ in ATTRIBUTES) - len(grouped)


def test_only_those_named_become_matrices() -> None:
    imported = import_onnx(convolutions(2), convolutions=lambda name: name == "block.5.weight")
    assert imported.shapes == {"block.5.weight": (4, 36)}
    assert imported.others["block.3.weight"] == ((4, 6, 1, 1), "a convolution, ternary only if layers names it")


def network(inputs: int, outputs: int, weight: np.ndarray | None = None) -> onnx.ModelProto:
    """Two convolutions and a classifier; or, given the weight of the first, that as a product of rows."""
    g = GraphBuilder("network")
    bias = g.constant(np.linspace(-1, 1, outputs, dtype=np.float32))
    if weight is not None:
        rows = g.input("rows", FLOAT, ["m", weight.shape[0]])
        y = g.node("MatMul", rows, g.constant(weight, "features.0.weight"))
        g.node("Add", y, bias, output="y")
        g.output("y", FLOAT, ["m", outputs])
        return g.model()
    x = g.input("x", FLOAT, ["batch", inputs, 5, 8])
    first = g.weight("features.0.weight", outputs, inputs, 3, 3)
    y = g.node("Conv", x, first, bias, pads=[1, 1, 1, 1], output="y")
    z = g.node("Conv", g.node("Relu", y), g.weight("features.1.weight", 16, outputs, 1, 1))
    pooled = g.node("Flatten", g.node("GlobalAveragePool", z))
    g.node("MatMul", pooled, g.weight("head.weight", 16, 3), output="scores")
    g.output("y", FLOAT, ["batch", outputs, 5, 8])
    g.output("scores", FLOAT, ["batch", 3])
    return g.model()


def compiled(model: onnx.ModelProto, folder: Path, name: str, **options: Any) -> Artifact:
    onnx.save(model, folder / f"{name}.onnx")
    return compile(folder / f"{name}.onnx", folder / f"{name}.so", **options)


def test_ternary_convolutions_are_exactly_their_products(tmp_path: Path) -> None:
    model = network(20, 24)
    artifact = compiled(model, tmp_path, "images", scheme="t2a8g64", layers="features")
    schemes = {layer.name: layer.scheme for layer in artifact.manifest.layers}
    assert schemes == {"features.0.weight": "t2a8g64", "features.1.weight": "t2a8g64", "head.weight": None}
    x = np.random.default_rng(3).standard_normal((2, 20, 5, 8)).astype(np.float32)
    image, _ = load(artifact.path).run(None, {"x": x})
    # What lies under the taps, channels last, is the row of a pixel.
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    padded = np.pad(x.transpose(0, 2, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).transpose(0, 1, 2, 4, 5, 3).reshape(-1, 180)
    matrix = stored["features.0.weight"].transpose(2, 3, 1, 0).reshape(180, 24)
    product = compiled(network(20, 24, matrix), tmp_path, "rows", scheme="t2a8g64")
    (expected,) = load(product.path).run(None, {"rows": np.ascontiguousarray(rows)})
    np.testing.assert_array_equal(image, expected.reshape(2, 5, 8, 24).transpose(0, 3, 1, 2))


def test_convolutions_stay_float_unless_they_are_named(tmp_path: Path) -> None:
    artifact = compiled(network(20, 24), tmp_path, "images", scheme="t2a8g64")
    layers = {layer.name: (layer.scheme, layer.reason) for layer in artifact.manifest.layers}
    why = "a convolution, ternary only if layers names it"
    assert layers["features.0.weight"] == layers["features.1.weight"] == (None, why)
    with pytest.raises(OptionError, match=r"layers 'conv'.*matches no matrix"):
        compiled(network(20, 24), tmp_path, "none", layers="conv")


def test_convolutions_are_calibrated_as_matrices_are(tmp_path: Path) -> None:
    onnx.save(network(20, 24), tmp_path / "images.onnx")
    random = np.random.default_rng(4)
    images = [{"x": random.standard_normal((2, 20, 5, 8)).astype(np.float32)} for _ in range(2)]
    options: dict[str, Any] = {"scheme": "t2a8g64", "layers": "features", "calibration": images}
    quantized = quantize_model(tmp_path / "images.onnx", tmp_path / "folder", **options)
    errors = {layer.name: layer.output_error for layer in quantized.layers if layer.scheme is not None}
    assert errors.keys() == {"features.0.weight", "features.1.weight"}
    assert all(error is not None and error < 0.2 for error in errors.values())
    artifact = compile(tmp_path / "folder", tmp_path / "folder.so")
    assert {layer.name for layer in artifact.manifest.layers if layer.scheme is not None} == errors.keys()
