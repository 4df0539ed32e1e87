"""BERT, and RoBERTa, which is BERT with other positions.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, section 3; Liu et al., "RoBERTa", 2019.
Names of tensors and settings as in transformers: ``BertModel``, alone or under ``bert.``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.tensor_files import Tensors
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models.attention import attend, padding_mask, split_heads
from tvm_ternary.graph.models.builder import SEQUENCE, GraphBuilder, build_model
from tvm_ternary.graph.models.settings import Settings

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
_BUFFERS = ("position_ids", "token_type_ids")


def build(config: Mapping[str, Any], tensors: Tensors) -> ImportedModel:
    """Build BERT: ``input_ids``, ``attention_mask``, ``token_type_ids`` to ``last_hidden_state``, ``pooler_output``.

    The second output is there when the checkpoint has a pooler.
    """
    return _build(_Encoder(Settings(config), tensors, "bert."))


def build_roberta(config: Mapping[str, Any], tensors: Tensors) -> ImportedModel:
    """Build RoBERTa, with the same inputs and outputs.

    Positions count the tokens that are no padding, from ``pad_token_id + 1`` on.
    """
    return _build(_Encoder(Settings(config), tensors, "roberta.", counted=True))


def _build(encoder: _Encoder) -> ImportedModel:
    bounds = {SEQUENCE: encoder.longest}
    return build_model(encoder.tensors, [IDS, MASK, TYPES], encoder.body, bounds=bounds, harmless=_BUFFERS)


class _Encoder:
    """The sizes of a model, and its graph."""

    def __init__(self, settings: Settings, tensors: Tensors, prefix: str, *, counted: bool = False) -> None:
        settings.require("position_embedding_type", "absolute")
        settings.require("is_decoder", False)
        settings.require("add_cross_attention", False)
        self.tensors = tensors
        self.width = settings.count("hidden_size")
        self.inner = settings.count("intermediate_size")
        self.layers = settings.count("num_hidden_layers")
        self.heads = settings.count("num_attention_heads")
        self.size = settings.divided("hidden_size", self.width, self.heads)
        self.activation = settings.text("hidden_act", default="gelu")
        self.epsilon = settings.number("layer_norm_eps", default=1e-12)
        self.vocabulary = settings.count("vocab_size")
        self.types = settings.count("type_vocab_size", default=2)
        self.positions = settings.count("max_position_embeddings", default=512)
        # RoBERTa gives padding a position of its own, and never uses those before it.
        self.padding = int(settings.values.get("pad_token_id", 1)) if counted else None
        self.longest = self.positions if self.padding is None else self.positions - self.padding - 1
        if self.longest < 1:
            raise ModelError("config.json", f"max_position_embeddings {self.positions} leaves no position for a token")
        self.prefix = prefix if any(name.startswith(prefix) for name in tensors.names()) else ""

    def body(self, graph: GraphBuilder) -> dict[str, relax.Expr]:
        x = self._embeddings(graph)
        mask = padding_mask(graph, graph.inputs[MASK])
        for layer in range(self.layers):
            name = f"{self.prefix}encoder.layer.{layer}"
            x = self._attention(graph, x, mask, f"{name}.attention")
            x = self._feed_forward(graph, x, name)
        outputs = {"last_hidden_state": x}
        pooler = f"{self.prefix}pooler.dense"
        if graph.has(f"{pooler}.weight"):
            outputs["pooler_output"] = self._pooler(graph, x, pooler)
        return outputs

    def _embeddings(self, graph: GraphBuilder) -> relax.Var:
        name = f"{self.prefix}embeddings"
        words = graph.embedding(graph.inputs[IDS], f"{name}.word_embeddings.weight", self.vocabulary, self.width)
        types = graph.embedding(graph.inputs[TYPES], f"{name}.token_type_embeddings.weight", self.types, self.width)
        x = graph.emit(
            R.add(graph.emit(R.add(words, types)), self._positions(graph, f"{name}.position_embeddings.weight"))
        )
        return graph.layer_norm(x, f"{name}.LayerNorm", self.width, self.epsilon)

    def _positions(self, graph: GraphBuilder, name: str) -> relax.Var:
        if self.padding is None:
            return graph.first_rows(name, self.positions, self.width)
        padding = relax.const(self.padding, "int64")
        token = graph.emit(R.astype(graph.emit(R.not_equal(graph.inputs[IDS], padding)), "int64"))
        count = graph.emit(R.multiply(graph.emit(R.cumsum(token, 1)), token))
        return graph.embedding(graph.emit(R.add(count, padding)), name, self.positions, self.width)

    def _attention(self, graph: GraphBuilder, x: relax.Var, mask: relax.Var, name: str) -> relax.Var:
        query, key, value = (
            split_heads(graph, self._linear(graph, x, f"{name}.self.{part}"), self.heads, self.size)
            for part in ("query", "key", "value")
        )
        mixed = attend(graph, query, key, value, mask, 1 / math.sqrt(self.size))
        return self._joined(graph, self._linear(graph, mixed, f"{name}.output.dense"), x, f"{name}.output.LayerNorm")

    def _feed_forward(self, graph: GraphBuilder, x: relax.Var, name: str) -> relax.Var:
        inner = self._linear(graph, x, f"{name}.intermediate.dense", n=self.inner)
        inner = graph.activation(inner, self.activation)
        outer = self._linear(graph, inner, f"{name}.output.dense", k=self.inner)
        return self._joined(graph, outer, x, f"{name}.output.LayerNorm")

    def _joined(self, graph: GraphBuilder, change: relax.Var, x: relax.Var, norm: str) -> relax.Var:
        return graph.layer_norm(graph.emit(R.add(change, x)), norm, self.width, self.epsilon)

    def _pooler(self, graph: GraphBuilder, x: relax.Var, name: str) -> relax.Var:
        """A layer on the first token."""
        first = graph.emit(R.strided_slice(x, [1], [0], [1], [1], assume_inbound=True))
        first = graph.reshape(first, graph.batch, self.width)
        return graph.activation(self._linear(graph, first, name), "tanh")

    def _linear(
        self, graph: GraphBuilder, x: relax.Var, name: str, n: int | None = None, k: int | None = None
    ) -> relax.Var:
        return graph.linear(x, f"{name}.weight", n or self.width, k or self.width, bias=f"{name}.bias")
