"""What the importer says of a model, what it lets one choose, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from onnx import helper

from tests.graph.onnx.running import assert_matches
from tests.models import FLOAT, INT64, GraphBuilder, gpt2, llama
from tvm_ternary.errors import ModelError, OptionError, UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx


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
        for dtype, name in ((onnx.TensorProto.STRING, "strings"), (onnx.TensorProto.FLOAT8E4M3FN, "float8_e4m3fn")):
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
