"""Branches and loops against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from tests.graph.onnx.running import assert_matches, weight_products
from tests.models import BOOL, FLOAT, INT64, GraphBuilder
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx


class Body(GraphBuilder):
    """A graph inside a node; its values have names that those of the graph around it do not have."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.path = name

    def constant(self, value: Any, name: str | None = None) -> str:
        return super().constant(value, name or f"{self.name}_const_{len(self.initializers)}")

    def graph(self) -> onnx.GraphProto:
        return onnx.helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)


def branches(yes: Body, no: Body) -> dict[str, onnx.GraphProto]:
    return {"then_branch": yes.graph(), "else_branch": no.graph()}


def conditional(shape: list[int | str | None] | None = None) -> onnx.ModelProto:
    """One of two layers by a computed condition, and a value from the graph around them."""
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["batch", 4])
    total = g.node("ReduceSum", x, keepdims=0)
    condition = g.node("Greater", total, g.constant(0.0))
    yes, no = Body("yes"), Body("no")
    for body, name in ((yes, "yes"), (no, "no")):
        body.node("MatMul", x, g.weight(f"{name}.weight", 4, 4), output=f"{name}_y")
        body.output(f"{name}_y", FLOAT)
    shift = yes.node("Add", total, yes.constant(1.0), output="yes_shift")
    yes.output(shift, FLOAT)
    no.output(no.node("Identity", total, output="no_shift"), FLOAT)
    g.nodes_of("If", condition, outputs=["y", "shift"], **branches(yes, no))
    g.output("y", FLOAT, ["batch", 4])
    g.output("shift", FLOAT, [])
    return g.model()


def test_a_condition_of_the_data_chooses() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    imported = assert_matches(conditional(), [{"x": abs(x)}, {"x": -abs(x)}])
    assert weight_products(imported) == {"yes.weight": 1, "no.weight": 1}


def test_branches_of_different_shapes_are_refused() -> None:
    g = GraphBuilder()
    x, flag = g.input("x", FLOAT, ["batch", 4]), g.input("flag", BOOL, [])
    yes, no = Body("yes"), Body("no")
    yes.output(yes.node("Transpose", x, output="turned"), FLOAT)
    no.output(no.node("Identity", x, output="same"), FLOAT)
    g.node("If", flag, output="y", **branches(yes, no))
    g.output("y", FLOAT, [None, None])
    with pytest.raises(
        UnsupportedOperatorError, match=r"give \[4, batch\] and \[batch, 4\], which have to be the same"
    ):
        import_onnx(g.model())
    assert import_onnx(g.model(), constants={"flag": True}).outputs[0].shape == (4, "batch")


def looped(steps: int, stops: str = "never", scans: bool = True, condition: bool = True) -> onnx.ModelProto:
    """A recurrence h = tanh(h W + step), its states stacked; it stops never, behind 3 steps, or by its data."""
    g = GraphBuilder()
    h = g.input("h", FLOAT, ["batch", 4])
    body = Body("body")
    body.inputs = [
        onnx.helper.make_tensor_value_info("step", INT64, []),
        onnx.helper.make_tensor_value_info("going", BOOL, []),
        onnx.helper.make_tensor_value_info("state", FLOAT, None),
    ]
    product = body.node("MatMul", "state", g.weight("cell.weight", 4, 4))
    number = body.node("Cast", "step", to=FLOAT)
    fresh = body.node("Tanh", body.node("Add", product, number), output="fresh")
    if stops == "never":
        more = body.node("Identity", "going", output="more")
    elif stops == "counted":
        more = body.node("Less", "step", body.constant(2), output="more")
    else:
        size = body.node("ReduceSum", fresh, keepdims=0)
        more = body.node("Less", size, body.constant(4.0), output="more")
    body.output(more, BOOL)
    body.output(fresh, FLOAT)
    if scans:
        body.output(body.node("Mul", fresh, number, output="row"), FLOAT)
    inputs = [g.constant(steps), g.constant(np.array(condition)), h]
    g.nodes_of("Loop", *inputs, outputs=["last", "rows"][: 1 + scans], body=body.graph())
    g.output("last", FLOAT, ["batch", 4])
    if scans:
        g.output("rows", FLOAT, [None, "batch", 4])
    return g.model()


H = {"h": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}


@pytest.mark.parametrize(("stops", "steps"), [("never", 4), ("counted", 3)])
def test_a_loop_is_unrolled(stops: str, steps: int) -> None:
    imported = assert_matches(looped(4, stops), [H])
    assert weight_products(imported) == {"cell.weight": steps}
    assert imported.outputs[1].shape == (steps, "batch", 4)


def test_steps_behind_the_end_change_nothing() -> None:
    imported = assert_matches(looped(6, "data", scans=False), [H, {"h": H["h"] * 3}, {"h": H["h"] - 2}])
    assert weight_products(imported) == {"cell.weight": 6}


def test_a_loop_without_steps() -> None:
    assert_matches(looped(5, scans=False, condition=False), [H])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (looped(2000), "2000 steps are more than the 1024 that are unrolled"),
        (looped(2000, "data", scans=False), "how many steps it has depends on the model's data"),
        (looped(4, "data"), "how many rows its scan outputs have depends on the model's data"),
    ],
)
def test_refused_loops(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        import_onnx(model)


def scanned(steps: int | str, **attributes: Any) -> onnx.ModelProto:
    """A state that is updated by the rows of two inputs."""
    g = GraphBuilder()
    state = g.input("h", FLOAT, ["batch", 4])
    first, second = g.input("a", FLOAT, [steps, "batch", 4]), g.input("b", FLOAT, ["batch", steps, 4])
    body = Body("body")
    for name in ("s", "p", "q"):
        body.input(name, FLOAT, None)
    product = body.node("MatMul", "s", g.weight("cell.weight", 4, 4))
    total = body.node("Tanh", body.node("Sum", product, "p", "q"), output="fresh")
    body.output(total, FLOAT)
    body.output(body.node("Neg", total, output="row"), FLOAT)
    g.nodes_of(
        "Scan",
        *(state, first, second),
        outputs=["last", "rows"],
        body=body.graph(),
        num_scan_inputs=2,
        scan_input_axes=[0, 1],
        **attributes,
    )
    g.output("last", FLOAT, ["batch", 4])
    g.output("rows", FLOAT, [None] * 3)
    return g.model()


def test_scan() -> None:
    """Forward and backward, its rows along another axis."""
    random = np.random.default_rng(0)
    feeds = {
        "a": random.standard_normal((3, 2, 4)).astype(np.float32),
        "b": random.standard_normal((2, 3, 4)).astype(np.float32),
    }
    directions = {"scan_input_directions": [0, 1], "scan_output_axes": [1], "scan_output_directions": [1]}
    imported = assert_matches(scanned(3, **directions), [H | feeds])
    assert imported.outputs[1].shape == ("batch", 3, 4)
    assert_matches(scanned("steps"), [H | feeds], dims={"steps": 3})
    with pytest.raises(UnsupportedOperatorError, match="number of steps, steps, is symbolic; fix it with --dim steps="):
        import_onnx(scanned("steps"))
