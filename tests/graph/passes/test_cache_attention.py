"""Attentions with a past, however they are spelled, and one whose sequences have lengths of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvm_ternary
from tests.models import gpt2
from tests.ternary_matmul import NATIVE
from tvm_ternary.convert.attention import CalledAttention
from tvm_ternary.convert.attention_modes import apply_choices, choose_caches, read_modes
from tvm_ternary.errors import OptionError
from tvm_ternary.evaluation.attention import RoundedModel
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.find_pasts import find_caches
from tvm_ternary.graph.passes.without_past import without_past
from tvm_ternary.kernels.rounded_attention import Rounding

HEADS, KV_HEADS, SIZE = 4, 2, 16
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
PRESENT = ["y", "present_key", "present_value"]


def info(name: str, *shape: int | str, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    heads: int = KV_HEADS,
    *more: onnx.ValueInfoProto,
    flat: bool = True,
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Queries, new keys and values, and those of the past."""

    def new(name: str, count: int) -> onnx.ValueInfoProto:
        return info(name, "batch", "new", count * SIZE) if flat else info(name, "batch", count, "new", SIZE)

    def state(name: str, length: str) -> onnx.ValueInfoProto:
        return info(name, "batch", heads, length, SIZE)

    inputs = [new("q", HEADS), new("k", heads), new("v", heads), state("past_key", "past"), state("past_value", "past")]
    outputs = [new("y", HEADS), state("present_key", "total"), state("present_value", "total")]
    graph = helper.make_graph(nodes, "attention", [*inputs, *more], outputs, constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def grouped() -> onnx.ModelProto:
    """As onnxruntime's exporter writes it: lengths come from the mask."""
    nodes = [
        helper.make_node("Shape", ["mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["keys"]),
        helper.make_node("Cast", ["keys"], ["total_keys"], to=INT32),
        helper.make_node("ReduceSum", ["mask", "axis"], ["counts"], keepdims=0),
        helper.make_node("Sub", ["counts", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["lengths"], to=INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", "past_key", "past_value", "lengths", "total_keys"],
            PRESENT,
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        ),
    ]
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in (("one", 1), ("axis", [1]))]
    return model(nodes, KV_HEADS, info("mask", "batch", "total", dtype=INT64), constants=constants)


def standard(**attributes: int) -> onnx.ModelProto:
    node = helper.make_node("Attention", ["q", "k", "v", "", "past_key", "past_value"], PRESENT, **attributes)
    return model([node], flat=bool(attributes.get("q_num_heads")))


def multi_head() -> onnx.ModelProto:
    operands = ["q", "k", "v", "", "", "", "past_key", "past_value"]
    return model(
        [helper.make_node("MultiHeadAttention", operands, PRESENT, domain="com.microsoft", num_heads=HEADS)], 4
    )


@pytest.mark.parametrize(
    "spelled",
    [standard(), standard(is_causal=1), standard(q_num_heads=4, kv_num_heads=2), multi_head(), grouped()],
    ids=["attention", "causal", "flat", "multi-head", "grouped-query"],
)
def test_every_spelling_may_keep_its_past(spelled: onnx.ModelProto) -> None:
    assert find_caches(import_onnx(spelled)) == {"past_key": None}


def test_why_not() -> None:
    assert set(find_caches(import_onnx(gpt2())).values()) == {"has no past keys and values as inputs"}
    fixed = import_onnx(standard(), {"past": 8})
    assert find_caches(fixed) == {"past_key": "has a past of a fixed length"}
    read = standard()
    read.graph.node.append(helper.make_node("Identity", ["past_key"], ["copy"]))
    read.graph.node.append(helper.make_node("Neg", ["copy"], ["negative"]))
    read.graph.output.append(info("negative", "batch", KV_HEADS, "past", SIZE))
    assert find_caches(import_onnx(read)) == {"past_key": "has a past that something else reads"}


def test_what_cannot_start_without_tokens() -> None:
    """A mask of the past tokens alone."""
    nodes = [
        helper.make_node("Attention", ["q", "k", "v", "", "past_key", "past_value"], ["mixed", *PRESENT[1:]]),
        helper.make_node("ReduceSum", ["old", "axis"], ["count"]),
        helper.make_node("Mul", ["mixed", "count"], ["y"]),
    ]
    axis = [numpy_helper.from_array(np.array([0, 1]), "axis")]
    spelled = model(nodes, KV_HEADS, info("old", "batch", "past"), flat=False, constants=axis)
    imported = import_onnx(spelled)
    choices = choose_caches(imported, read_modes("ternary-keys-values"), (2, 2), 64)
    with pytest.raises(OptionError, match="cannot start without tokens: old would have no elements"):
        apply_choices(imported, choices, NATIVE)


def test_inputs_say_how_many_tokens_are_new() -> None:
    """Of those that a model halves they do not."""
    halves = [helper.make_node("AveragePool", [f"long_{n}"], [n], kernel_shape=[2, 1], strides=[2, 1]) for n in "qkv"]
    nodes = [*halves, helper.make_node("Attention", ["q", "k", "v", "", "past_key", "past_value"], PRESENT)]
    spelled = model(nodes, KV_HEADS, flat=False)
    for operand, heads in zip(spelled.graph.input, (HEADS, KV_HEADS, KV_HEADS), strict=False):
        operand.CopyFrom(info(f"long_{operand.name}", "batch", heads, "long", SIZE))
    spelled.graph.output[0].CopyFrom(info("y", "batch", HEADS, None, SIZE))
    imported = import_onnx(spelled)
    assert find_caches(imported) == {"past_key": None}
    choices = choose_caches(imported, read_modes("ternary-keys-values"), (2, 2), 64)
    with pytest.raises(OptionError, match=r"attention past_key: .* no input says how many tokens are new \(.*long"):
        apply_choices(imported, choices, NATIVE)


def test_without_a_past_a_text_is_whole() -> None:
    whole = without_past(import_onnx(standard(is_causal=1)))
    assert [spec.name for spec in whole.inputs] == ["q", "k", "v"]
    assert [str(spec) for spec in whole.outputs] == ["y: float32[batch, 4, new, 16]"]


def test_without_a_past_sequences_may_have_lengths_of_their_own() -> None:
    """As if all had been given at once: the new ones stand where they are placed behind nothing."""
    model = import_onnx(grouped())
    whole = without_past(model)
    assert [str(spec) for spec in whole.inputs[3:]] == ["mask: int64[batch, new]"]
    assert [str(spec) for spec in whole.outputs] == ["y: float32[batch, new, 64]"]
    random, shape = np.random.default_rng(0), (1, 7)
    feeds = {
        name: random.standard_normal((*shape, heads * SIZE)).astype(np.float32)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    feeds["mask"] = np.array([[1] * 5 + [0] * 2])
    nothing = np.zeros((1, KV_HEADS, 0, SIZE), np.float32)
    session = onnxruntime.InferenceSession(grouped().SerializeToString())
    wanted = session.run(["y"], {**feeds, "past_key": nothing, "past_value": nothing})[0]
    got = RoundedModel(CalledAttention(whole), Rounding(0, 0))(feeds)["y"]
    assert np.abs(got - wanted)[:, :5].max() <= 1e-6


def test_sequences_of_their_own_length(tmp_path: Path) -> None:
    """A prompt that is padded behind its end, then tokens where each sequence ended, as onnxruntime does it."""
    onnx.save(grouped(), tmp_path / "m.onnx")
    tvm_ternary.compile(tmp_path / "m.onnx", tmp_path / "m.so", attention="ternary-keys-values")
    module = tvm_ternary.load(tmp_path / "m.so", threads=1, kv_tokens=64)
    assert str(module.inputs[3]) == "mask: int64[batch, past + new]"
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    random, lengths = np.random.default_rng(0), np.array([7, 4])
    states = [np.zeros((2, KV_HEADS, 0, SIZE), np.float32)] * 2
    for new in (7, 1, 1, 1):
        total = states[0].shape[2] + new
        feeds = {
            name: random.standard_normal((2, new, heads * SIZE)).astype(np.float32)
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        }
        feeds["mask"] = (np.arange(total) < lengths[:, None]).astype(np.int64)
        wanted, *states = session.run(None, {**feeds, "past_key": states[0], "past_value": states[1]})
        (got,) = module.run(None, feeds)
        for row, length in enumerate(lengths):
            seen = min(length, new)
            assert np.abs(got[row, :seen] - wanted[row, :seen]).max() <= 1e-6
        lengths += 1
