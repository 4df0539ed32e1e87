"""A decoder as onnxruntime's model builder writes it: 4-bit weights, grouped attention, norms with their residual."""

from __future__ import annotations

import numpy as np
import onnx

from tests.graph.onnx.operators.contrib.test_products import packed
from tests.graph.onnx.test_decoders import check_decoder
from tests.models import FLOAT, INT64, Cache, GraphBuilder

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, VOCABULARY, LONGEST, BLOCK = 2, 64, 4, 2, 96, 50, 24, 32
HEAD = WIDTH // HEADS


class Fused(GraphBuilder):
    """Operators of the ``com.microsoft`` set by their short names."""

    def fused(self, op: str, *inputs: str, outputs: list[str | None] | None = None, **attributes: object) -> list[str]:
        return self.nodes_of(op, *inputs, outputs=outputs or [None], domain="com.microsoft", **attributes)

    def projection(self, x: str, name: str, inner: int, outer: int) -> str:
        codes = self.random.integers(0, 16, (outer, inner), np.uint8)
        weight = packed(self, f"{name}.weight", codes, 4, BLOCK)
        scale = self.constant(self.random.uniform(0.01, 0.02, outer * inner // BLOCK).astype(np.float32))
        return self.fused("MatMulNBits", x, weight, scale, N=outer, K=inner, bits=4, block_size=BLOCK)[0]

    def scale(self, name: str) -> str:
        return self.constant(1 + 0.1 * self.random.standard_normal(WIDTH).astype(np.float32), name)


def decoder(cache: str) -> onnx.ModelProto:
    """For ``cache`` see `Cache`."""
    g = Fused("decoder", seed=3)
    ids = g.input("input_ids", INT64, ["batch", "length"])
    stored = Cache(g, cache, LAYERS, KV_HEADS, HEAD)
    g.output("logits", FLOAT, ["batch", "length", VOCABULARY])
    mask = g.input("attention_mask", INT64, ["batch", stored.keys])
    count = g.node("Sub", g.node("ReduceSum", mask, g.constant([1]), keepdims=0), g.constant([1]))
    ends = g.node("Cast", count, to=onnx.TensorProto.INT32)
    total = g.node("Gather", g.node("Shape", mask), g.constant(1), axis=0)
    total = g.node("Cast", total, to=onnx.TensorProto.INT32)
    angles = np.outer(np.arange(LONGEST), 10.0 ** -np.arange(HEAD // 2))
    tables = [g.constant(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    x = g.node("Gather", g.weight("model.embed_tokens.weight", VOCABULARY, WIDTH, scale=1.0), ids, axis=0)
    normed = g.node("SimplifiedLayerNormalization", x, g.scale("model.first_norm.weight"), axis=-1, epsilon=1e-6)
    for i in range(LAYERS):
        name = f"model.layers.{i}"
        width = (HEADS + 2 * KV_HEADS) * HEAD
        past = [f"past.{i}.{kind}" if stored.past else "" for kind in ("key", "value")]
        present = [f"present.{i}.{kind}" for kind in ("key", "value")]
        for state in present:
            g.output(state, FLOAT, stored.shape)
        attended = g.fused(
            "GroupQueryAttention",
            *(g.projection(normed, f"{name}.attn.qkv_proj", WIDTH, width), "", "", *past, ends, total, *tables),
            outputs=[None, *present],
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )[0]
        out = g.projection(attended, f"{name}.attn.o_proj", WIDTH, WIDTH)
        normed, _, _, x = g.fused(
            "SkipSimplifiedLayerNormalization", x, out, g.scale(f"{name}.post.weight"), outputs=[None, "", "", None]
        )
        gate, up = (g.projection(normed, f"{name}.mlp.{kind}_proj", WIDTH, INNER) for kind in ("gate", "up"))
        inner = g.node("Mul", g.fused("QuickGelu", gate, alpha=1.0)[0], up)
        out = g.projection(inner, f"{name}.mlp.down_proj", INNER, WIDTH)
        normed, _, _, x = g.fused(
            "SkipSimplifiedLayerNormalization", x, out, g.scale(f"{name}.next.weight"), outputs=[None, "", "", None]
        )
    g.node("MatMul", normed, g.weight("lm_head.weight", WIDTH, VOCABULARY), output="logits")
    return g.model()


def test_steps_give_what_one_pass_gives() -> None:
    """Behind a past onnxruntime takes several tokens of one sequence only."""
    check_decoder(decoder("out"), decoder("both"), 5 * LAYERS + 1, hides=False, sizes=((1, 5, 3), (2, 1, 7)))
