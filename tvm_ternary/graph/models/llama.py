"""LLaMA and the families that differ from it by a line: Mistral, Qwen2, Qwen3, BitNet b1.58.

Touvron et al., "LLaMA", arXiv:2302.13971, section 2.2: norms before each part, SwiGLU, rotary positions; Jiang et al.,
"Mistral 7B", arXiv:2310.06825 (grouped queries, sliding window); "Qwen2", arXiv:2407.10671 (biases of queries, keys and
values); "Qwen3", arXiv:2505.09388 (norms of the heads of queries and keys); Ma et al., "BitNet b1.58 2B4T",
arXiv:2504.12285 (norms before the last matrix of each part, squared ReLU). Names of tensors and settings as in
transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.bitnet_tensors import METHOD, BitnetTensors
from tvm_ternary.formats.tensor_files import Tensors
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models.attention import attend, causal_mask, split_heads
from tvm_ternary.graph.models.builder import SEQUENCE, GraphBuilder, build_model
from tvm_ternary.graph.models.rope import Rotation, read_rope, rotate, rotation
from tvm_ternary.graph.models.settings import FILE, Settings

IDS, MASK = "input_ids", "attention_mask"
_BUFFERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Family:
    """What sets a family apart from LLaMA.

    Attributes
    ----------
    qkv_bias : bool
        Queries, keys and values have biases, the output of the attention has none, whatever ``attention_bias`` says.
    head_norm : bool
        Each head of queries and keys is normed before it is rotated.
    inner_norm : bool
        What goes into the last matrix of the attention and of the feed-forward part is normed.
    window : str or None
        The setting without which ``sliding_window`` says nothing; None where it always counts.
    activation, theta, epsilon : str, float, float
        Where the configuration says none.
    head_size : int or None
        The same; None divides the width by the heads.
    """

    qkv_bias: bool = False
    head_norm: bool = False
    inner_norm: bool = False
    window: str | None = None
    activation: str = "silu"
    theta: float = 10000.0
    epsilon: float = 1e-6
    head_size: int | None = None


LLAMA = Family()
MISTRAL = Family()
QWEN2 = Family(qkv_bias=True, window="use_sliding_window")
QWEN3 = Family(head_norm=True, window="use_sliding_window", head_size=128)
BITNET = Family(inner_norm=True, activation="relu2", theta=500000.0, epsilon=1e-5)


def build(config: Mapping[str, Any], tensors: Tensors, family: Family = LLAMA, *, past: bool = False) -> ImportedModel:
    """Build a decoder: ``input_ids``, ``attention_mask`` to ``logits``; with a past, keys and values go in and out.

    Where ``quantization_config`` is BitNet's, for any family, the matrices are ternary: see `BitnetTensors`.
    """
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD:
        tensors = BitnetTensors(tensors, quantization)
    decoder = _Decoder(Settings(config), tensors, family)
    bounds = {SEQUENCE: decoder.rope.positions}
    return build_model(tensors, [IDS, MASK], decoder.body, bounds=bounds, harmless=_BUFFERS, past=past)


build_mistral, build_qwen2, build_qwen3, build_bitnet = (
    partial(build, family=family) for family in (MISTRAL, QWEN2, QWEN3, BITNET)
)


class _Decoder:
    """The sizes of a model, and its graph."""

    def __init__(self, settings: Settings, tensors: Tensors, family: Family) -> None:
        self.family = family
        self.width = settings.count("hidden_size")
        self.inner = settings.count("intermediate_size")
        self.layers = settings.count("num_hidden_layers")
        self.heads = settings.count("num_attention_heads")
        self.kv_heads = settings.count("num_key_value_heads", default=self.heads)
        if family.head_size is None and settings.values.get("head_dim") is None:
            self.size = settings.divided("hidden_size", self.width, self.heads)
        else:
            self.size = settings.count("head_dim", default=family.head_size)
        self.vocabulary = settings.count("vocab_size")
        self.activation = settings.text("hidden_act", default=family.activation)
        self.epsilon = settings.number("rms_norm_eps", default=family.epsilon)
        biases = settings.flag("attention_bias")
        self.qkv_bias, self.output_bias = family.qkv_bias or biases, biases and not family.qkv_bias
        self.mlp_bias = settings.flag("mlp_bias")
        self.tied = settings.flag("tie_word_embeddings")
        self.rope = read_rope(settings, self.size, family.theta)
        self.windows = _windows(settings, family, self.layers)
        self.prefix = "model." if any(name.startswith("model.") for name in tensors.names()) else ""

    def body(self, graph: GraphBuilder) -> dict[str, relax.Expr]:
        table = f"{self.prefix}embed_tokens.weight"
        x = graph.embedding(graph.inputs[IDS], table, self.vocabulary, self.width)
        turn = rotation(graph, self.rope)
        masks = {window: causal_mask(graph, graph.inputs[MASK], window) for window in dict.fromkeys(self.windows)}
        for layer, window in enumerate(self.windows):
            name = f"{self.prefix}layers.{layer}"
            normed = self._norm(graph, x, f"{name}.input_layernorm")
            x = graph.emit(R.add(self._attention(graph, normed, masks[window], turn, f"{name}.self_attn"), x))
            normed = self._norm(graph, x, f"{name}.post_attention_layernorm")
            x = graph.emit(R.add(self._feed_forward(graph, normed, f"{name}.mlp"), x))
        x = self._norm(graph, x, f"{self.prefix}norm")
        return {"logits": graph.head(x, "lm_head.weight", table, self.vocabulary, self.width, tied=self.tied)}

    def _attention(self, graph: GraphBuilder, x: relax.Var, mask: relax.Var, turn: Rotation, name: str) -> relax.Var:
        query = self._heads(graph, x, f"{name}.q_proj", self.heads)
        key, value = (self._heads(graph, x, f"{name}.{part}_proj", self.kv_heads) for part in ("k", "v"))
        if self.family.head_norm:
            query = self._norm(graph, query, f"{name}.q_norm", self.size)
            key = self._norm(graph, key, f"{name}.k_norm", self.size)
        query, key = rotate(graph, query, turn), rotate(graph, key, turn)
        mixed = attend(graph, query, key, value, mask, 1 / math.sqrt(self.size))
        if self.family.inner_norm:
            mixed = self._norm(graph, mixed, f"{name}.attn_sub_norm", self.heads * self.size)
        return self._linear(graph, mixed, f"{name}.o_proj", self.width, self.heads * self.size, self.output_bias)

    def _heads(self, graph: GraphBuilder, x: relax.Var, name: str, heads: int) -> relax.Var:
        joined = self._linear(graph, x, name, heads * self.size, self.width, self.qkv_bias)
        return split_heads(graph, joined, heads, self.size)

    def _feed_forward(self, graph: GraphBuilder, x: relax.Var, name: str) -> relax.Var:
        gate, up = (
            self._linear(graph, x, f"{name}.{part}_proj", self.inner, self.width, self.mlp_bias)
            for part in ("gate", "up")
        )
        inner = graph.emit(R.multiply(graph.activation(gate, self.activation), up))
        if self.family.inner_norm:
            inner = self._norm(graph, inner, f"{name}.ffn_sub_norm", self.inner)
        return self._linear(graph, inner, f"{name}.down_proj", self.width, self.inner, self.mlp_bias)

    def _norm(self, graph: GraphBuilder, x: relax.Var, name: str, width: int | None = None) -> relax.Var:
        return graph.rms_norm(x, name, width or self.width, self.epsilon)

    @staticmethod
    def _linear(graph: GraphBuilder, x: relax.Var, name: str, n: int, k: int, bias: bool) -> relax.Var:
        return graph.linear(x, f"{name}.weight", n, k, bias=f"{name}.bias" if bias else None)


def _windows(settings: Settings, family: Family, layers: int) -> list[int | None]:
    """How many positions the queries of each layer see, their own included; None for all before them."""
    if settings.values.get("sliding_window") is None:
        return [None] * layers
    window = settings.count("sliding_window")
    if family.window is not None and not settings.flag(family.window):
        return [None] * layers
    types = settings.values.get("layer_types")
    if types is None:
        # Qwen counts the layers that see everything; the others have none.
        first = settings.values.get("max_window_layers", 0) if family.window is not None else 0
        return [window if layer >= first else None for layer in range(layers)]
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
        raise ModelError(FILE, f"layer_types is {types!r}, expected {layers} of {' or '.join(known)}")
    return [known[kind] for kind in types]
