"""Which attentions are two calls on a GPU, and in which kind of 16 bits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.graph.passes.small_graphs import quantized
from tests.models import gpt2, llama
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.ternarize import TernaryLayer
from tvm_ternary.graph.pipeline import half_of, lower
from tvm_ternary.target import resolve

DIMS = {"batch": 2, "length": 20}
NAMES = {"attention", "round_operands"}


def schedules(model: Any, scheme: str, dims: dict[str, int]) -> dict[str, str]:
    imported = import_onnx(model, dims=dims)
    layers = quantized(imported.params, dict.fromkeys(imported.params, scheme))
    return lower(imported, layers, resolve("cuda-sm_90"), bind_weights=True).schedules


@pytest.mark.parametrize("model", [gpt2, llama])
def test_known_lengths_and_activations_of_16_bits(model: Any) -> None:
    found = schedules(model(), "t1a16", DIMS)
    assert {name for name, who in found.items() if who == "rule:attention"} == NAMES
    assert not any("softmax" in name for name in found)


@pytest.mark.parametrize(
    ("scheme", "dims"),
    [("t1a8", DIMS), ("t1a16", {"batch": 2, "length": 15}), ("t1a16", {"batch": 2}), ("t1a16", {"length": 20})],
)
def test_what_stays_float32(scheme: str, dims: dict[str, int]) -> None:
    """Activations of 8 bits are no reason for 16, few queries fill no tensor core, and lengths have to be known."""
    found = schedules(llama(), scheme, dims)
    assert "rule:attention" not in found.values()
    assert "rule:rows" in {who for name, who in found.items() if "softmax" in name}


def test_heads_that_there_is_no_kernel_for_stay_float32() -> None:
    """Of 6 elements, which no load of four floats divides."""
    assert "rule:attention" not in schedules(gpt2(width=24), "t1a16", DIMS).values()


def test_of_two_kinds_the_one_without_a_limit() -> None:
    one = next(iter(quantized({"w": import_onnx(gpt2()).params["transformer.wte.weight"]}, {"w": "t1a16"}).values()))
    half, eight = (TernaryLayer(one.weight, bits) for bits in (16, 8))
    bfloat = TernaryLayer(one.weight, 16, bfloat=True)
    assert half_of([]) is half_of([eight]) is None
    assert half_of([eight, half]) == "float16"
    assert half_of([half, bfloat]) == half_of([bfloat]) == "bfloat16"
