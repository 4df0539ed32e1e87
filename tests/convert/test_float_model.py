"""Segments compiled in process: equal ones once, and nothing else of the process changes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tvm

from tests.models import mlp
from tvm_ternary.convert.float_model import SegmentRunner, to_tensors
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.cut import cut


def test_layers_of_one_shape_compile_once() -> None:
    model, runner = import_onnx(mlp((8, 8, 8, 8, 8, 3))), SegmentRunner()
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    live = {"x": tvm.runtime.tensor(x)}
    for segment in cut(model.module).segments:
        values = [live[name] for name in segment.inputs]
        weights = to_tensors(model.params, segment.matrices)
        live.update(zip(segment.outputs, runner.run(segment, [2], values, weights), strict=True))
    assert (runner.compiled, runner.runs) == (2, 5)


def test_a_runner_knows_what_it_compiled_for_another_model() -> None:
    """One of other weights and another depth."""
    runner = SegmentRunner()
    for features in ((8, 8, 3), (8, 8, 8, 8, 3)):
        model = import_onnx(mlp(features))
        live = {"x": tvm.runtime.tensor(np.ones((1, 8), np.float32))}
        for segment in cut(model.module).segments:
            values = [live[name] for name in segment.inputs]
            outputs = runner.run(segment, [1], values, to_tensors(model.params, segment.matrices))
            live.update(zip(segment.outputs, outputs, strict=True))
    assert runner.compiled == 2


def test_the_caller_keeps_its_cores() -> None:
    before = os.sched_getaffinity(0)
    model = import_onnx(mlp((8, 4)))
    (segment,) = cut(model.module).segments
    x = tvm.runtime.tensor(np.ones((64, 8), np.float32))
    SegmentRunner(threads=2).run(segment, [64], [x], to_tensors(model.params, segment.matrices))
    assert os.sched_getaffinity(0) == before


def test_weights_in_any_order_of_memory() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tensor,) = to_tensors({"w": array.T}, ["w"])
    np.testing.assert_array_equal(tensor.numpy(), array.T)


def test_threads_are_checked() -> None:
    with pytest.raises(OptionError, match="threads: is 0"):
        SegmentRunner(threads=0)
