"""From operators to fused TensorIR."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tests.models import INT64, GraphBuilder
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.importer import import_onnx


def test_positions_behind_a_past_are_computed_by_a_function_of_their_own() -> None:
    """The first of them is a number that no shape holds; fused with others it would come twice, and TVM would fail."""
    g = GraphBuilder()
    past, ids = (g.input(name, INT64, ["batch", name]) for name in ("past", "length"))
    count = [g.node("Gather", g.node("Shape", name), g.constant(1), axis=0) for name in (past, ids)]
    places = g.node("Range", count[0], g.node("Add", *count), g.constant(1))
    g.node("Add", ids, g.node("Unsqueeze", places, g.constant([0])), output="y")
    g.output("y", INT64, ["batch", "length"])
    module = lower_graph_ops(import_onnx(g.model()).module)
    main = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())["main"]
    feeds = [tvm.runtime.tensor(np.zeros((2, size), np.int64)) for size in (5, 3)]
    np.testing.assert_array_equal(main(*feeds)[0].numpy(), [[5, 6, 7]] * 2)
