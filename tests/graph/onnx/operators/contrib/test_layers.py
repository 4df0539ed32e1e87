"""Normalizations, activation functions, rotary and other embeddings, against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.onnx.operators.contrib.models import Model, floats
from tests.graph.onnx.operators.contrib.test_products import pack
from tests.graph.onnx.running import assert_matches
from tests.models import FLOAT, INT64
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

INT32 = onnx.TensorProto.INT32
WIDTH = 12


def test_normalizations() -> None:
    g = Model()
    x, skip = (g.input(name, FLOAT, ["batch", "length", WIDTH]) for name in ("x", "skip"))
    gamma, beta, bias = (g.weight(name, WIDTH, scale=1.0) for name in ("gamma", "beta", "bias"))
    g.add("SkipLayerNormalization", x, skip, gamma, beta, bias, epsilon=1e-3)
    g.add("SkipLayerNormalization", x, skip, gamma, outputs=["y0", "", "", "sum0"])
    g.add("SkipSimplifiedLayerNormalization", x, skip, gamma, bias, outputs=["y1", "", "", "sum1"], epsilon=1e-3)
    g.add("SkipSimplifiedLayerNormalization", x, skip, gamma)
    simple = g.node("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=1e-4)
    g.output(simple, FLOAT)
    inverse = g.nodes_of("SimplifiedLayerNormalization", x, gamma, outputs=["y2", "inverse"], stash_type=1)
    for name in inverse:
        g.output(name, FLOAT)
    assert_matches(g.model(), [{"x": floats(2, 3, WIDTH), "skip": floats(2, 3, WIDTH) - 1}])


def test_activations() -> None:
    g = Model()
    x, bias = g.input("x", FLOAT, ["batch", WIDTH]), g.weight("bias", WIDTH, scale=1.0)
    g.add("Gelu", x)
    g.add("BiasGelu", x, bias)
    g.add("FastGelu", x)
    g.add("FastGelu", x, bias)
    g.add("QuickGelu", x)
    g.add("QuickGelu", x, alpha=1.0)
    assert_matches(g.model(), [{"x": floats(5, WIDTH)}])


def test_rotary_embedding() -> None:
    """Heads apart and joined, in both orders of a pair, whole and in part, by position and by the first of them."""
    g = Model()
    heads, size, longest = 2, 8, 20
    apart = g.input("apart", FLOAT, ["batch", heads, "length", size])
    joined = g.input("joined", FLOAT, ["batch", "length", heads * size])
    each, first = g.input("each", INT64, ["batch", "length"]), g.input("first", INT64, [1])
    angles = np.outer(np.arange(longest), 10.0 ** -np.arange(size // 2))
    whole = [g.constant(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    part = [g.constant(f(angles[:, :2]).astype(np.float32)) for f in (np.cos, np.sin)]
    for interleaved in (0, 1):
        g.add("RotaryEmbedding", apart, each, *whole, interleaved=interleaved)
        g.add("RotaryEmbedding", joined, first, *whole, interleaved=interleaved, scale=1.0)
        g.add("RotaryEmbedding", joined, each, *part, num_heads=heads, rotary_embedding_dim=4, interleaved=interleaved)
    random = np.random.default_rng(0)
    feeds = {
        "apart": floats(2, heads, 3, size),
        "joined": floats(2, 3, heads * size),
        "each": random.integers(0, longest, (2, 3)),
        "first": np.array([4]),
    }
    assert_matches(g.model(), [feeds])


def test_embed_layer_normalization() -> None:
    g = Model()
    ids, segments, mask, places = (
        g.input(name, INT32, ["batch", "length"]) for name in ("ids", "segments", "mask", "p")
    )
    word, position, segment = g.weight("word", 9, WIDTH), g.weight("position", 6, WIDTH), g.weight("segment", 2, WIDTH)
    scale = [g.weight("gamma", WIDTH, scale=1.0), g.weight("beta", WIDTH)]
    dtypes = [FLOAT, INT32, FLOAT]
    g.add("EmbedLayerNormalization", ids, segments, word, position, segment, *scale, mask, outputs=3, dtypes=dtypes)
    g.add("EmbedLayerNormalization", ids, "", word, position, "", *scale, "", places, outputs=2, dtypes=dtypes[:2])
    random = np.random.default_rng(0)
    feeds = {
        "ids": random.integers(0, 9, (2, 5), np.int32),
        "segments": random.integers(0, 2, (2, 5), np.int32),
        "mask": np.array([[1, 1, 1, 0, 0], [1] * 5], np.int32),
        "p": random.integers(0, 6, (2, 5), np.int32),
    }
    imported = assert_matches(g.model(), [feeds])
    assert imported.bounds == {"length": 6}
    assert set(imported.embeddings) == {"word", "position", "segment"}


def test_gather_block_quantized() -> None:
    """Packed in bytes of 4 and 8 bits with and without zero points, and as int4."""
    g, random = Model(), np.random.default_rng(0)
    ids = g.input("ids", INT64, ["batch", "length"])
    rows, width, block = 7, 64, 32
    scale = g.constant(random.uniform(0.1, 1, (rows, width // block)).astype(np.float32))
    for bits in (4, 8):
        codes = g.constant(pack(random.integers(0, 2**bits, (rows, width), np.uint8), bits))
        zero = g.constant(pack(random.integers(0, 2**bits, (rows, width // block), np.uint8), bits))
        for inputs in ((codes, ids, scale), (codes, ids, scale, zero)):
            g.add("GatherBlockQuantized", *inputs, bits=bits, block_size=block, quantize_axis=1)
    signed = onnx.helper.make_tensor("int4", onnx.TensorProto.INT4, [rows, width], random.integers(-8, 8, rows * width))
    g.initializers.append(signed)
    g.add("GatherBlockQuantized", "int4", ids, scale, block_size=block, quantize_axis=1)
    assert_matches(g.model(), [{"ids": random.integers(0, rows, (2, 3))}])


def test_refusals() -> None:
    g = Model()
    x, gamma = g.input("x", FLOAT, [2, 4]), g.weight("gamma", 4)
    g.add("SkipSimplifiedLayerNormalization", x, x, gamma, outputs=["y", "mean"])
    with pytest.raises(UnsupportedOperatorError, match="its outputs mean and inv_std_var are wanted"):
        import_onnx(g.model())
