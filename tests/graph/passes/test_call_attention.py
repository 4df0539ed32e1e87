"""Attentions that are calls of a function outside: found, named, and equal in equal layers."""

from __future__ import annotations

import pytest
from tvm import relax
from tvm_ffi import structural_equal

from tests.models import gpt2, llama, mlp
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.call_attention import call_attention
from tvm_ternary.graph.passes.cut import cut


def called(module) -> list[str]:  # type: ignore[no-untyped-def]
    """The outside functions that ``main`` calls."""
    found: list[str] = []

    def visit(part: relax.Expr) -> None:
        if isinstance(part, relax.Call) and getattr(part.op, "name", "") == "relax.call_dps_packed":
            found.append(str(part.args[0].global_symbol))

    relax.analysis.post_order_visit(module["main"], visit)
    return found


def operators(module) -> set[str]:  # type: ignore[no-untyped-def]
    names: set[str] = set()
    relax.analysis.post_order_visit(
        module["main"], lambda part: names.add(part.op.name) if isinstance(part, relax.Call) else None
    )
    return names


def test_every_attention_is_one_call() -> None:
    before = import_onnx(llama())
    after, calls = call_attention(before, "f")
    assert called(after.module) == ["f", "f"]
    assert [call.name for call in calls] == ["attention.0", "attention.1"]
    assert (calls[0].shape.heads, calls[0].shape.kv_heads, calls[0].shape.size) == (4, 2, 8)
    assert calls[0].shape == calls[1].shape
    assert "relax.nn.softmax" not in operators(after.module)
    assert (after.inputs, after.outputs, after.params) == (before.inputs, before.outputs, before.params)


@pytest.mark.parametrize("model", [gpt2, llama])
def test_those_with_a_past_are_called_by_its_name(model) -> None:  # type: ignore[no-untyped-def]
    imported = import_onnx(model(cache="both"))
    after, calls = call_attention(imported, "f")
    assert [call.name for call in calls] == ["past.0.key", "past.1.key"]
    assert not any(call.shape.joined for call in calls)
    assert len(called(after.module)) == len(calls) == 2


def test_equal_layers_are_equal_segments() -> None:
    """The number of an attention is no part of a segment's code."""
    segments = cut(call_attention(import_onnx(llama(layers=3)), "f")[0].module).segments
    with_attention = [one.module for one in segments if called(one.module)]
    assert len(with_attention) == 3
    assert all(structural_equal(with_attention[0], one) for one in with_attention[1:])


def test_a_model_without_attention_is_left_alone() -> None:
    model = import_onnx(mlp())
    assert call_attention(model, "f") == (model, ())
