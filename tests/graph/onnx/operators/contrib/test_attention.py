"""``Attention``, ``QAttention`` and ``MultiHeadAttention`` against onnxruntime, several masks a compiled model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from tests.graph.onnx.operators.contrib.models import Model, floats
from tests.graph.onnx.running import Compiled, assert_matches, relative_error, weight_products
from tests.models import FLOAT
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

INT32, UINT8 = onnx.TensorProto.INT32, onnx.TensorProto.UINT8
WIDTH, HEADS, SIZE = 12, 2, 4


def merged(past: str | int, **attributes: object) -> onnx.ModelProto:
    """``Attention`` with every mask there is, with and without past keys and values of some length."""
    g = Model()
    x = g.input("x", FLOAT, ["batch", "length", WIDTH])
    weights = [g.weight("qkv.weight", WIDTH, 3 * HEADS * SIZE), g.weight("qkv.bias", 3 * HEADS * SIZE)]
    common = {"num_heads": HEADS, **attributes}
    total = f"{past} + length" if past else "length"
    state = g.input("past", FLOAT, [2, "batch", HEADS, past, SIZE]) if past else ""
    masks = {
        "ends": ["batch"],
        "ends_and_starts": ["2 * batch"],
        "keys": ["batch", total],
        "pairs": ["batch", "length", total],
    }
    bias = "" if past else g.input("bias", FLOAT, [1, HEADS, "length", total])
    for name in ("", *masks):
        mask = g.input(name, INT32, masks[name]) if name else ""
        g.add("Attention", x, *weights, mask, state, bias if name == "keys" else "", outputs=2, **common)
    return g.model()


def merged_feeds(batch: int, length: int, past: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    total = past + length
    keys = (random.random((batch, total)) < 0.7).astype(np.int32)
    return {
        "x": floats(batch, length, WIDTH),
        "past": floats(2, batch, HEADS, past, SIZE),
        "ends": np.array([total - 1, total][:batch], np.int32),
        "ends_and_starts": np.array([*[total] * batch, *[0, 1][:batch]], np.int32),
        "keys": keys,
        "pairs": (random.random((batch, length, total)) < 0.7).astype(np.int32),
        "bias": floats(1, HEADS, length, total),
    }


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("past", [0, "past"])
def test_merged(past: str | int, unidirectional: int) -> None:
    model = merged(past, unidirectional=unidirectional, scale=0.3 if unidirectional else 0.0)
    cases = [merged_feeds(batch, length, past=3 if past else 0) for batch, length in ((2, 5), (1, 4))]
    imported = assert_matches(model, cases)
    assert weight_products(imported) == {"qkv.weight": 5}


def test_values_wider_than_keys() -> None:
    g = Model()
    x = g.input("x", FLOAT, ["batch", "length", WIDTH])
    weights = [g.weight("qkv.weight", WIDTH, 8 + 8 + 12), g.weight("qkv.bias", 28)]
    g.add("Attention", x, *weights, num_heads=HEADS, qkv_hidden_sizes=[8, 8, 12])
    assert_matches(g.model(), [{"x": floats(2, 3, WIDTH)}])


def test_quantized() -> None:
    """uint8 inputs and int8 weights with a scale for each column, with and without past keys."""
    g = Model()
    random = np.random.default_rng(0)
    x = g.input("x", UINT8, ["batch", "length", WIDTH])
    weight = g.constant(random.integers(-127, 128, (WIDTH, 3 * HEADS * SIZE), np.int8), "qkv.weight")
    bias, scale = g.weight("qkv.bias", 3 * HEADS * SIZE), g.constant(np.float32(0.02))
    columns = g.constant(random.uniform(0.005, 0.01, 3 * HEADS * SIZE).astype(np.float32))
    zeros = [g.constant(np.uint8(120)), g.constant(np.zeros(3 * HEADS * SIZE, np.int8))]
    mask = g.input("mask", INT32, ["batch", "past + length"])
    past = g.input("past", FLOAT, [2, "batch", HEADS, "past", SIZE])
    common = {"num_heads": HEADS, "unidirectional": 1}
    g.add("QAttention", x, weight, bias, scale, columns, "", *zeros, outputs=2, **common)
    g.add("QAttention", x, weight, bias, scale, columns, mask, *zeros, past, outputs=2, **common)
    feeds = {
        "x": random.integers(0, 256, (2, 3, WIDTH), np.uint8),
        "mask": np.array([[1, 1, 0, 1, 1], [1] * 5], np.int32),
        "past": floats(2, 2, HEADS, 2, SIZE),
    }
    imported = assert_matches(g.model(), [feeds])
    assert weight_products(imported) == {"qkv.weight": 2}


def multi_head(past: str | int) -> onnx.ModelProto:
    g = Model()
    q, k, v = (
        g.input(name, FLOAT, ["batch", length, HEADS * SIZE])
        for name, length in (("q", "length"), ("k", "keys"), ("v", "keys"))
    )
    bias = g.weight("qkv.bias", 3 * HEADS * SIZE)
    common = {"num_heads": HEADS}
    counts = g.input("counts", INT32, ["batch"])
    seen = g.input("seen", INT32, ["batch", "keys"])
    pairs = g.input("pairs", INT32, ["batch", "length", "keys"])
    added = g.input("added", FLOAT, ["batch", 1, "length", "keys"])
    g.add("MultiHeadAttention", q, k, v, **common)
    g.add("MultiHeadAttention", q, k, v, bias, counts, added, outputs=3, **common)
    g.add("MultiHeadAttention", q, k, v, "", seen, **common, mask_filter_value=-50.0, scale=0.4)
    g.add("MultiHeadAttention", q, k, v, "", pairs, **common)
    heads = [g.input(name, FLOAT, ["batch", HEADS, "keys", SIZE]) for name in ("key_heads", "value_heads")]
    g.add("MultiHeadAttention", q, *heads, g.weight("q.bias", 3 * HEADS * SIZE), **common)
    past = [g.input(name, FLOAT, ["batch", HEADS, "past", SIZE]) for name in ("past_key", "past_value")]
    own = [g.input(name, FLOAT, ["batch", "length", HEADS * SIZE]) for name in ("own_k", "own_v")]
    g.add("MultiHeadAttention", q, *own, unidirectional=1, **common)
    whole = g.input("whole", INT32, ["batch", "past + length"])
    g.add("MultiHeadAttention", q, *own, bias, whole, "", *past, outputs=3, **common, unidirectional=1)
    return g.model()


def test_multi_head() -> None:
    """Apart, across, of heads, and with past keys; all masks."""
    random = np.random.default_rng(1)

    def feeds(batch: int, length: int, keys: int, past: int) -> Mapping[str, np.ndarray]:
        def some(*shape: int) -> np.ndarray:
            return (random.random(shape) < 0.7).astype(np.int32)

        width = HEADS * SIZE
        return {
            "q": floats(batch, length, width),
            "k": floats(batch, keys, width),
            "v": floats(batch, keys, width),
            "counts": np.array([keys - 1, keys][:batch], np.int32),
            "seen": some(batch, keys),
            "pairs": some(batch, length, keys),
            "added": floats(batch, 1, length, keys),
            "key_heads": floats(batch, HEADS, keys, SIZE),
            "value_heads": floats(batch, HEADS, keys, SIZE),
            "past_key": floats(batch, HEADS, past, SIZE),
            "past_value": floats(batch, HEADS, past, SIZE),
            "own_k": floats(batch, length, width),
            "own_v": floats(batch, length, width),
            "whole": some(batch, past + length),
        }

    assert_matches(multi_head("past"), [feeds(2, 3, 5, 4), feeds(1, 1, 2, 6)])


def test_packed() -> None:
    """onnxruntime has packed heads on GPUs only: compare with the same heads apart."""
    g = Model()
    packed = floats(2, 3, HEADS, 3, SIZE)
    apart = {name: np.ascontiguousarray(packed[:, :, :, i].reshape(2, 3, -1)) for i, name in enumerate("qkv")}
    q, k, v = (g.input(name, FLOAT, ["batch", "length", HEADS * SIZE]) for name in "qkv")
    all_three = g.input("packed", FLOAT, ["batch", "length", HEADS, 3, SIZE])
    two = g.input("packed_kv", FLOAT, ["batch", "length", HEADS, 2, SIZE])
    for inputs in ([q, k, v], [all_three], [q, two]):
        g.add("MultiHeadAttention", *inputs, num_heads=HEADS)
    feeds = {**apart, "packed": packed, "packed_kv": np.ascontiguousarray(packed[:, :, :, 1:])}
    want, *others = Compiled(import_onnx(g.model()))(feeds)
    for got in others:
        assert relative_error(got, want) == 0.0


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("Attention", 2, {"do_rotary": 1}, "attribute do_rotary is set"),
        ("Attention", 2, {"past_present_share_buffer": 1}, "share a buffer; export the model without buffer sharing"),
        ("Attention", 2, {"num_heads": 5}, "8 features are not divisible by 5 heads"),
        ("MultiHeadAttention", 9, {}, "input past_sequence_length is given"),
    ],
)
def test_refusals(op: str, inputs: int, attributes: dict[str, int], message: str) -> None:
    g = Model()
    names = [g.input("x", FLOAT, [1, 2, 8]), g.weight("w", 8, 24), *[""] * 6, g.constant(np.int32(1))]
    g.add(op, *names[:inputs], **{"num_heads": 2} | attributes)
    with pytest.raises(UnsupportedOperatorError, match=message):
        import_onnx(g.model())
