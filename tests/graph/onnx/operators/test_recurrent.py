"""LSTM, GRU and RNN, unrolled into matrices or as loops over an open number of steps, against onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import tvm_ternary
from tests.graph.onnx.running import Compiled, assert_matches, relative_error, weight_products
from tests.models import FLOAT, GraphBuilder, lstm
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx


def feeds(batch: int, ways: int, steps: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    state = {name: random.standard_normal((ways, batch, 8)).astype(np.float32) for name in ("h", "c")}
    return {"x": random.standard_normal((steps, batch, 6)).astype(np.float32)} | state


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
    assert import_onnx(lstm(steps="steps")).inputs[0].shape == ("steps", "batch", 6)
    imported = assert_matches(lstm(steps="steps"), [feeds(2, 1)], dims={"steps": 5})
    assert imported.inputs[0].shape == (5, "batch", 6)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def variant(
    op: str = "LSTM", given: tuple[str, ...] = (), steps: int | str = 3, **attributes: object
) -> onnx.ModelProto:
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
    ],
)
def test_refusals(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        import_onnx(model)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_open_steps(direction: str, state: bool) -> None:
    """The inputs' products stay matrices; those of the states are listed as what they are."""
    ways = 2 if direction == "bidirectional" else 1
    sizes = [(1, 1), (2, 3), (9, 1), (9, 5)]
    cases = [feeds(batch, ways, steps) for steps, batch in sizes]
    imported = assert_matches(lstm(direction, steps="steps", state=state), cases)
    names = ["rnn.weight_ih", "rnn.weight_ih_reverse"][:ways]
    assert weight_products(imported) == dict.fromkeys(names, 1)
    reason = "multiplied inside the loop over steps steps, in float"
    assert imported.others == {name.replace("_ih", "_hh"): ((32, 8), reason) for name in names}
    assert imported.outputs[0].shape == ("steps", ways, "batch", 8)


@pytest.mark.parametrize(
    ("op", "given", "attributes"),
    [
        ("LSTM", ("p",), {"direction": "bidirectional", "clip": 0.4}),
        ("LSTM", ("lengths", "h"), {"direction": "bidirectional", "activations": ["Tanh", "Relu", "Sigmoid"] * 2}),
        ("GRU", ("lengths", "h"), {"direction": "bidirectional", "linear_before_reset": 1}),
        ("GRU", ("lengths", "h"), {"direction": "reverse", "linear_before_reset": 0, "clip": 0.5}),
        ("RNN", ("lengths",), {"direction": "bidirectional", "activations": ["Relu", "Tanh"]}),
        ("RNN", ("h",), {"activations": ["Softplus"]}),
    ],
)
def test_variants_over_open_steps(op: str, given: tuple[str, ...], attributes: dict[str, object]) -> None:
    ways = 2 if attributes.get("direction") == "bidirectional" else 1
    model = variant(op, given, "steps", **attributes)
    assert_matches(model, [values(ways, steps) for steps in (3, 8)])


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_open_steps_batch_first(direction: str) -> None:
    """As with a known number of them."""
    known, several = (Compiled(import_onnx(lstm(direction, steps, layout=1))) for steps in (5, "steps"))
    given = feeds(3, 2 if direction == "bidirectional" else 1)
    arrays = {"x": given["x"].transpose(1, 0, 2), **{name: given[name].transpose(1, 0, 2) for name in "hc"}}
    for ours, theirs in zip(several(arrays), known(arrays), strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= 1e-6


def test_more_steps_than_are_unrolled() -> None:
    model = lstm(steps=2000, state=False)
    imported = assert_matches(model, [{"x": feeds(1, 1, 2000)["x"]}])
    assert imported.others["rnn.weight_hh"][1] == "multiplied inside the loop over 2000 steps, in float"


def test_parts_of_a_gru_over_open_steps() -> None:
    imported = import_onnx(variant("GRU", steps="steps", linear_before_reset=0))
    assert {name: shape for name, (shape, _) in imported.others.items()} == {
        "r_gates": (16, 8),
        "r_candidate": (8, 8),
    }


def test_a_compiled_loop_says_what_its_matrix_became(tmp_path: Path) -> None:
    """Its library serves any number of steps; the inputs' matrix is ternary, as in all layers."""
    source = tmp_path / "model.onnx"
    onnx.save(lstm(steps="steps"), source)
    manifest = tvm_ternary.compile(source, tmp_path / "model.so", layers="all").manifest
    layers = {layer.name: (layer.became, layer.reason) for layer in manifest.layers}
    reason = "multiplied inside the loop over steps steps, in float"
    assert layers == {"rnn.weight_ih": ("ternary", None), "rnn.weight_hh": ("float32", reason)}
    assert "rule:recurrence" in {function.schedule for function in manifest.functions}
    module = tvm_ternary.load(tmp_path / "model.so")
    assert [module.run(["y"], feeds(2, 1, steps))[0].shape[0] for steps in (1, 6)] == [1, 6]


def test_states_of_another_batch_are_refused() -> None:
    model = lstm(steps="steps")
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "other"
    with pytest.raises(UnsupportedOperatorError, match=r"a first state of \[1, other, 8\], expected \[1, batch, 8\]"):
        import_onnx(model)


def test_a_second_walk_takes_the_form_of_the_first() -> None:
    """In a quantized checkpoint the first decided which matrices there are, whatever is fixed later."""
    open_steps = lstm(steps="steps")
    first = import_onnx(open_steps)
    assert first.onnx is not None
    again = import_onnx(open_steps, dims={"steps": 5}, uses=first.onnx.uses)
    assert (list(again.params), list(again.others)) == (["rnn.weight_ih"], ["rnn.weight_hh"])
    known_steps = variant("GRU", linear_before_reset=0)
    first = import_onnx(known_steps)
    assert first.onnx is not None
    again = import_onnx(known_steps, uses=first.onnx.uses)
    assert list(again.params) == list(first.params) == ["w", "r_gates", "r_candidate"]
