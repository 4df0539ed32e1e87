"""Small checkpoints of the LLaMA families with random weights, and their reference in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import Arrays, Weights, attention

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": None}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 4}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 10, "attention_bias": False}
BITNET = {**LLAMA, "model_type": "bitnet", "hidden_act": "relu2", "tie_word_embeddings": True}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def decoder(config: Mapping[str, Any] = LLAMA, prefix: str = "model.") -> Arrays:
    """Weights of a decoder of any family."""
    kind, weights, size = config["model_type"], Weights(), head_size(config)
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    rows = {"q": config["num_attention_heads"] * size, "k": config["num_key_value_heads"] * size}
    rows["v"] = rows["k"]

    def norm(name: str, count: int) -> None:
        weights.vector(f"{name}.weight", count)
        weights.arrays[f"{name}.weight"] += 1

    weights.matrix(f"{prefix}embed_tokens.weight", vocabulary, width)
    for layer in range(config["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}"
        norm(f"{name}.input_layernorm", width)
        norm(f"{name}.post_attention_layernorm", width)
        for part, count in rows.items():
            weights.matrix(f"{name}.self_attn.{part}_proj.weight", count, width)
            if kind == "qwen2" or config.get("attention_bias"):
                weights.vector(f"{name}.self_attn.{part}_proj.bias", count)
        weights.matrix(f"{name}.self_attn.o_proj.weight", width, rows["q"])
        if config.get("attention_bias"):
            weights.vector(f"{name}.self_attn.o_proj.bias", width)
        for part, n, k in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            weights.matrix(f"{name}.mlp.{part}_proj.weight", n, k)
            if config.get("mlp_bias"):
                weights.vector(f"{name}.mlp.{part}_proj.bias", n)
        if kind == "qwen3":
            norm(f"{name}.self_attn.q_norm", size)
            norm(f"{name}.self_attn.k_norm", size)
        if kind == "bitnet":
            norm(f"{name}.self_attn.attn_sub_norm", rows["q"])
            norm(f"{name}.mlp.ffn_sub_norm", inner)
    norm(f"{prefix}norm", width)
    if not config.get("tie_word_embeddings"):
        weights.matrix("lm_head.weight", vocabulary, width)
    return weights.arrays


def ternary(arrays: Mapping[str, np.ndarray], seed: int = 0) -> tuple[Arrays, dict[str, np.ndarray], dict[str, float]]:
    """Weights whose linear layers are trits times a scale that bfloat16 holds; and the trits and the scales."""
    random = np.random.default_rng(seed)
    dense, trits, scales = dict(arrays), {}, {}
    for name, array in arrays.items():
        if name.split(".")[-2] in LINEAR and array.ndim == 2:
            trits[name] = random.integers(-1, 2, array.shape, dtype=np.int8)
            scales[name] = float(bfloat16(random.uniform(0.1, 0.4)))
            dense[name] = trits[name] * np.float32(scales[name])
    return dense, trits, scales


def bfloat16(values: Any) -> np.ndarray:
    """Float32 values cut to what bfloat16 holds."""
    return (np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def write_bfloat16(folder: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write ``config.json`` and ``model.safetensors``, floats as bfloat16, which no numpy array is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, data = {}, b""
    for name, array in arrays.items():
        kind, content = "U8", array.tobytes()
        if array.dtype != np.uint8:
            kind, content = "BF16", (array.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        span = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


# The reference: the papers' formulas, in float64, a sequence at a time


def frequencies(config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Radians a position, and the gain, by loops over what transformers' documentation says."""
    size, scaling = head_size(config), config.get("rope_scaling") or {}
    base, factor = config["rope_theta"], scaling.get("factor", 1.0)
    plain = [1 / base ** (2 * i / size) for i in range(size // 2)]
    kind = scaling.get("rope_type", "default")
    if kind in ("default", "linear"):
        return np.array(plain) / factor, 1.0
    if kind == "longrope":
        return np.array(plain) / scaling["short_factor"], scaling["attention_factor"]
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        out, low, high = [], scaling["low_freq_factor"], scaling["high_freq_factor"]
        for f in plain:
            wave = 2 * math.pi / f
            if wave < original / high:
                out.append(f)
            elif wave > original / low:
                out.append(f / factor)
            else:
                smooth = (original / wave - low) / (high - low)
                out.append((1 - smooth) * f / factor + smooth * f)
        return np.array(out), 1.0
    ends = [size * math.log(original / (t * 2 * math.pi)) / (2 * math.log(base)) for t in (32, 1)]
    first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), size - 1)
    ramp = [min(max((i - first) / (last - first), 0), 1) for i in range(size // 2)]
    out = [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
    return np.array(out), 0.1 * math.log(factor) + 1


def turned(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Heads (s, d) turned as complex numbers."""
    angles, gain = frequencies(config)
    half = x.shape[-1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * angles) * gain
    return np.concatenate([z.real, z.imag], -1)


def rms(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def run_decoder(
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    ids: np.ndarray,
    mask: np.ndarray,
    prefix: str = "model.",
    quantized: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> np.ndarray:
    """Logits of one sequence; ``quantized`` is done to what goes into the linear layers of the blocks."""
    w = {name.removeprefix(prefix): array.astype(np.float64) for name, array in arrays.items()}
    kind, epsilon, size = config["model_type"], config["rms_norm_eps"], head_size(config)
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    positions = np.arange(len(ids))
    distance = positions[:, None] - positions

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return quantized(x) @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def split(x: np.ndarray, norm: str | None, rotary: bool) -> list[np.ndarray]:
        parts = [x[:, i : i + size] for i in range(0, x.shape[1], size)]
        if kind == "qwen3" and norm:
            parts = [rms(part, w[f"{norm}.weight"], epsilon) for part in parts]
        return [turned(part, config) for part in parts] if rotary else parts

    def activation(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0) ** 2 if config["hidden_act"] == "relu2" else x / (1 + np.exp(-x))

    x = w["embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name, window = f"layers.{layer}", config.get("sliding_window")
        if window is None or not config.get("use_sliding_window", True) or layer < config.get("max_window_layers", 0):
            window = len(ids)
        seen = (distance >= 0) & (distance < window) & (mask == 1)
        h = rms(x, w[f"{name}.input_layernorm.weight"], epsilon)
        q = split(linear(h, f"{name}.self_attn.q_proj"), f"{name}.self_attn.q_norm", True)
        k = split(linear(h, f"{name}.self_attn.k_proj"), f"{name}.self_attn.k_norm", True)
        v = split(linear(h, f"{name}.self_attn.v_proj"), None, False)
        mixed = np.concatenate([attention(q[i], k[i // group], v[i // group], seen) for i in range(len(q))], -1)
        if kind == "bitnet":
            mixed = rms(mixed, w[f"{name}.self_attn.attn_sub_norm.weight"], epsilon)
        x = x + linear(mixed, f"{name}.self_attn.o_proj")
        h = rms(x, w[f"{name}.post_attention_layernorm.weight"], epsilon)
        inner = activation(linear(h, f"{name}.mlp.gate_proj")) * linear(h, f"{name}.mlp.up_proj")
        if kind == "bitnet":
            inner = rms(inner, w[f"{name}.mlp.ffn_sub_norm.weight"], epsilon)
        x = x + linear(inner, f"{name}.mlp.down_proj")
    return rms(x, w["norm.weight"], epsilon) @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def run_all(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits of every sequence of a batch."""
    rows = zip(given["input_ids"], given["attention_mask"], strict=True)
    return np.stack([run_decoder(arrays, config, *row) for row in rows])
