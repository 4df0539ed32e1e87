"""Operators between 8-bit tensors, against onnxruntime: at most one step apart, where a half is rounded."""

from __future__ import annotations

import numpy as np
import onnx

from tests.graph.onnx.operators.contrib.models import Model, floats
from tests.graph.onnx.running import Compiled, run_onnxruntime, weight_products
from tests.models import FLOAT
from tvm_ternary.graph.importer import import_onnx

UINT8, INT8 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8


def test_operators() -> None:
    g, random = Model(), np.random.default_rng(0)
    x, y = (g.input(name, UINT8, ["batch", 4, 3, 3]) for name in "xy")
    one, two = ([g.constant(np.float32(s)), g.constant(np.uint8(z))] for s, z in ((0.02, 120), (0.03, 100)))
    end = [g.constant(np.float32(0.04)), g.constant(np.uint8(110))]
    unit = [g.constant(np.float32(1 / 255)), g.constant(np.uint8(0))]
    dtypes = [UINT8]
    g.add("QLinearAdd", x, *one, y, *two, *end, dtypes=dtypes)
    g.add("QLinearMul", x, *one, y, *two, *end, dtypes=dtypes)
    g.add("QLinearSigmoid", x, *one, *unit, dtypes=dtypes)
    g.add("QLinearLeakyRelu", x, *one, *end, dtypes=dtypes, alpha=0.1)
    g.add("QLinearGlobalAveragePool", x, *one, *end, dtypes=dtypes)
    g.add("QLinearConcat", *end, x, *one, y, *two, dtypes=dtypes, axis=1)
    flat = g.input("flat", UINT8, ["batch", 8])
    weight = g.constant(random.integers(-127, 128, (6, 8), np.int8), "fc.weight")
    columns = [g.constant(random.uniform(0.001, 0.002, 6).astype(np.float32)), g.constant(np.zeros(6, np.int8))]
    bias = g.constant(random.integers(-500, 500, 6, np.int32))
    g.add("QGemm", flat, *one, weight, *columns, bias, *end, dtypes=dtypes, transB=1)
    g.add("QGemm", flat, *one, weight, *columns, bias, transB=1)
    g.add("QuantizeLinear", g.input("f", FLOAT, ["batch", 5]), *one, dtypes=dtypes)
    g.add("DequantizeLinear", flat, *one)
    feeds = {name: random.integers(0, 256, (2, 4, 3, 3), np.uint8) for name in "xy"}
    feeds |= {"flat": random.integers(0, 256, (2, 8), np.uint8), "f": floats(2, 5)}
    imported = import_onnx(g.model())
    assert weight_products(imported) == {"fc.weight": 2}
    for got, want in zip(Compiled(imported)(feeds), run_onnxruntime(g.model(), feeds), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert np.abs(got.astype(np.float64) - want).max() <= (1e-5 if want.dtype.kind == "f" else 1)
