"""An evaluation made up for tests of what is made from one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tvm_ternary.analysis.accuracy import Closeness
from tvm_ternary.analysis.quality import Candidate, Evaluation, LayerQuality, LogitsQuality, MetricValue, OutputQuality

_RANDOM = np.random.default_rng(0)
POINTS = _RANDOM.standard_normal((2, 50)).astype(np.float32)


def layer(name: str, error: float, scheme: str | None = "t2a8g64") -> LayerQuality:
    """A matrix; None for the scheme is one that stayed float."""
    if scheme is None:
        return LayerQuality(name, (9, 4), "float32", None, 32.0, "read by rows", None)
    return LayerQuality(name, (8, 4), "ternary", scheme, 4.5, None, error, 1 - error, error / 10, 0.999)


def candidate(name: str, bits: float, accuracy: float) -> Candidate:
    """Two blocks of two matrices, a head and a table."""
    names = [f"m.0.layer.{i}.{kind}.weight" for i in range(2) for kind in ("query", "dense")]
    layers = [layer(own, 0.1 * (i + 1)) for i, own in enumerate([*names, "m.0.head.weight"])]
    outputs = (
        OutputQuality(
            "logits", "float32", 0.0, Closeness(20, 0.995, 0.1, 1.5, 0.25), LogitsQuality(0.5, 0.75, 3, 4), POINTS
        ),
        OutputQuality("length", "int64", 1.0, None, None, np.zeros((2, 0), np.float32)),
    )
    metrics = (MetricValue("accuracy <top 1>", 0.9, accuracy),)
    return Candidate(name, bits, 1024, (*layers, layer("m.0.table", 0, None)), outputs, metrics)


ONE, TWO = candidate("out/t2", 4.5, 0.85), candidate("t3a8g64", 6.5, 0.91)
EVALUATION = Evaluation(
    "m.onnx", "3 samples of d.npz", 3, "x86-64-v3", "cpu", 1, 4096, (ONE, TWO), {"compile": 1.0, "compare": 0.5}
)
ALONE = replace(EVALUATION, candidates=(ONE,))
