"""Fused products and those with packed weights, against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.onnx.operators.contrib.models import Model, floats
from tests.graph.onnx.running import assert_matches, weight_products
from tests.models import FLOAT
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8


def test_fused_matmul() -> None:
    """With weights and between activations, each turned in every way."""
    g = Model()
    x, y = g.input("x", FLOAT, ["b", 3, 4, 5]), g.input("y", FLOAT, ["b", 3, 5, 4])
    for a, b in ((0, 0), (1, 1)):
        left, right = (y, x) if a else (x, y)
        g.add("FusedMatMul", left, right, transA=a, transB=b, alpha=0.5)
    g.add("FusedMatMul", x, g.weight("w.weight", 7, 5), transB=1, alpha=2.0)
    g.add("FusedMatMul", g.input("v", FLOAT, [4, 2, 5]), g.input("w", FLOAT, [2, 5, 6]), transBatchA=1)
    g.add("FusedGemm", g.input("z", FLOAT, ["rows", 5]), "w.weight", g.weight("c.bias", 7), transB=1, activation="Relu")
    g.add("FusedGemm", "z", "w.weight", transB=1, alpha=0.5, activation="LeakyRelu", activation_alpha=0.1)
    feeds = {"x": floats(3, 3, 4, 5), "y": floats(3, 3, 5, 4)}
    imported = assert_matches(g.model(), [feeds | {"v": floats(4, 2, 5), "w": floats(2, 5, 6), "z": floats(2, 5)}])
    assert sum(weight_products(imported).values()) == 3


def packed(g: Model, name: str, codes: np.ndarray, bits: int, block: int) -> str:
    """Codes (N, K) as ``MatMulNBits`` stores them: the first in the low bits of a byte, blocks padded with zeros."""
    n, k = codes.shape
    blocks = -(-k // block)
    whole = np.zeros((n, blocks * block), np.uint8)
    whole[:, :k] = codes
    return g.constant(pack(whole, bits).reshape(n, blocks, block * bits // 8), name)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    parts = np.pad(codes, [(0, 0), (0, -codes.shape[1] % per_byte)]).reshape(codes.shape[0], -1, per_byte)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts << shifts, axis=-1).astype(np.uint8)


def test_matmul_nbits() -> None:
    """Every width, with and without zero points and bias, K no multiple of the block; which of them are ternary."""
    g, random = Model(), np.random.default_rng(0)
    n, k = 24, 80
    x = g.input("x", FLOAT, ["batch", "length", k])
    scales = {block: g.constant(random.uniform(0.1, 1, n * -(-k // block)).astype(np.float32)) for block in (16, 32)}
    zeros = {
        bits: g.constant(pack(random.integers(0, 2**bits, (n, 3), np.uint8), bits).reshape(-1)) for bits in (2, 4, 8)
    }
    for bits in (2, 4, 8):
        for zero, block in (("", 16), (zeros[bits], 32)):
            codes = random.integers(0, 2**bits, (n, k), np.uint8)
            name = f"codes{bits}{'_zero' if zero else ''}.weight"
            weight = packed(g, name, codes, bits, block)
            g.add("MatMulNBits", x, weight, scales[block], zero, N=n, K=k, bits=bits, block_size=block)
    ternary = packed(g, "ternary4.weight", random.integers(7, 10, (n, k), np.uint8), 4, 32)
    g.add("MatMulNBits", x, ternary, scales[32], "", "", g.weight("b", n), N=n, K=k, bits=4, block_size=32)
    halves = g.constant(np.full((n, 3), 1.5, np.float32))
    weight = packed(g, "halves.weight", random.integers(0, 4, (n, k), np.uint8), 2, 32)
    g.add("MatMulNBits", x, weight, scales[32], halves, N=n, K=k, bits=2, block_size=32)
    imported = assert_matches(g.model(), [{"x": floats(2, 3, k)}])
    planes = {name: weight.num_planes for name, weight in imported.ternary.items()}
    assert planes == {"codes2.weight": 2, "codes2_zero.weight": 2, "ternary4.weight": 1, "halves.weight": 2}
    assert set(weight_products(imported).values()) == {1}
    assert len(imported.params) == 8


@pytest.mark.parametrize(
    ("attributes", "inputs", "message"),
    [
        ({"bits": 3}, 3, "codes of 3 bits, which do not divide a byte"),
        ({"N": 7}, 3, r"weight \[4, 1, 8\] and scales \[4\] do not fit N 7 and K 16"),
        ({}, 5, r"its columns are in another order \(g_idx\)"),
        ({"weight_prepacked": 1}, 3, "its weight is packed for one device"),
    ],
)
def test_refusals(attributes: dict[str, int], inputs: int, message: str) -> None:
    g = Model()
    weight = [g.constant(np.zeros((4, 1, 8), np.uint8)), g.constant(np.ones(4, np.float32))]
    names = [g.input("x", FLOAT, [2, 16]), *weight, "", g.constant(np.zeros(16, np.int32))]
    g.add("MatMulNBits", *names[:inputs], **{"N": 4, "K": 16, "bits": 4, "block_size": 16} | attributes)
    with pytest.raises(UnsupportedOperatorError, match=message):
        import_onnx(g.model())


def test_products_of_integers() -> None:
    """Rounded while the model runs, or before; scale and zero point of the matrix, or of each of its columns."""
    g, random = Model(), np.random.default_rng(1)
    x = g.input("x", FLOAT, ["batch", 3, 10])
    weight = g.constant(random.integers(-127, 128, (10, 6), np.int8), "fc.weight")
    columns = g.constant(random.uniform(0.01, 0.02, 6).astype(np.float32))
    zeros, one = g.constant(random.integers(-5, 6, 6, np.int8)), g.constant(np.array([0.02], np.float32))
    bias = g.weight("fc.bias", 6)
    g.add("DynamicQuantizeMatMul", x, weight, one)
    g.add("DynamicQuantizeMatMul", x, weight, columns, zeros, bias)
    q, scale = g.input("q", UINT8, ["batch", 3, 10]), g.input("scale", FLOAT, [1])
    g.add("MatMulIntegerToFloat", q, weight, scale, columns, g.constant(np.array([128], np.uint8)), zeros, bias)
    s = g.input("s", INT8, ["batch", 10, 6])
    g.add("MatMulIntegerToFloat", q, s, scale, one, g.input("zero", UINT8, [1]))
    feeds = {
        "x": floats(2, 3, 10),
        "q": random.integers(0, 256, (2, 3, 10), np.uint8),
        "s": random.integers(-128, 128, (2, 10, 6), np.int8),
        "scale": np.array([0.03], np.float32),
        "zero": np.array([100], np.uint8),
    }
    imported = assert_matches(g.model(), [feeds])
    assert sum(weight_products(imported).values()) == 3


def test_fused_convolutions() -> None:
    g = Model()
    x, z = g.input("x", FLOAT, ["batch", 3, 6, 6]), g.input("z", FLOAT, ["batch", 4, 6, 6])
    weights = [g.weight("conv.weight", 4, 3, 3, 3), g.weight("conv.bias", 4)]
    pads = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    g.add("FusedConv", x, *weights, activation="Relu", **pads)
    g.add("FusedConv", x, *weights, z, activation="Relu", **pads)
    g.add("FusedConv", x, *weights, activation="LeakyRelu", activation_params=[0.2], strides=[2, 2], **pads)
    g.add("FusedConv", x, *weights, activation="Clip", activation_params=[-0.1, 0.3], **pads)
    g.add("FusedConv", x, *weights, activation="HardSigmoid", activation_params=[0.3, 0.4], **pads)
    assert_matches(g.model(), [{"x": floats(2, 3, 6, 6), "z": floats(2, 4, 6, 6)}])
