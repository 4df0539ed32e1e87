"""``DynamicQuantizeLSTM`` against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.onnx.operators.contrib.models import Model, floats
from tests.graph.onnx.running import assert_matches, weight_products
from tests.models import FLOAT

STEPS, WIDTH, UNITS = 4, 6, 5


def quantized_lstm(dtype: type[np.integer], columns: bool, steps: int | str = STEPS) -> onnx.ModelProto:
    """A bidirectional layer, a scale for each direction or for each of its columns."""
    g, random = Model(), np.random.default_rng(0)
    bounds = np.iinfo(dtype)
    inputs = [g.input("x", FLOAT, [steps, "batch", WIDTH])]
    scales = []
    for name, rows in (("w", WIDTH), ("r", UNITS)):
        inputs.append(g.constant(random.integers(bounds.min, bounds.max + 1, (2, rows, 4 * UNITS), dtype), name))
        shape = (2, 4 * UNITS) if columns else (2,)
        scales.append(g.constant(random.uniform(0.003, 0.006, shape).astype(np.float32)))
        scales.append(g.constant(np.full(shape, 0 if dtype is np.int8 else 128, dtype)))
    inputs += [g.weight("bias", 2, 8 * UNITS), "", "", "", "", *scales]
    g.add("DynamicQuantizeLSTM", *inputs, outputs=3, hidden_size=UNITS, direction="bidirectional")
    return g.model()


@pytest.mark.parametrize(("dtype", "columns"), [(np.int8, True), (np.uint8, False)])
def test_matches(dtype: type[np.integer], columns: bool) -> None:
    """One sequence: onnxruntime rounds the states of several together or apart, as its threads share them."""
    imported = assert_matches(quantized_lstm(dtype, columns), [{"x": floats(STEPS, 1, WIDTH)}])
    assert weight_products(imported) == {"w": 1, "w_reverse": 1, "r": STEPS, "r_reverse": STEPS}


@pytest.mark.parametrize(("dtype", "columns"), [(np.int8, True), (np.uint8, False)])
def test_open_steps(dtype: type[np.integer], columns: bool) -> None:
    """Each sequence is rounded by its own range, as one sequence alone is."""
    imported = assert_matches(
        quantized_lstm(dtype, columns, "steps"), [{"x": floats(steps, 1, WIDTH)} for steps in (STEPS, 1, 7)]
    )
    assert weight_products(imported) == {"w": 1, "w_reverse": 1}
    assert set(imported.others) == {"r", "r_reverse"}
