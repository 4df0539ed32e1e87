"""``Pad`` by amounts that hang on the size of an input."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graph.onnx.running import assert_matches, run_reference
from tests.models import FLOAT, GraphBuilder


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_symbolic_amounts(mode: str) -> None:
    """As many rows before as the input has, one behind, along the first of two axes."""
    g = GraphBuilder(opset=19)
    x = g.input("x", FLOAT, ["n", 3])
    amounts = g.node("Concat", g.dim(x, 0), g.constant([1]), axis=0)
    fill = g.input("fill", FLOAT, []) if mode == "constant" else ""
    g.node("Pad", x, amounts, fill, g.constant([0]), output="y", mode=mode)
    g.output("y", FLOAT)
    cases = [{"x": np.arange(3.0 * n, dtype=np.float32).reshape(n, 3), "fill": np.float32(7)} for n in (2, 5)]
    imported = assert_matches(g.model(), cases, run=run_reference)
    assert imported.outputs[0].shape == ("n * 2 + 1", 3)
