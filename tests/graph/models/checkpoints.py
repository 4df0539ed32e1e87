"""Small checkpoints with random weights, and references of their architectures in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray]


def write_checkpoint(folder: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write ``config.json`` and ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    return folder


class Weights:
    """Makes random weights; those of norms are near one."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.arrays: Arrays = {}

    def matrix(self, name: str, *shape: int) -> None:
        self.arrays[name] = (self.random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def vector(self, name: str, size: int) -> None:
        self.arrays[name] = (0.1 * self.random.standard_normal(size)).astype(np.float32)

    def linear(self, name: str, n: int, k: int, *, transposed: bool = False) -> None:
        self.matrix(f"{name}.weight", *((k, n) if transposed else (n, k)))
        self.vector(f"{name}.bias", n)

    def norm(self, name: str, size: int) -> None:
        self.vector(f"{name}.weight", size)
        self.arrays[f"{name}.weight"] += 1
        self.vector(f"{name}.bias", size)


BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 50,
    "type_vocab_size": 2,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 16,
    "vocab_size": 50,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}


def bert(config: Mapping[str, Any] = BERT, prefix: str = "", pooler: bool = True) -> Arrays:
    """Weights of a BERT or RoBERTa."""
    weights, width, inner = Weights(), config["hidden_size"], config["intermediate_size"]
    rows = {"word": config["vocab_size"], "position": config["max_position_embeddings"]}
    for table, count in {**rows, "token_type": config["type_vocab_size"]}.items():
        weights.matrix(f"{prefix}embeddings.{table}_embeddings.weight", count, width)
    weights.norm(f"{prefix}embeddings.LayerNorm", width)
    for layer in range(config["num_hidden_layers"]):
        name = f"{prefix}encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            weights.linear(f"{name}.attention.{part}", width, width)
        weights.norm(f"{name}.attention.output.LayerNorm", width)
        weights.linear(f"{name}.intermediate.dense", inner, width)
        weights.linear(f"{name}.output.dense", width, inner)
        weights.norm(f"{name}.output.LayerNorm", width)
    if pooler:
        weights.linear(f"{prefix}pooler.dense", width, width)
    return weights.arrays


def gpt2(config: Mapping[str, Any] = GPT2, prefix: str = "transformer.") -> Arrays:
    """Weights of a GPT-2 without an output layer of its own."""
    weights, width = Weights(), config["n_embd"]
    weights.matrix(f"{prefix}wte.weight", config["vocab_size"], width)
    weights.matrix(f"{prefix}wpe.weight", config["n_positions"], width)
    for layer in range(config["n_layer"]):
        name = f"{prefix}h.{layer}"
        for norm in ("ln_1", "ln_2"):
            weights.norm(f"{name}.{norm}", width)
        weights.linear(f"{name}.attn.c_attn", 3 * width, width, transposed=True)
        weights.linear(f"{name}.attn.c_proj", width, width, transposed=True)
        weights.linear(f"{name}.mlp.c_fc", 4 * width, width, transposed=True)
        weights.linear(f"{name}.mlp.c_proj", width, 4 * width, transposed=True)
    weights.norm(f"{prefix}ln_f", width)
    return weights.arrays


def feeds(length: int = 7, vocabulary: int = 50, **extra: np.ndarray) -> dict[str, np.ndarray]:
    """Two sequences of tokens, the second padded at its end."""
    random = np.random.default_rng(1)
    mask = np.ones((2, length), np.int64)
    mask[1, length // 2 + 1 :] = 0
    ids = np.where(mask == 1, random.integers(2, vocabulary, (2, length)), 1)
    return {"input_ids": ids, "attention_mask": mask, **extra}


# References: the papers' formulas, in float64, a sequence at a time


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, arrays: Mapping[str, np.ndarray], name: str, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normed * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """One head: q (s, d), k and v (t, d), seen (s, t) bool. A query that sees nothing averages all values."""
    return softmax(np.where(seen, q @ k.T / np.sqrt(q.shape[-1]), -1e30)) @ v


def heads(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, count: int) -> np.ndarray:
    """All heads, which lie side by side in the last axis."""
    parts = zip(*(np.split(x, count, -1) for x in (q, k, v)), strict=True)
    return np.concatenate([attention(*part, seen) for part in parts], -1)


def run_bert(
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    ids: np.ndarray,
    mask: np.ndarray,
    types: np.ndarray,
    positions: Callable[[np.ndarray], np.ndarray] = lambda ids: np.arange(len(ids)),
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and the pooler's output of one sequence; names without a prefix."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    epsilon = config["layer_norm_eps"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][types]
    x = x + w["embeddings.position_embeddings.weight"][positions(ids)]
    x = layer_norm(x, w, "embeddings.LayerNorm", epsilon)
    seen = np.broadcast_to(mask == 1, (len(ids), len(ids)))
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        q, k, v = (linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        mixed = heads(q, k, v, seen, config["num_attention_heads"])
        mixed = linear(mixed, f"{name}.attention.output.dense")
        x = layer_norm(x + mixed, w, f"{name}.attention.output.LayerNorm", epsilon)
        inner = linear(gelu(linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense")
        x = layer_norm(x + inner, w, f"{name}.output.LayerNorm", epsilon)
    return x, np.tanh(linear(x[0], "pooler.dense"))


def run_gpt2(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Logits of one sequence; names without a prefix."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    epsilon = config["layer_norm_epsilon"]

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    seen = np.tril(np.ones((len(ids), len(ids)), bool)) & (mask == 1)
    for layer in range(config["n_layer"]):
        name = f"h.{layer}"
        q, k, v = np.split(conv(layer_norm(x, w, f"{name}.ln_1", epsilon), f"{name}.attn.c_attn"), 3, -1)
        x = x + conv(heads(q, k, v, seen, config["n_head"]), f"{name}.attn.c_proj")
        inner = conv(layer_norm(x, w, f"{name}.ln_2", epsilon), f"{name}.mlp.c_fc")
        x = x + conv(gelu_tanh(inner), f"{name}.mlp.c_proj")
    return layer_norm(x, w, "ln_f", epsilon) @ w["wte.weight"].T
