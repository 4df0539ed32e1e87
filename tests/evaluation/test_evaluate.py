"""Evaluations of small models, against what their libraries give by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tvm_ternary as tt
from tvm_ternary.analysis import accuracy
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.evaluation.evaluate import evaluate
from tvm_ternary.graph.source import import_model

ROWS = np.random.default_rng(3).standard_normal((6, 10)).astype(np.float32)
DATA = [{"x": ROWS[:4]}, {"x": ROWS[4:]}]


def _run(path: Path) -> Any:
    return tt.load(path, threads=1).run(None, {"x": ROWS})[0]


def test_outputs_are_those_of_the_libraries(folder: Path) -> None:
    found = evaluate(folder / "mlp-float.so", folder / "mlp-t2.so", data=DATA, threads=1)
    assert (found.samples, found.data, found.device, found.threads) == (2, "2 given samples", "cpu", 1)
    (candidate,) = found.candidates
    (output,) = candidate.outputs
    reference, array = (_run(folder / f"mlp-{kind}.so") for kind in ("float", "t2"))
    assert output.closeness is not None
    expected = accuracy.closeness(reference, array)
    for name in ("sqnr_db", "cosine", "relative_error", "max_error", "mean_error"):
        assert getattr(output.closeness, name) == pytest.approx(getattr(expected, name)), name
    assert 0 < expected.relative_error < 0.5
    assert output.points.shape == (2, array.size)
    # Rows are summed in another order when there are more of them.
    np.testing.assert_allclose(np.sort(output.points[1]), np.sort(array.ravel()), rtol=1e-4)


def test_schemes_are_compiled_and_more_planes_are_nearer(folder: Path) -> None:
    everywhere = {"edges": "same", "output_layer": "same"}
    rival = folder / "mlp-t2.so"
    found = evaluate(folder / "mlp.onnx", rival, scheme=["t1a8", "t4a8"], data=DATA, options=everywhere, threads=1)
    assert [candidate.name for candidate in found.candidates] == [str(folder / "mlp-t2.so"), "t1a8", "t4a8"]
    two, one, four = (c.outputs[0].closeness.relative_error for c in found.candidates if c.outputs[0].closeness)
    assert one > two > four > 0
    assert all(bits is not None for bits in (c.bits_per_weight for c in found.candidates))
    assert list(found.seconds) == [
        "compile the float model",
        f"compile {rival}",
        *("quantize to t1a8", "compile t1a8", "quantize to t4a8", "compile t4a8"),
        "compare outputs",
        "compare matrices",
    ]
    assert [layer.scheme for layer in found.candidates[1].layers] == ["t1a8", "t1a8"]
    # A library tells only what it was made with.
    assert found.candidates[0].layers[0].output_error is None


def test_matrices_are_compared_for_the_inputs_they_have(folder: Path, tmp_path: Path) -> None:
    made = quantize_model(folder / "mlp.onnx", tmp_path / "made", scheme="t2a8").path
    assert made is not None
    (candidate,) = evaluate(folder / "mlp.onnx", made, data=DATA, threads=1).candidates
    model = onnx.load(folder / "mlp.onnx")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    first, second = candidate.layers
    ternary = {name: tensor.dequantize() for name, tensor in import_model(made).ternary.items()}
    hidden = np.maximum(ROWS @ weights["layers.0.weight"].T + weights["layers.0.bias"], 0)
    for layer, x in ((first, ROWS), (second, hidden)):
        w, t = weights[layer.name], ternary[layer.name]
        assert layer.weight_error == pytest.approx(accuracy.relative_error(w, t), rel=1e-4)
        assert layer.output_error == pytest.approx(accuracy.relative_error(x @ w.T, x @ t.T), rel=1e-3)
        assert layer.output_cosine == pytest.approx(accuracy.cosine(x @ w.T, x @ t.T), rel=1e-4)


def test_bits_a_weight_are_those_of_the_file(folder: Path) -> None:
    (candidate,) = evaluate(folder / "mlp-float.so", folder / "mlp-t2.so", data=DATA).candidates
    ternary = [layer for layer in candidate.layers if layer.scheme]
    bits = sum(layer.bits_per_weight * np.prod(layer.shape) for layer in ternary)
    assert candidate.bits_per_weight == pytest.approx(bits / sum(np.prod(layer.shape) for layer in ternary))
    assert candidate.ternary == tuple(ternary)


def test_a_model_is_equal_to_itself(folder: Path) -> None:
    (candidate,) = evaluate(folder / "mlp-float.so", folder / "mlp-float.so", samples=2).candidates
    assert candidate.outputs[0].equal == 1
    assert candidate.bits_per_weight is None
    assert candidate.ternary == ()


def test_random_inputs_are_told_and_depend_on_the_seed(folder: Path) -> None:
    pair = (folder / "mlp-float.so", folder / "mlp-t2.so")
    first, again, other = (evaluate(*pair, samples=3, seed=seed) for seed in (1, 1, 2))
    assert first.data == "3 random inputs, seed 1: they say little about how good a model is"
    assert first.candidates == again.candidates
    assert first.candidates != other.candidates


def test_decoders_have_perplexities(decoders: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (2, 9))
    data = [{"input_ids": ids}]
    (candidate,) = evaluate(decoders / "gpt2-float.so", decoders / "gpt2-t2.so", data=data, threads=1).candidates
    (output,) = candidate.outputs
    reference, array = (
        tt.load(decoders / f"gpt2-{kind}.so", threads=1).run(None, data[0])[0] for kind in ("float", "t2")
    )
    labels = accuracy.next_token_labels(ids)
    assert output.logits is not None
    assert output.logits.perplexity_float == pytest.approx(accuracy.perplexity(reference, labels))
    assert output.logits.perplexity == pytest.approx(accuracy.perplexity(array, labels))
    assert output.logits.perplexity != output.logits.perplexity_float
    assert output.logits.kl_divergence == pytest.approx(accuracy.kl_divergence(reference, array))
    assert output.logits.top1_agreement == accuracy.top1_agreement(reference, array)


def test_metrics_are_called_for_every_model(folder: Path) -> None:
    def mean(run: Any) -> float:
        assert [spec.name for spec in run.inputs] == ["x"]
        return float(run({"x": ROWS})["y"].mean())

    def spread(inputs: Any, outputs: Any) -> dict[str, Any]:
        assert [one["x"].shape for one in inputs] == [(4, 10), (2, 10)]
        y = np.concatenate([one["y"] for one in outputs])
        return {"spread": y.std(), "rows": y}

    found = evaluate(folder / "mlp-float.so", folder / "mlp-t2.so", data=DATA, metric=[mean, spread], threads=1)
    values = {value.name: value for value in found.candidates[0].metrics}
    reference, array = (_run(folder / f"mlp-{kind}.so") for kind in ("float", "t2"))
    assert values["mean"].reference == pytest.approx(reference.mean(), abs=1e-6)
    assert values["mean"].change == pytest.approx(array.mean() - reference.mean(), abs=1e-6)
    assert values["spread"].value == pytest.approx(array.std())
    cosines = accuracy.row_cosines(reference, array)
    assert values["rows: mean cosine to float"].value == pytest.approx(cosines.mean())
    assert values["rows: least cosine to float"].value == pytest.approx(cosines.min())
    assert values["rows: relative error"].value == pytest.approx(accuracy.relative_error(reference, array))


def test_the_document_is_json_without_points(folder: Path) -> None:
    document = evaluate(folder / "mlp-float.so", folder / "mlp-float.so", samples=1).to_dict()
    (output,) = document["candidates"][0]["outputs"]
    assert "points" not in output
    # Infinite, which JSON has no number for.
    assert output["closeness"]["sqnr_db"] is None


@pytest.mark.parametrize(
    ("arguments", "options", "error", "problem"),
    [
        (["mlp.onnx"], {}, OptionError, "nothing to compare"),
        (["mlp-float.so"], {"scheme": "t2a8"}, OptionError, "is compiled already"),
        (["mlp.onnx"], {"scheme": "t9"}, OptionError, "scheme 't9'"),
        (["mlp-float.so", "gpt2-t2.so"], {}, InputError, "has inputs input_ids"),
        (["mlp-float.so", "mlp-t2.so"], {"samples": 0}, OptionError, "--samples: is 0"),
        (["mlp-float.so", "mlp-t2.so"], {"length": 0}, OptionError, "--length: is 0"),
        (["mlp-float.so", "mlp-t2.so"], {"data": []}, InputError, "holds no sample"),
        (["mlp-float.so", "mlp-t2.so"], {"data": [{"y": ROWS}]}, InputError, "no such input"),
        (["mlp-float.so", "mlp-t2.so"], {"data": [{"x": ROWS[:, 1:]}]}, InputError, "axis 1 is 9"),
        (["mlp-float.so", "mlp-t2.so"], {"logits": ["z"]}, OptionError, "no output 'z'; expected one of y"),
    ],
)
def test_what_does_not_fit_is_refused(
    decoders: Path, arguments: list[str], options: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        evaluate(*(decoders / name for name in arguments), **options)  # type: ignore[arg-type]
