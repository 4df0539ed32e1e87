"""BERT, and its relatives RoBERTa, with other positions, and DistilBERT, with half the layers and no token types.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, section 3; Liu et al., "RoBERTa", 2019;
Sanh et al., "DistilBERT", 2019. Names of tensors and settings as in transformers, with or without the prefix that a
model with a head gives them (``bert.encoder...``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.tensor_files import Tensors
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models import bert_heads
from tvm_ternary.graph.models.attention import attend, not_later, padding_mask, split_heads
from tvm_ternary.graph.models.builder import SEQUENCE, GraphBuilder, build_model
from tvm_ternary.graph.models.settings import FILE, Settings

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True)
class Names:
    """What one kind of encoder calls its parts: a block, and inside it matrices and norms."""

    prefix: str
    block: str
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    mixed: str = "attention.output.dense"
    mixed_norm: str = "attention.output.LayerNorm"
    inner: str = "intermediate.dense"
    outer: str = "output.dense"
    outer_norm: str = "output.LayerNorm"


_BERT = Names("bert.", "encoder.layer")
_ROBERTA = Names("roberta.", "encoder.layer")
_DISTILBERT = Names(
    "distilbert.",
    "transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    mixed="attention.out_lin",
    mixed_norm="sa_layer_norm",
    inner="ffn.lin1",
    outer="ffn.lin2",
    outer_norm="output_layer_norm",
)


def build(config: Mapping[str, Any], tensors: Tensors) -> ImportedModel:
    """Build BERT: ``input_ids``, ``attention_mask``, ``token_type_ids`` to ``last_hidden_state``.

    ``pooler_output`` follows when the checkpoint has a pooler, ``logits`` when it has a head (`bert_heads`).
    """
    return _build(Encoder(Settings(config), tensors, _BERT), bert_heads.bert)


def build_roberta(config: Mapping[str, Any], tensors: Tensors) -> ImportedModel:
    """Build RoBERTa, with the same inputs and outputs.

    Positions count the tokens that are no padding, from ``pad_token_id + 1`` on.
    """
    return _build(Encoder(Settings(config), tensors, _ROBERTA, counted=True), bert_heads.roberta)


def build_distilbert(config: Mapping[str, Any], tensors: Tensors) -> ImportedModel:
    """Build DistilBERT: ``input_ids``, ``attention_mask`` to ``last_hidden_state``, and ``logits`` of a head."""
    return _build(Encoder(Settings(config), tensors, _DISTILBERT, typed=False), bert_heads.distilbert)


def _build(encoder: Encoder, head: Callable[[bert_heads.Body], relax.Var | None]) -> ImportedModel:
    def body(graph: GraphBuilder) -> dict[str, relax.Expr]:
        outputs = encoder.outputs(graph)
        states, pooled = outputs["last_hidden_state"], outputs.get("pooler_output")
        logits = head(bert_heads.Body(graph, encoder.settings, states, pooled, encoder.table))
        return outputs if logits is None else {**outputs, "logits": logits}

    inputs = [IDS, MASK, TYPES] if encoder.typed else [IDS, MASK]
    return build_model(encoder.tensors, inputs, body, bounds={SEQUENCE: encoder.longest}, harmless=_BUFFERS)


class Encoder:
    """The sizes of a model, and its graph.

    Parameters
    ----------
    settings : Settings
    tensors : Tensors
    names : Names
    typed : bool
        Whether tokens have types.
    counted : bool
        Whether positions count the tokens that are no padding.
    """

    def __init__(
        self, settings: Settings, tensors: Tensors, names: Names, *, typed: bool = True, counted: bool = False
    ) -> None:
        settings.require("position_embedding_type", "absolute")
        for name in ("is_decoder", "add_cross_attention", "sinusoidal_pos_embds"):
            settings.require(name, False)
        self.settings, self.tensors, self.names, self.typed = settings, tensors, names, typed
        self.width = settings.count("hidden_size", "dim")
        self.inner = settings.count("intermediate_size", "hidden_dim")
        self.layers = settings.count("num_hidden_layers", "n_layers")
        self.heads = settings.count("num_attention_heads", "n_heads")
        self.size = settings.divided("hidden_size", self.width, self.heads)
        self.activation = settings.text("hidden_act", "activation", default="gelu")
        self.epsilon = settings.number("layer_norm_eps", default=1e-12)
        self.vocabulary = settings.count("vocab_size")
        self.positions = settings.count("max_position_embeddings", default=512)
        # RoBERTa gives padding a position of its own, and never uses those before it.
        self.padding = settings.count("pad_token_id", default=1, least=0) if counted else None
        self.longest = self.positions if self.padding is None else self.positions - self.padding - 1
        if self.longest < 1:
            raise ModelError(FILE, f"max_position_embeddings {self.positions} leaves no position for a token")
        self.prefix = names.prefix if any(name.startswith(names.prefix) for name in tensors.names()) else ""

    @property
    def table(self) -> str:
        """The tensor of token embeddings."""
        return f"{self.prefix}embeddings.word_embeddings.weight"

    def outputs(self, graph: GraphBuilder) -> dict[str, relax.Var]:
        """Emit the encoder, and its pooler where there is one."""
        x = self._embeddings(graph)
        mask = padding_mask(graph, graph.inputs[MASK])
        for layer in range(self.layers):
            name = f"{self.prefix}{self.names.block}.{layer}"
            x = self._attention(graph, x, mask, name)
            x = self._feed_forward(graph, x, name)
        outputs = {"last_hidden_state": x}
        pooler = f"{self.prefix}pooler.dense"
        if graph.has(f"{pooler}.weight"):
            first = bert_heads.first_token(graph, x, self.width)
            outputs["pooler_output"] = graph.activation(self._linear(graph, first, pooler), "tanh")
        return outputs

    def _embeddings(self, graph: GraphBuilder) -> relax.Var:
        name = f"{self.prefix}embeddings"
        x = graph.embedding(graph.inputs[IDS], self.table, self.vocabulary, self.width)
        if self.typed:
            count = self.settings.count("type_vocab_size", default=2)
            types = graph.embedding(graph.inputs[TYPES], f"{name}.token_type_embeddings.weight", count, self.width)
            x = graph.emit(R.add(x, types))
        x = graph.emit(R.add(x, self._positions(graph, f"{name}.position_embeddings.weight")))
        return graph.layer_norm(x, f"{name}.LayerNorm", self.width, self.epsilon)

    def _positions(self, graph: GraphBuilder, name: str) -> relax.Var:
        if self.padding is None:
            return graph.first_rows(name, self.positions, self.width)
        padding = relax.const(self.padding, "int64")
        token = graph.emit(R.not_equal(graph.inputs[IDS], padding))
        # A cumulative sum as sums, for which there are schedules everywhere.
        *_, before = not_later(graph)
        counted = graph.emit(R.logical_and(graph.reshape(token, graph.batch, 1, graph.sequence), before))
        count = graph.emit(R.sum(graph.emit(R.astype(counted, "int64")), -1))
        count = graph.emit(R.multiply(count, graph.emit(R.astype(token, "int64"))))
        return graph.embedding(graph.emit(R.add(count, padding)), name, self.positions, self.width)

    def _attention(self, graph: GraphBuilder, x: relax.Var, mask: relax.Var, name: str) -> relax.Var:
        query, key, value = (
            split_heads(graph, self._linear(graph, x, f"{name}.{part}"), self.heads, self.size)
            for part in (self.names.query, self.names.key, self.names.value)
        )
        mixed = attend(graph, query, key, value, mask, 1 / math.sqrt(self.size))
        change = self._linear(graph, mixed, f"{name}.{self.names.mixed}")
        return self._joined(graph, change, x, f"{name}.{self.names.mixed_norm}")

    def _feed_forward(self, graph: GraphBuilder, x: relax.Var, name: str) -> relax.Var:
        inner = self._linear(graph, x, f"{name}.{self.names.inner}", n=self.inner)
        inner = graph.activation(inner, self.activation)
        change = self._linear(graph, inner, f"{name}.{self.names.outer}", k=self.inner)
        return self._joined(graph, change, x, f"{name}.{self.names.outer_norm}")

    def _joined(self, graph: GraphBuilder, change: relax.Var, x: relax.Var, norm: str) -> relax.Var:
        return graph.layer_norm(graph.emit(R.add(change, x)), norm, self.width, self.epsilon)

    def _linear(
        self, graph: GraphBuilder, x: relax.Var, name: str, n: int | None = None, k: int | None = None
    ) -> relax.Var:
        return graph.linear(x, f"{name}.weight", n or self.width, k or self.width, bias=f"{name}.bias")
