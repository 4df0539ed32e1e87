"""Rotary positions, each kind of scaling against loops in float64, far positions too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.errors import ModelError
from tvm_ternary.graph.models.builder import GraphBuilder, build_model
from tvm_ternary.graph.models.rope import Rope, read_rope, rotate, rotation
from tvm_ternary.graph.models.settings import Settings
from tvm_ternary.graph.source import import_model

from .checkpoints import feeds, write_checkpoint
from .decoders import LLAMA, decoder, frequencies, run_all

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
}


def scaled(kind: str, **changes: Any) -> dict[str, Any]:
    return {**LLAMA, "head_dim": 16, "rope_scaling": {"rope_type": kind, **SCALINGS[kind], **changes}}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_model_with_scaling_is_the_reference(tmp_path: Path, kind: str) -> None:
    config = scaled(kind)
    (logits,) = Compiled(import_model(write_checkpoint(tmp_path, config, decoder(config))))(feeds(20))
    assert relative_error(logits, run_all(decoder(config), config, feeds(20))) < 3e-6
    assert relative_error(logits, run_all(decoder(config), {**config, "rope_scaling": None}, feeds(20))) > 1e-3


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("size", [16, 128])
def test_frequencies_and_gain(kind: str, size: int) -> None:
    config = {**scaled(kind), "head_dim": size}
    rope = read_rope(Settings(config), size)
    expected, gain = frequencies(config)
    np.testing.assert_allclose(rope.frequencies, expected, rtol=1e-12)
    assert rope.gain == pytest.approx(gain)


def test_factors_for_each_frequency() -> None:
    factors = {
        "rope_type": "longrope",
        "short_factor": [1, 2.0, 8],
        "long_factor": [1, 2.0, 8],
        "attention_factor": 1.5,
    }
    rope = read_rope(Settings({**LLAMA, "rope_scaling": factors}), 6)
    np.testing.assert_allclose(rope.frequencies, 10000.0 ** (-np.arange(3) / 3) / [1, 2, 8])
    assert rope.gain == 1.5


def test_longest_sequence() -> None:
    assert read_rope(Settings(LLAMA), 6).positions == 64
    assert read_rope(Settings(scaled("yarn")), 16).positions == 2048


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "rope_theta": None},
    ],
    ids=["type", "rope_parameters"],
)
def test_old_and_new_spelling(spelling: dict[str, Any]) -> None:
    rope = read_rope(Settings({**LLAMA, **spelling}), 6)
    np.testing.assert_allclose(rope.frequencies, 500.0 ** (-np.arange(3) / 3) / 2)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic"}}, 6, "type 'dynamic', expected one of default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "longrope"}}, 6, "short_factor and long_factor of rope_scaling have to be one"),
        ({"rope_scaling": {"rope_type": "linear"}}, 6, "lacks factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, 6, "mscale is 1.0"),
        ({"rope_scaling": 3}, 6, "rope_scaling is 3, expected an object or null"),
        ({"partial_rotary_factor": 0.5}, 6, "partial_rotary_factor is 0.5"),
        ({}, 5, "heads have 5 features; a rotation needs an even number"),
    ],
)
def test_what_is_not_known_is_named(settings: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_rope(Settings({**LLAMA, **settings}), size)


class _NoTensors:
    """A checkpoint without tensors."""

    def names(self) -> tuple[str, ...]:
        return ()


def rotated(rope: Rope, length: int) -> tuple[np.ndarray, tvm.IRModule]:
    """Heads (1, length, 1, size) of ones and zeros, turned by a compiled graph, and the graph."""
    half = len(rope.frequencies)

    def body(graph: GraphBuilder) -> dict[str, relax.Expr]:
        unit = relax.const(np.repeat(np.float32([1, 0]), half).reshape(1, 1, 1, -1))
        shape = relax.ShapeExpr([graph.batch, graph.sequence, 1, 2 * half])
        x = graph.emit(R.broadcast_to(unit, shape))
        return {"y": rotate(graph, x, rotation(graph, rope))}

    model = build_model(_NoTensors(), ["ids"], body)  # type: ignore[arg-type]
    (y,) = Compiled(model)({"ids": np.zeros((1, length), np.int64)})
    return y, model.module


def test_far_positions_are_exact_and_tables_small() -> None:
    """A product of float32 numbers would be wrong by 4e-3 here."""
    length = 100_003
    angles = read_rope(Settings({**LLAMA, "max_position_embeddings": 131072}), 8)
    y, module = rotated(angles, length)
    exact = np.arange(length)[:, None] * angles.frequencies
    np.testing.assert_allclose(y[0, :, 0], np.concatenate([np.cos(exact), np.sin(exact)], -1), atol=3e-7)
    sizes: list[int] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            sizes.append(expr.value.numpy().nbytes)

    relax.analysis.post_order_visit(module["main"], visit)
    assert max(sizes) == 131072 // 256 * 4 * 4
