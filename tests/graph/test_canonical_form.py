"""The form that the importer gives matrices in, however they are spelled."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm

from tests.graph.onnx.running import assert_matches, weight_products
from tests.models import FLOAT, GraphBuilder, gemm, mlp
from tvm_ternary.graph.importer import import_onnx


class TestCanonicalForm:
    """However a product with a weight is spelled, it is ``matmul(x, W)`` with W a (K, N) parameter."""

    def test_mlp(self) -> None:
        random = np.random.default_rng(0)
        imported = assert_matches(mlp(), [{"x": random.standard_normal((n, 10)).astype("f4")} for n in (1, 5)])
        assert {name: w.shape for name, w in imported.params.items()} == {
            "layers.0.weight": (10, 24),
            "layers.1.weight": (24, 7),
        }

    @pytest.mark.parametrize("bias", ["row", "matrix", "scalar", "none"])
    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, -2.0), (1.0, 0.0)])
    @pytest.mark.parametrize(("trans_a", "trans_b"), [(False, False), (False, True), (True, False), (True, True)])
    def test_gemm(self, trans_a: bool, trans_b: bool, alpha: float, beta: float, bias: str) -> None:
        model = gemm(trans_a, trans_b, alpha, beta, bias)
        rows = 5 if trans_a else 3
        x = np.random.default_rng(0).standard_normal((6, rows) if trans_a else (rows, 6)).astype(np.float32)
        imported = assert_matches(model, [{"x": x}])
        assert weight_products(imported) == {"fc.weight": 1}
        stored = onnx.numpy_helper.to_array(model.graph.initializer[0])
        np.testing.assert_allclose(imported.params["fc.weight"], alpha * (stored.T if trans_b else stored), rtol=1e-6)

    @pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6)])
    def test_matmul_of_any_rank(self, shape: tuple[int, ...]) -> None:
        g = GraphBuilder()
        g.node("MatMul", g.input("x", FLOAT, shape), g.weight("w", 6, 4), output="y")
        g.output("y", FLOAT)
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        assert weight_products(assert_matches(g.model(), [{"x": x}])) == {"w": 1}

    @pytest.mark.parametrize("shape", [(6,), (6, 3), (2, 6, 3)])
    def test_a_weight_on_the_left_is_transposed(self, shape: tuple[int, ...]) -> None:
        g = GraphBuilder()
        g.node("MatMul", g.weight("w", 4, 6), g.input("x", FLOAT, shape), output="y")
        g.output("y", FLOAT)
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        imported = assert_matches(g.model(), [{"x": x}])
        assert weight_products(imported) == {"w": 1}
        assert imported.params["w"].shape == (6, 4)

    def test_weights_behind_other_nodes(self) -> None:
        g = GraphBuilder()
        x = g.input("x", FLOAT, ["rows", 6])
        quantized = g.constant(g.random.integers(-127, 127, (4, 6)).astype(np.int8), "a.weight")
        scale = g.constant(np.full(4, 0.01, np.float32), "a.scale")
        a = g.node("Transpose", g.node("DequantizeLinear", quantized, scale, axis=0), perm=[1, 0])
        half = g.node("Cast", g.constant(g.random.standard_normal((6, 4)).astype(np.float16), "b.weight"), to=FLOAT)
        leading = g.node("Reshape", g.weight("c.weight", 24), g.constant([1, 6, 4]))
        parts = [g.node("MatMul", x, weight) for weight in (a, half)]
        wide = g.node("MatMul", g.node("Unsqueeze", x, g.constant([0])), leading)
        g.node("Concat", *parts, g.node("Squeeze", wide, g.constant([0])), axis=1, output="y")
        g.output("y", FLOAT)
        x_value = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
        imported = assert_matches(g.model(), [{"x": x_value}])
        assert weight_products(imported) == {"a.weight": 1, "b.weight": 1, "c.weight": 1}
        assert {w.shape for w in imported.params.values()} == {(6, 4)}

    def test_a_weight_used_twice_is_one_parameter(self) -> None:
        g = GraphBuilder()
        x, w = g.input("x", FLOAT, ["rows", 6]), g.weight("shared", 6, 6)
        twice = g.node("MatMul", g.node("Relu", g.node("MatMul", x, w)), w)
        again = g.node("Transpose", g.node("Transpose", w, perm=[1, 0]), perm=[1, 0])
        g.node("MatMul", twice, again, output="y")
        g.output("y", FLOAT)
        imported = assert_matches(g.model(), [{"x": np.eye(6, dtype=np.float32)}])
        assert weight_products(imported) == {"shared": 3}

    def test_equal_names_are_told_apart(self) -> None:
        g = GraphBuilder()
        x = g.input("x", FLOAT, ["rows", 6])
        for _ in range(2):
            x = g.node("MatMul", x, g.weight(f"onnx::MatMul_{len(g.initializers)}", 6, 6))
            g.nodes[-1].name = "/encoder/dense/MatMul"
        g.output("y", FLOAT)
        g.nodes[-1].output[0] = "y"
        assert list(import_onnx(g.model()).params) == ["encoder.dense.weight", "encoder.dense.weight_1"]

    def test_half_precision_activations_are_widened(self) -> None:
        g = GraphBuilder()
        w = g.constant(np.random.default_rng(0).standard_normal((6, 4)).astype(np.float16), "w")
        g.node("MatMul", g.input("x", onnx.TensorProto.FLOAT16, ["rows", 6]), w, output="y")
        g.output("y", onnx.TensorProto.FLOAT16)
        x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float16)
        # float16 has 11 bits; both round the same float32 sums, the last bit may differ
        imported = assert_matches(g.model(), [{"x": x}], tolerance=2**-11)
        assert imported.params["w"].dtype == np.float32

    def test_what_is_no_matrix_is_listed_with_the_reason(self) -> None:
        g = GraphBuilder()
        x = g.input("x", FLOAT, [3, 2, 6])
        batched = g.node("MatMul", x, g.weight("experts", 3, 6, 4))
        outer = g.node("MatMul", g.weight("frequencies", 4, 1), g.node("Slice", x, *map(g.constant, ([0], [1], [1]))))
        doubled = g.node("MatMul", g.node("Cast", x, to=onnx.TensorProto.DOUBLE), g.constant(np.eye(6, 4), "wide"))
        for i, value in enumerate((batched, outer, doubled)):
            g.node("Identity", value, output=f"y{i}")
            g.output(f"y{i}", FLOAT if i < 2 else onnx.TensorProto.DOUBLE)
        x_value = np.random.default_rng(0).standard_normal((3, 2, 6)).astype(np.float32)
        imported = assert_matches(g.model(), [{"x": x_value}])
        assert imported.params == {}
        assert {name: reason for name, (_, reason) in imported.others.items()} == {
            "experts": "a different matrix for every batch",
            "wide": "its elements are float64",
        }

    def test_a_bias_comes_second_and_as_a_vector(self) -> None:
        g = GraphBuilder()
        product = g.node("MatMul", g.input("x", FLOAT, ["a", "b", 6]), g.weight("w", 6, 4))
        g.node("Add", g.weight("bias", 1, 1, 4), product, output="y")
        g.output("y", FLOAT)
        binding = import_onnx(g.model()).module["main"].body.blocks[0].bindings[1].value
        assert binding.op.name == "relax.add"
        assert isinstance(binding.args[0], tvm.relax.Var)
        assert list(binding.args[1].ty.shape) == [4]
