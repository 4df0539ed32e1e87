"""Poolings over images of any size against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from tests.graph.onnx.running import assert_matches
from tests.models import GraphBuilder

POOLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("MaxPool", {"kernel_shape": [3, 4], "auto_pad": "SAME_LOWER"}),
    ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", {"kernel_shape": [4, 3], "auto_pad": "SAME_UPPER"}),
    ("AveragePool", {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER", "count_include_pad": 1}),
    ("GlobalAveragePool", {}),
)


def test_poolings_of_images_of_any_size() -> None:
    g = GraphBuilder("pools")
    x = g.input("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    for number, (op, attributes) in enumerate(POOLS):
        g.node(op, x, output=f"y{number}", **attributes)
        g.output(f"y{number}", TensorProto.FLOAT, [None] * 4)
    random = np.random.default_rng(1)
    shapes = [(1, 3, 6, 9), (2, 3, 11, 4)]
    assert_matches(g.model(), [{"x": random.standard_normal(shape).astype(np.float32)} for shape in shapes])
