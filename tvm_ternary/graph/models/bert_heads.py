"""Heads of the BERT family: what they call their tensors, and what they compute.

A checkpoint has a head where its tensors are there: of a sequence (``logits`` [batch, labels]), of every token
([batch, sequence, labels]), or of masked tokens ([batch, sequence, vocabulary], tied to the table of embeddings).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.errors import ModelError
from tvm_ternary.graph.models.builder import GraphBuilder
from tvm_ternary.graph.models.settings import FILE, Settings


@dataclass(frozen=True)
class Body:
    """What a head reads: the hidden states, the pooler's output if there is one, and the table of token embeddings."""

    graph: GraphBuilder
    settings: Settings
    states: relax.Var
    pooled: relax.Var | None
    table: str

    @property
    def width(self) -> int:
        """Features of a token."""
        return int(self.states.ty.shape.values[-1])

    @property
    def of_tokens(self) -> bool:
        """Whether a classifier is one of tokens; both kinds have the same names."""
        known = self.settings.values.get("architectures") or [""]
        return str(known[0]).endswith("ForTokenClassification")

    def linear(self, x: relax.Var, name: str) -> relax.Var:
        """A layer of the model's width."""
        return self.graph.linear(x, f"{name}.weight", self.width, self.width, bias=f"{name}.bias")

    def classifier(self, x: relax.Var, name: str) -> relax.Var:
        """A layer to as many labels as its tensor has."""
        shape = self.graph.tensors.shape(f"{name}.weight")
        return self.graph.linear(x, f"{name}.weight", shape[0] if shape else 1, self.width, bias=f"{name}.bias")

    def masked(self, dense: str, norm: str, output: str, bias: str) -> relax.Var:
        """The head of masked tokens: a layer, its activation and norm, and the table of embeddings with a bias."""
        graph, settings = self.graph, self.settings
        activation = settings.text("hidden_act", "activation", default="gelu")
        x = graph.activation(self.linear(self.states, dense), activation)
        x = graph.layer_norm(x, norm, self.width, settings.number("layer_norm_eps", default=1e-12))
        vocabulary = settings.count("vocab_size")
        tied = settings.flag("tie_word_embeddings", default=True)
        x = graph.head(x, f"{output}.weight", self.table, vocabulary, self.width, tied=tied)
        if bias != f"{output}.bias" and graph.has(f"{output}.bias"):
            graph.refuse_different(f"{output}.bias", bias, vocabulary)
        return graph.emit(R.add(x, relax.const(graph.vector(bias, vocabulary))))


def bert(body: Body) -> relax.Var | None:
    """Heads of BERT. The one that tells whether a sentence follows another is left out."""
    graph = body.graph
    graph.leave_out("cls.seq_relationship.weight", "cls.seq_relationship.bias")
    if graph.has("cls.predictions.transform.dense.weight"):
        name = "cls.predictions"
        return body.masked(f"{name}.transform.dense", f"{name}.transform.LayerNorm", f"{name}.decoder", f"{name}.bias")
    if not graph.has("classifier.weight"):
        return None
    if body.of_tokens:
        return body.classifier(body.states, "classifier")
    if body.pooled is None:
        raise ModelError(
            "pooler.dense.weight", "is missing from the checkpoint", f"{FILE} says that it has a classifier"
        )
    return body.classifier(body.pooled, "classifier")


def roberta(body: Body) -> relax.Var | None:
    """Heads of RoBERTa, whose classifier of sequences has its own layer instead of the pooler."""
    graph = body.graph
    if graph.has("lm_head.dense.weight"):
        return body.masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
    if graph.has("classifier.out_proj.weight"):
        first = first_token(graph, body.states, body.width)
        return body.classifier(graph.activation(body.linear(first, "classifier.dense"), "tanh"), "classifier.out_proj")
    return body.classifier(body.states, "classifier") if graph.has("classifier.weight") else None


def distilbert(body: Body) -> relax.Var | None:
    """Heads of DistilBERT."""
    graph = body.graph
    if graph.has("vocab_transform.weight"):
        return body.masked("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias")
    if graph.has("pre_classifier.weight"):
        first = first_token(graph, body.states, body.width)
        return body.classifier(graph.activation(body.linear(first, "pre_classifier"), "relu"), "classifier")
    return body.classifier(body.states, "classifier") if graph.has("classifier.weight") else None


def first_token(graph: GraphBuilder, x: relax.Var, width: int) -> relax.Var:
    """The states of the first token of every sequence, (batch, width)."""
    first = graph.emit(R.strided_slice(x, [1], [0], [1], [1], assume_inbound=True))
    return graph.reshape(first, graph.batch, width)
