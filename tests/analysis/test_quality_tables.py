"""Tables of an evaluation."""

from __future__ import annotations

import math
from dataclasses import replace

from tvm_ternary.analysis.accuracy import Closeness
from tvm_ternary.analysis.quality import Candidate, LayerQuality, OutputQuality
from tvm_ternary.analysis.quality_tables import evaluation_tables

from .evaluated import ALONE, EVALUATION, ONE, POINTS


def test_every_number_is_shown() -> None:
    facts, sizes, outputs, metrics, layers, _ = evaluation_tables(EVALUATION)
    assert ("ran on", "cpu, 1 thread, compiled for x86-64-v3") in facts.rows
    assert ("time", "1.5 s") in facts.rows
    assert sizes.rows[0] == ("out/t2", "5 of 6", "4.50", "1.0 KiB", "4.00")
    assert dict(zip(outputs.columns, outputs.rows[0], strict=True)) == {
        "candidate": "out/t2",
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
    assert metrics.columns == ("metric", "float", "out/t2", "change", "t3a8g64", "change")
    assert metrics.rows == (("accuracy <top 1>", "0.9000", "0.8500", "-0.0500", "0.9100", "+0.0100"),)
    name, shape, *numbers = layers.rows[0]
    assert (name, shape) == ("m.0.layer.0.query.weight", "8 x 4")
    assert numbers == ["t2a8g64", "4.50", "0.1000", "0.9000", "0.0100", "0.9990", "40.0", ""]
    assert layers.rows[-1][-1] == "read by rows"


def test_what_was_not_measured_has_no_column() -> None:
    layer = LayerQuality("a.weight", (8, 4), "ternary", "t1a8", 2.5, None, 0.5)
    _, _, outputs, layers = evaluation_tables(
        replace(EVALUATION, candidates=(Candidate("q", 2.5, 1024, (layer,), ONE.outputs[1:], ()),))
    )
    assert outputs.columns == ("candidate", "output", "equal")
    assert layers.columns == ("matrix of q", "N x K", "became", "bits/weight", "weight error", "SQNR dB")


def test_json_has_no_infinity() -> None:
    same = OutputQuality("y", "float32", 1.0, Closeness(math.inf, 1, 0, 0, 0), None, POINTS)
    layers = (ONE.layers[0], ONE.layers[-1])
    document = replace(ALONE, candidates=(Candidate("q", None, 1, layers, (same,), ()),)).to_dict()
    (candidate,) = document["candidates"]
    assert candidate["outputs"][0]["closeness"]["sqnr_db"] is None
    assert [round(layer["sqnr_db"]) if layer["sqnr_db"] else None for layer in candidate["layers"]] == [40, None]
