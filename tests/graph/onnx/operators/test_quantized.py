"""Quantized tensors and products: weights that are known become matrices."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.onnx.running import Compiled, assert_matches, run_reference, weight_products
from tests.models import FLOAT, GraphBuilder
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

UINT8, INT8, INT32 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32


def integers(low: int, high: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(low, high, shape).astype(dtype)


def test_a_product_of_integers_is_one_with_a_matrix() -> None:
    g = GraphBuilder(opset=17)
    weight = g.constant(integers(-128, 128, 200, 6, dtype=np.int8), "w")
    zeros = [g.constant(np.array(128, np.uint8)), g.constant(integers(-4, 5, 6, dtype=np.int8))]
    g.node("MatMulInteger", g.input("x", UINT8, ["batch", 3, 200]), weight, *zeros, output="y")
    g.output("y", INT32)
    imported = assert_matches(g.model(), [{"x": integers(0, 256, batch, 3, 200)} for batch in (1, 4)])
    assert weight_products(imported) == {"w": 1}


def test_quantized_product_and_convolution() -> None:
    g = GraphBuilder(opset=17)
    scale, zero = g.constant(np.float32(0.05)), g.constant(np.array(120, np.uint8))
    x = g.input("x", UINT8, ["batch", 4, 7, 7])
    kernel = g.constant(integers(-128, 128, 8, 4, 3, 3, dtype=np.int8))
    scales, zeros = g.constant(np.linspace(0.01, 0.02, 8).astype(np.float32)), g.constant(np.zeros(8, np.int8))
    bias = g.constant(integers(-900, 900, 8, dtype=np.int32))
    inputs = [x, scale, zero, kernel, scales, zeros, scale, zero, bias]
    g.node("QLinearConv", *inputs, output="image", pads=[1, 1, 1, 1], strides=[2, 2])
    weight = [g.constant(integers(-128, 128, 5, 6, dtype=np.int8), "w"), g.constant(np.float32(0.01))]
    weight.append(g.constant(np.zeros((), np.int8)))
    rows = g.input("rows", UINT8, ["batch", 3, 5])
    g.node("QLinearMatMul", rows, scale, zero, *weight, scale, zero, output="product")
    g.output("image", UINT8)
    g.output("product", UINT8)
    imported = import_onnx(g.model())
    assert weight_products(imported) == {"w": 1}
    compiled = Compiled(imported)
    for batch in (1, 3):
        feeds = {"x": integers(0, 256, batch, 4, 7, 7), "rows": integers(0, 256, batch, 3, 5)}
        for got, want in zip(compiled(feeds), run_reference(g.model(), feeds), strict=True):
            # A sum that lies between two integers may be rounded to either.
            assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
            assert (got != want).mean() < 0.05


@pytest.mark.parametrize("width", [12, 10])
def test_blocks_along_an_axis(width: int) -> None:
    """The last block may be shorter. Activations go there and back; the scales are an input."""
    g = GraphBuilder(opset=23)
    x, scale = g.input("x", FLOAT, ["n", width]), g.input("scale", FLOAT, ["n", 3])
    zero = g.input("zero", INT8, ["n", 3])
    codes = g.node("QuantizeLinear", x, scale, zero, output="codes", axis=1, block_size=4)
    g.node("DequantizeLinear", codes, scale, zero, output="y", axis=1, block_size=4)
    g.output("codes", INT8)
    g.output("y", FLOAT)
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal((2, width)).astype(np.float32), "zero": integers(-9, 9, 2, 3, dtype=np.int8)}
    feeds["scale"] = random.uniform(0.01, 0.02, (2, 3)).astype(np.float32)
    assert_matches(g.model(), [feeds], run=run_reference)


def test_types_that_are_not_carried_are_refused() -> None:
    g = GraphBuilder(opset=23)
    g.node("QuantizeLinear", g.input("x", FLOAT, [4]), g.constant(1.0), output="y", output_dtype=onnx.TensorProto.INT4)
    g.output("y", onnx.TensorProto.INT4)
    with pytest.raises(UnsupportedOperatorError, match="elements of int4; expected one of int16, int8, uint16, uint8"):
        import_onnx(g.model())
