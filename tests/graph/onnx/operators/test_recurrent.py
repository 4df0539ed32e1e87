"""LSTM unrolled into matrices, against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.onnx.running import Compiled, assert_matches, relative_error, weight_products
from tests.models import FLOAT, GraphBuilder, lstm
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx


def feeds(batch: int, ways: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    state = {name: random.standard_normal((ways, batch, 8)).astype(np.float32) for name in ("h", "c")}
    return {"x": random.standard_normal((5, batch, 6)).astype(np.float32)} | state


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_directions(direction: str, state: bool) -> None:
    ways = 2 if direction == "bidirectional" else 1
    imported = assert_matches(lstm(direction, state=state), [feeds(batch, ways) for batch in (1, 3)])
    names = ["rnn.weight_ih", "rnn.weight_hh", "rnn.weight_ih_reverse", "rnn.weight_hh_reverse"][: 2 * ways]
    assert weight_products(imported) == {name: 1 if "_ih" in name else 5 for name in names}
    assert imported.params["rnn.weight_ih"].shape == (6, 32)
    assert imported.outputs[0].shape == (5, ways, "batch", 8)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_batch_first(direction: str) -> None:
    """onnxruntime has no layout 1: compare with layout 0 on the transposed input."""
    first, second = (Compiled(import_onnx(lstm(direction, layout=layout, state=False))) for layout in (0, 1))
    x = feeds(3, 1)["x"]
    want, got = first({"x": x}), second({"x": x.transpose(1, 0, 2)})
    assert relative_error(got[0], want[0].transpose(2, 0, 1, 3)) == 0.0
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert relative_error(ours, theirs.transpose(1, 0, 2)) == 0.0


def test_steps_fixed_by_dims() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"the number of steps, steps, is symbolic; fix it with --dim"):
        import_onnx(lstm(steps="steps"))
    imported = assert_matches(lstm(steps="steps"), [feeds(2, 1)], dims={"steps": 5})
    assert imported.inputs[0].shape == (5, "batch", 6)


def variant(lengths: list[int] | None = None, peepholes: bool = False, **attributes: object) -> onnx.ModelProto:
    g = GraphBuilder()
    weights = [g.weight("w", 1, 32, 6), g.weight("r", 1, 32, 8)]
    optional = ["" if lengths is None else g.constant(np.array(lengths, np.int32)), "", ""]
    inputs = [g.input("x", FLOAT, [5, 2, 6]), *weights, "", *optional, g.weight("p", 1, 24) if peepholes else ""]
    g.nodes_of("LSTM", *inputs, outputs=["y"], hidden_size=8, **attributes)
    g.output("y", FLOAT)
    return g.model()


def test_lengths_that_are_all_the_steps() -> None:
    assert_matches(variant(lengths=[5, 5]), [feeds(2, 1)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (variant(lengths=[5, 3]), "sequences of different lengths"),
        (variant(peepholes=True), "peephole weights are given"),
        (variant(activations=["Relu", "Tanh", "Tanh"]), r"activations \['relu', 'tanh', 'tanh'\] are not"),
        (variant(clip=1.0), "attribute clip is set"),
        (variant(input_forget=1), "attribute input_forget is set"),
        (lstm(steps=2000, state=False), "2000 steps are more than the 1024 that are unrolled"),
    ],
)
def test_refusals(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        import_onnx(model)
