"""LSTM, GRU and RNN unrolled into matrices, against onnxruntime."""

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


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def variant(op: str = "LSTM", given: tuple[str, ...] = (), steps: int = 3, **attributes: object) -> onnx.ModelProto:
    """A layer of 6 inputs and 8 features on 2 sequences, with the optional inputs that are given."""
    g = GraphBuilder()
    ways, gates = (2 if attributes.get("direction") == "bidirectional" else 1), GATES[op]
    inputs = [g.input("x", FLOAT, [steps, 2, 6]), g.weight("w", ways, gates * 8, 6), g.weight("r", ways, gates * 8, 8)]
    inputs.append(g.weight("b", ways, 2 * gates * 8))
    inputs.append(g.input("lengths", onnx.TensorProto.INT32, [2]) if "lengths" in given else "")
    inputs.append(g.input("h", FLOAT, [ways, 2, 8]) if "h" in given else "")
    if "p" in given:
        inputs += ["", g.weight("p", ways, 3 * 8)]
    g.nodes_of(op, *inputs, outputs=["y", "y_h"], hidden_size=8, **attributes)
    g.output("y", FLOAT)
    g.output("y_h", FLOAT)
    return g.model()


def values(ways: int = 1, steps: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    arrays = {"x": random.standard_normal((steps, 2, 6)), "h": random.standard_normal((ways, 2, 8))}
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {"lengths": np.array([3, 2], np.int32)}


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LSTM", {"direction": "bidirectional"}),
        ("GRU", {"direction": "bidirectional", "linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 0, "clip": 0.5}),
        ("RNN", {"direction": "reverse", "activations": ["Relu"]}),
    ],
)
def test_sequences_of_different_lengths(op: str, attributes: dict[str, object]) -> None:
    """Lengths are an input; with a state to start from."""
    ways = 2 if attributes.get("direction") == "bidirectional" else 1
    assert_matches(variant(op, ("lengths", "h"), **attributes), [values(ways)])


def test_peepholes() -> None:
    assert_matches(variant(given=("p",)), [values()])


def test_products_of_a_gru_are_matrices() -> None:
    """Where the reset gate acts on the product there is one for all gates, else the candidate has its own."""
    counts = weight_products(import_onnx(variant("GRU", linear_before_reset=1)))
    assert sorted(counts.values()) == [1, 3]
    imported = import_onnx(variant("GRU", linear_before_reset=0))
    assert sorted(weight_products(imported).values()) == [1, 3, 3]
    assert sorted(array.shape for array in imported.params.values()) == [(6, 24), (8, 8), (8, 16)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            variant(activations=["Elu", "Tanh", "Tanh"]),
            r"activations \['elu', 'tanh', 'tanh'\]: expected 3",
        ),
        (variant(activations=["Tanh"]), r"activations \['tanh'\]: expected 3"),
        (variant(input_forget=1), "attribute input_forget is set"),
        (variant("GRU", direction="sideways"), "direction sideways with weights of 1"),
        (lstm(steps=2000, state=False), "2000 steps are more than the 1024 that are unrolled"),
    ],
)
def test_refusals(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        import_onnx(model)
