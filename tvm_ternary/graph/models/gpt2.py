"""GPT-2.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3. Names of tensors and settings
as in transformers: ``GPT2LMHeadModel``, or ``GPT2Model`` alone, whose output layer is the table of its embeddings.
``Conv1D`` stores matrices as (in_features, out_features).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.formats.tensor_files import Tensors
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models.attention import attend, causal_mask, split_heads
from tvm_ternary.graph.models.builder import SEQUENCE, GraphBuilder, build_model
from tvm_ternary.graph.models.settings import Settings

IDS, MASK = "input_ids", "attention_mask"
_BUFFERS = ("attn.bias", "attn.masked_bias")
"""The causal mask, which old checkpoints hold for every layer."""


def build(config: Mapping[str, Any], tensors: Tensors, *, past: bool = False) -> ImportedModel:
    """Build GPT-2: ``input_ids``, ``attention_mask`` to ``logits``; with a past, keys and values go in and out."""
    decoder = _Decoder(Settings(config), tensors)
    bounds = {SEQUENCE: decoder.positions}
    return build_model(tensors, [IDS, MASK], decoder.body, bounds=bounds, harmless=_BUFFERS, past=past)


class _Decoder:
    """The sizes of a model, and its graph."""

    def __init__(self, settings: Settings, tensors: Tensors) -> None:
        settings.require("add_cross_attention", False)
        settings.require("scale_attn_by_inverse_layer_idx", False)
        self.width = settings.count("n_embd", "hidden_size")
        self.layers = settings.count("n_layer", "num_hidden_layers")
        self.heads = settings.count("n_head", "num_attention_heads")
        self.size = settings.divided("n_embd", self.width, self.heads)
        self.inner = settings.count("n_inner", default=4 * self.width)
        self.vocabulary = settings.count("vocab_size")
        self.positions = settings.count("n_positions", "max_position_embeddings")
        self.activation = settings.text("activation_function", default="gelu_new")
        self.epsilon = settings.number("layer_norm_epsilon", default=1e-5)
        self.scale = 1 / math.sqrt(self.size) if settings.flag("scale_attn_weights", default=True) else 1.0
        self.tied = settings.flag("tie_word_embeddings", default=True)
        self.prefix = "transformer." if any(name.startswith("transformer.") for name in tensors.names()) else ""

    def body(self, graph: GraphBuilder) -> dict[str, relax.Expr]:
        table = f"{self.prefix}wte.weight"
        words = graph.embedding(graph.inputs[IDS], table, self.vocabulary, self.width)
        places = graph.first_rows(f"{self.prefix}wpe.weight", self.positions, self.width)
        x = graph.emit(R.add(words, places))
        mask = causal_mask(graph, graph.inputs[MASK])
        for layer in range(self.layers):
            name = f"{self.prefix}h.{layer}"
            normed = graph.layer_norm(x, f"{name}.ln_1", self.width, self.epsilon)
            x = graph.emit(R.add(self._attention(graph, normed, mask, f"{name}.attn"), x))
            normed = graph.layer_norm(x, f"{name}.ln_2", self.width, self.epsilon)
            x = graph.emit(R.add(self._feed_forward(graph, normed, f"{name}.mlp"), x))
        x = graph.layer_norm(x, f"{self.prefix}ln_f", self.width, self.epsilon)
        return {"logits": graph.head(x, "lm_head.weight", table, self.vocabulary, self.width, tied=self.tied)}

    def _attention(self, graph: GraphBuilder, x: relax.Var, mask: relax.Var, name: str) -> relax.Var:
        joined = self._conv(graph, x, f"{name}.c_attn", 3 * self.width, self.width)
        parts = graph.emit(R.split(joined, 3, -1))
        query, key, value = (
            split_heads(graph, graph.emit(relax.TupleGetItem(parts, i)), self.heads, self.size) for i in range(3)
        )
        mixed = attend(graph, query, key, value, mask, self.scale)
        return self._conv(graph, mixed, f"{name}.c_proj", self.width, self.width)

    def _feed_forward(self, graph: GraphBuilder, x: relax.Var, name: str) -> relax.Var:
        inner = graph.activation(self._conv(graph, x, f"{name}.c_fc", self.inner, self.width), self.activation)
        return self._conv(graph, inner, f"{name}.c_proj", self.width, self.inner)

    @staticmethod
    def _conv(graph: GraphBuilder, x: relax.Var, name: str, n: int, k: int) -> relax.Var:
        return graph.linear(x, f"{name}.weight", n, k, bias=f"{name}.bias", transposed=True)
