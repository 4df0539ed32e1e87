"""Calibration: what is gathered is what the matrices multiply, in the model quantized so far."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tvm.relax import op as R

from tests.graph.onnx.running import relative_error, run_onnxruntime
from tests.graph.passes.small_graphs import make_module, random
from tests.models import FLOAT, INT64, GraphBuilder, lstm, mlp
from tvm_ternary.convert.batches import Batches
from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.convert.stream import calibrate
from tvm_ternary.errors import InputError
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.graph.passes.cut import cut
from tvm_ternary.quantize.observers import Statistics

Arrays = dict[str, np.ndarray]

# What several tests run compiles once.
RUNNER = SegmentRunner()


class Recorder:
    """Keeps what it is told, and halves every matrix."""

    def __init__(self, model: ImportedModel, factor: float = 0.5) -> None:
        self.model, self.factor = model, np.float32(factor)
        self.seen: dict[tuple[str, ...], Statistics] = {}

    def __call__(self, names: tuple[str, ...], statistics: Statistics) -> Arrays:
        assert names not in self.seen
        self.seen[names] = statistics
        return {name: self.model.params[name] * self.factor for name in names}


def assert_statistics(got: Statistics, rows: np.ndarray) -> None:
    rows = rows.astype(np.float64)
    assert got.count == len(rows)
    np.testing.assert_allclose(got.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.absmax, np.abs(rows).max(0), rtol=1e-6)
    assert got.hessian is not None
    assert relative_error(got.hessian, rows.T @ rows / len(rows)) < 1e-5


def mlp_inputs(features: Sequence[int], count: int) -> list[Arrays]:
    return [{"x": random(1, features[0], seed=i)} for i in range(count)]


def test_each_layer_sees_what_the_quantized_ones_before_it_give() -> None:
    features = (6, 10, 8, 4)
    model = import_onnx(mlp(features))
    samples = mlp_inputs(features, 20)
    recorder = Recorder(model)
    calibrate(model, samples, recorder, runner=RUNNER)
    biases = {
        t.name: np.array(t.float_data or np.frombuffer(t.raw_data, np.float32)) for t in mlp(features).graph.initializer
    }
    x = np.concatenate([sample["x"] for sample in samples])
    assert list(recorder.seen) == [(name,) for name in model.params]
    for i, (name, weight) in enumerate(model.params.items()):
        assert_statistics(recorder.seen[name,], x)
        x = np.maximum(x @ (weight * np.float32(0.5)) + biases[f"layers.{i}.bias"], 0)


def test_the_float_model_beside_gives_the_drift() -> None:
    model = import_onnx(mlp((6, 10, 8)))
    samples = mlp_inputs((6,), 9)
    recorder, plain = Recorder(model), Recorder(model, 1)
    calibrate(model, samples, recorder, original=model, runner=RUNNER)
    calibrate(model, samples, plain, runner=RUNNER)
    first, second = recorder.seen.values()
    assert first.drift is not None
    assert second.drift is not None
    assert np.abs(first.drift).max() == 0
    assert np.abs(second.drift).max() > 0


def test_groups_that_are_not_wanted_stay_as_they_are() -> None:
    model = import_onnx(mlp((6, 10, 8, 4)))
    whole, part = Recorder(model, 1), Recorder(model)
    calibrate(model, mlp_inputs((6,), 5), whole, runner=RUNNER)
    calibrate(model, mlp_inputs((6,), 5), part, wanted=["layers.2.weight"], hessian=False, runner=RUNNER)
    assert list(part.seen) == [("layers.2.weight",)]
    got = part.seen["layers.2.weight",]
    assert got.hessian is None
    np.testing.assert_array_equal(got.mean, whole.seen["layers.2.weight",].mean)


def test_a_matrix_with_many_inputs_is_seen_with_all_of_them_once() -> None:
    """The states of a recurrence: of the float model, since the matrix has to be one and the same in all steps."""
    source = lstm(state=False)
    model = import_onnx(source)
    samples = [{"x": random(5, 1, 6, seed=i)} for i in range(4)]
    recorder = Recorder(model)
    calibrate(model, samples, recorder, runner=RUNNER)
    assert list(recorder.seen) == [("rnn.weight_ih",), ("rnn.weight_hh",)]
    states = [run_onnxruntime(source, sample)[0].reshape(5, 8) for sample in samples]
    before = [np.concatenate([np.zeros((1, 8), np.float32), s[:-1]]) for s in states]
    assert_statistics(recorder.seen["rnn.weight_hh",], np.concatenate(before))
    assert_statistics(recorder.seen["rnn.weight_ih",], np.concatenate([s["x"].reshape(5, 6) for s in samples]))


def test_a_matrix_used_twice_is_quantized_once_and_used_twice() -> None:
    def build(emit, x, w):  # type: ignore[no-untyped-def]
        return [emit(R.matmul(emit(R.matmul(x, w)), w))]

    w, x = random(4, 4), random(3, 4)
    base = import_onnx(mlp((4, 4)))
    model = replace(base, module=make_module({"x": ("batch", 4)}, {"w": w}, build), params={"w": w})
    recorder = Recorder(model)
    calibrate(model, [{"x": x}], recorder, runner=RUNNER)
    assert_statistics(recorder.seen["w",], np.concatenate([x, x @ w]))


def attention() -> onnx.ModelProto:
    """Rows of a table that look at each other, between two matrices."""
    g = GraphBuilder()
    ids = g.input("ids", INT64, ["batch", "sequence"])
    x = g.node("MatMul", g.node("Gather", g.weight("table", 20, 6), ids, axis=0), g.weight("first", 6, 8))
    scores = g.node("Softmax", g.node("MatMul", x, g.node("Transpose", x, perm=[0, 2, 1])), axis=-1)
    g.node("MatMul", g.node("MatMul", scores, x), g.weight("second", 8, 4), output="y")
    g.output("y", FLOAT, ["batch", "sequence", 4])
    return g.model()


def test_lengths_may_differ_and_nothing_is_padded() -> None:
    source, runner, generator = attention(), SegmentRunner(), np.random.default_rng(0)
    model = import_onnx(source)
    samples = [{"ids": generator.integers(0, 20, (1, length))} for length in (3, 7, 3, 12)]
    segments = cut(model.module)
    batches = Batches(model, segments, samples, runner)
    for segment in segments.segments:
        if segment.x is not None:
            assert sum(len(x) for x in batches.rows(segment)) == 3 + 7 + 3 + 12
        batches.advance(segment, {name: model.params[name] for name in segment.matrices})
    assert runner.runs == 3 * len(segments.segments), "the two of one length run together"
    single = [run_onnxruntime(source, sample)[0] for sample in samples]
    expected = [np.concatenate([single[i] for i in together]) for together in ((0, 2), (1,), (3,))]
    for result, want in zip(batches.values(segments.result), expected, strict=True):
        assert relative_error(result[0].numpy(), want) < 1e-5


def test_batches_of_any_size_give_the_same_bits() -> None:
    model = import_onnx(mlp((6, 10, 4)))
    samples = mlp_inputs((6,), 12)
    once, twice = Recorder(model), Recorder(model)
    calibrate(model, samples, once, runner=RUNNER)
    calibrate(model, [{"x": np.concatenate([s["x"] for s in samples])}], twice, runner=RUNNER)
    for names, statistics in once.seen.items():
        np.testing.assert_array_equal(statistics.hessian, twice.seen[names].hessian)


def test_a_first_dimension_that_is_no_batch_keeps_samples_apart() -> None:
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["sequence", 6])
    g.node("MatMul", x, g.weight("w", 6, 4), output="y")
    g.output("y", FLOAT, ["sequence", 4])
    model, runner = import_onnx(g.model()), SegmentRunner()
    calibrate(model, mlp_inputs((6,), 3), Recorder(model), runner=runner)
    assert runner.runs == 3


class Counting(Mapping[str, np.ndarray]):
    """Makes a matrix when it is asked for, and counts that."""

    def __init__(self, model: ImportedModel) -> None:
        self.shapes = {name: (k, n) for name, (n, k) in model.shapes.items()}
        self.reads = dict.fromkeys(self.shapes, 0)

    def __getitem__(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return np.full(self.shapes[name], 0.01, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def deep(layers: int, width: int) -> ImportedModel:
    """An MLP whose matrices are not in memory."""
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["batch", width])
    for i in range(layers):
        x = g.node("Relu", g.node("MatMul", x, g.weight(f"layers.{i}.weight", width, width)))
    g.node("Identity", x, output="y")
    g.output("y", FLOAT, ["batch", width])
    model = import_onnx(g.model())
    return replace(model, params=Counting(model), onnx=None)


def test_time_and_memory_do_not_grow_faster_than_layers() -> None:
    width, layers = 256, 12
    bytes_of_one = 4 * width * width
    model, runner = deep(layers, width), SegmentRunner()
    samples = [{"x": random(1, width, seed=i)} for i in range(4)]
    calibrate(model, samples, lambda names, _: {n: model.params[n] for n in names}, runner=runner)  # compiles
    assert runner.runs == layers
    assert runner.compiled == 2, "the last one gives the result"
    tracemalloc.start()
    calibrate(model, samples, lambda names, _: {n: model.params[n] for n in names}, runner=runner)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Its weights, a copy, and the second moment in float64 and float32.
    assert peak < 8 * bytes_of_one < layers * bytes_of_one
    assert isinstance(model.params, Counting)
    assert set(model.params.reads.values()) == {2}, "once a calibration"


def test_progress_counts_to_the_end() -> None:
    model = import_onnx(lstm(state=False))
    steps: list[tuple[str, int, int]] = []
    calibrate(
        model, [{"x": random(5, 1, 6)}], Recorder(model), runner=RUNNER, progress=lambda *step: steps.append(step)
    )
    assert [done for _, done, _ in steps] == list(range(1, steps[-1][2] + 1))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "calibration data: has no sample; expected one at least"),
        ([{"x": random(1, 6)}, {"x": random(1, 5)}], r"sample 1, input 'x': has shape \[1, 5\]; expected \[batch, 6\]"),
        ([{"y": random(1, 6)}], "sample 0, input 'y': no such input"),
        ([{"x": np.ones((1, 6))}], "sample 0, input 'x': has dtype float64"),
        ([{"x": np.full((1, 6), np.nan, np.float32)}], "the input of layers.0.weight: nan in row 0, column 0"),
    ],
)
def test_bad_samples_are_named(samples: list[dict[str, Any]], message: str) -> None:
    model = import_onnx(mlp((6, 4)))
    with pytest.raises(InputError, match=message):
        calibrate(model, samples, Recorder(model), runner=RUNNER)


def test_tokens_that_the_model_has_no_rows_for_are_named() -> None:
    model = import_onnx(attention())
    with pytest.raises(InputError, match="sample 0, input 'ids': holds 20; expected 0 to 19"):
        calibrate(model, [{"ids": np.array([[3, 20, 1]])}], Recorder(model))


def test_a_model_whose_dimensions_are_all_fixed() -> None:
    model, runner = import_onnx(mlp((6, 10, 4)), dims={"batch": 3}), SegmentRunner()
    samples = [{"x": random(3, 6, seed=i)} for i in range(2)]
    recorder = Recorder(model)
    calibrate(model, samples, recorder, runner=runner)
    assert runner.runs == 2 * 2
    assert_statistics(recorder.seen["layers.0.weight",], np.concatenate([sample["x"] for sample in samples]))


def test_a_real_model_with_functions_of_its_own(models: Path) -> None:
    """A module whose ``main`` calls more than operators: what a segment calls comes along."""
    source = models / "magika" / "models" / "standard_v3_3" / "model.onnx"
    model = import_onnx(source)
    assert len(model.module.functions) > 1
    segments, generator = cut(model.module), np.random.default_rng(0)
    sample = {"bytes": generator.integers(0, 256, (1, 2048)).astype(np.int32)}
    batches = Batches(model, segments, [sample], RUNNER)
    for segment in segments.segments:
        batches.advance(segment, {name: model.params[name] for name in segment.matrices})
    (result,) = batches.values(segments.result)
    assert relative_error(result[0].numpy(), run_onnxruntime(source, sample)[0]) < 1e-4
