"""Branches that a known condition chooses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.graph.onnx.running import assert_matches
from tests.models import BOOL, FLOAT, GraphBuilder


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
