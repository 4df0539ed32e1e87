"""Tables of an evaluation."""

from __future__ import annotations

import math

import numpy as np

from tvm_ternary.analysis.accuracy import Closeness
from tvm_ternary.analysis.quality import Candidate, Evaluation, LayerQuality, LogitsQuality, MetricValue, OutputQuality
from tvm_ternary.analysis.quality_tables import evaluation_tables

POINTS = np.zeros((2, 0), np.float32)
LAYERS = (
    LayerQuality("a.weight", (8, 4), "t2a8g64", 4.5, None, 0.1, 0.99, 0.01, 0.999),
    LayerQuality("table", (9, 4), None, 32.0, "read by rows", None),
)
OUTPUTS = (
    OutputQuality(
        "logits", "float32", 0.0, Closeness(20, 0.995, 0.1, 1.5, 0.25), LogitsQuality(0.5, 0.75, 3, 4), POINTS
    ),
    OutputQuality("length", "int64", 1.0, None, None, POINTS),
)


def _evaluation(*candidates: Candidate) -> Evaluation:
    return Evaluation("m.onnx", "3 samples of d.npz", 3, "x86-64-v3", "cpu", 1, 4096, candidates, {"a": 1.0, "b": 0.5})


def test_every_number_is_shown() -> None:
    one = Candidate("t2", 4.5, 1024, LAYERS, OUTPUTS, (MetricValue("accuracy", 0.9, 0.85),))
    two = Candidate("t3", 6.5, 2048, LAYERS, OUTPUTS, (MetricValue("accuracy", 0.9, 0.91),))
    facts, sizes, outputs, metrics, layers, _ = evaluation_tables(_evaluation(one, two))
    assert ("ran on", "cpu, 1 thread, compiled for x86-64-v3") in facts.rows
    assert ("time", "1.5 s") in facts.rows
    assert sizes.rows[0] == ("t2", "1 of 2", "4.50", "1.0 KiB", "4.00")
    assert dict(zip(outputs.columns, outputs.rows[0], strict=True)) == {
        "candidate": "t2",
        "output": "logits: float32",
        "equal": "0%",
        "SQNR dB": "20.0",
        "cosine": "0.99500",
        "relative error": "0.1",
        "max error": "1.5",
        "mean error": "0.25",
        "KL nats": "0.5",
        "top-1 agrees": "75.00%",
        "perplexity float": "3.0000",
        "ternary": "4.0000",
    }
    assert outputs.rows[1][2:4] == ("100%", "")
    assert metrics.columns == ("metric", "float", "t2", "change", "t3", "change")
    assert metrics.rows == (("accuracy", "0.9000", "0.8500", "-0.0500", "0.9100", "+0.0100"),)
    assert layers.rows[0] == (
        "a.weight",
        "8 x 4",
        "t2a8g64",
        "4.50",
        "0.1000",
        "0.9900",
        "0.0100",
        "0.9990",
        "40.0",
        "",
    )
    assert layers.rows[1][-1] == "read by rows"


def test_what_was_not_measured_has_no_column() -> None:
    layer = LayerQuality("a.weight", (8, 4), "t1a8", 2.5, None, 0.5)
    _, _, outputs, layers = evaluation_tables(_evaluation(Candidate("q", 2.5, 1024, (layer,), OUTPUTS[1:], ())))
    assert outputs.columns == ("candidate", "output", "equal")
    assert layers.columns == ("matrix of q", "N x K", "became", "bits/weight", "weight error", "SQNR dB")


def test_json_has_no_infinity() -> None:
    same = OutputQuality("y", "float32", 1.0, Closeness(math.inf, 1, 0, 0, 0), None, POINTS)
    document = _evaluation(Candidate("q", None, 1, LAYERS, (same,), ())).to_dict()
    (candidate,) = document["candidates"]
    assert candidate["outputs"][0]["closeness"]["sqnr_db"] is None
    assert [round(layer["sqnr_db"]) if layer["sqnr_db"] else None for layer in candidate["layers"]] == [40, None]
