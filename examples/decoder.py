"""A decoder of the LLaMA family in numpy, forwards and backwards: RMSNorm, rotary positions, SwiGLU, causal attention.

Every part returns its output and the function that takes the output's gradient back to its inputs, so a layer's
backward pass is its forward pass read from below. Parameters are a dict under the names and with the shapes that
Hugging Face's ``LlamaForCausalLM`` gives them; float32 ones are trained, float64 ones serve to check gradients.

References
----------
Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Tokens = npt.NDArray[np.integer[Any]]
Parameters = dict[str, Floats]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Parameters
    ----------
    vocabulary, width, hidden, layers, heads : int
        Tokens, features of a token, features between the feed-forward's matrices, blocks, attention heads of each.
    context : int
        Tokens of a training sequence; nothing in the model depends on it.
    theta, epsilon : float
        Base of the rotary angles; what RMSNorm adds to the mean square.
    """

    vocabulary: int
    width: int = 192
    hidden: int = 512
    layers: int = 4
    heads: int = 4
    context: int = 128
    theta: float = 10000.0
    epsilon: float = 1e-5

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter; a matrix is (out_features, in_features)."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, self.width)}
        for i in range(self.layers):
            block = f"model.layers.{i}."
            shapes[block + "input_layernorm.weight"] = (self.width,)
            for name in "qkvo":
                shapes[f"{block}self_attn.{name}_proj.weight"] = (self.width, self.width)
            shapes[block + "post_attention_layernorm.weight"] = (self.width,)
            for name in ("gate", "up"):
                shapes[f"{block}mlp.{name}_proj.weight"] = (self.hidden, self.width)
            shapes[block + "mlp.down_proj.weight"] = (self.width, self.hidden)
        return shapes | {FINAL_NORM: (self.width,), HEAD: (self.vocabulary, self.width)}


def initial(config: DecoderConfig, seed: int) -> Parameters:
    """Norms of one, matrices of normal numbers; those that add to the residual stream smaller, as in GPT-2."""
    rng = np.random.default_rng(seed)
    parameters: Parameters = {}
    for name, shape in config.shapes().items():
        if len(shape) == 1:
            parameters[name] = np.ones(shape, np.float32)
            continue
        scale = 0.02 if name == EMBEDDING else shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= (2 * config.layers) ** 0.5
        parameters[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return parameters


def loss_and_gradients(parameters: Parameters, text: Tokens, config: DecoderConfig) -> tuple[float, Parameters]:
    """Mean cross entropy in nats of each token given those before it, and its gradient.

    Parameters
    ----------
    parameters : dict
        As `DecoderConfig.shapes` lists them.
    text : (B, T + 1) int
        The first T of a row are read, the last T predicted.
    """
    logits, back = _run(parameters, text[:, :-1], config)
    probability = _softmax(logits)
    chosen = np.take_along_axis(probability, text[:, 1:, None], axis=2)
    gradient = probability
    np.put_along_axis(gradient, text[:, 1:, None], chosen - 1, axis=2)
    return float(-np.log(chosen).mean()), back(gradient / chosen.size)


def forward(parameters: Parameters, tokens: Tokens, config: DecoderConfig) -> Floats:
    """Logits (B, T, vocabulary) of the token after each of ``tokens`` (B, T)."""
    return _run(parameters, tokens, config)[0]


def _run(
    parameters: Parameters, tokens: Tokens, config: DecoderConfig
) -> tuple[Floats, Callable[[Floats], Parameters]]:
    part = _Part(parameters, config.epsilon)
    angles = _angles(tokens.shape[1], config, parameters[EMBEDDING].dtype)
    x = parameters[EMBEDDING][tokens]
    backs = []
    for i in range(config.layers):
        x, back = part.attention(x, f"model.layers.{i}.", angles)
        backs.append(back)
        x, back = part.feed_forward(x, f"model.layers.{i}.")
        backs.append(back)
    x, norm_back = part.norm(x, FINAL_NORM)
    logits, head_back = part.linear(x, HEAD)

    def backward(gradient: Floats) -> Parameters:
        gradient = norm_back(head_back(gradient))
        for back in reversed(backs):
            gradient = back(gradient)
        table = np.zeros_like(parameters[EMBEDDING])
        np.add.at(table, tokens.ravel(), gradient.reshape(-1, config.width))
        return part.gradients | {EMBEDDING: table}

    return logits, backward


Back = Callable[[Floats], Floats]


class _Part:
    """The parts of a block. Going back fills ``gradients``, since no parameter is read twice."""

    def __init__(self, parameters: Parameters, epsilon: float) -> None:
        self.parameters = parameters
        self.epsilon = epsilon
        self.gradients: Parameters = {}

    def linear(self, x: Floats, name: str) -> tuple[Floats, Back]:
        weight = self.parameters[name]

        def back(gradient: Floats) -> Floats:
            self.gradients[name] = gradient.reshape(-1, weight.shape[0]).T @ x.reshape(-1, weight.shape[1])
            return gradient @ weight

        return x @ weight.T, back

    def norm(self, x: Floats, name: str) -> tuple[Floats, Back]:
        weight = self.parameters[name]
        inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        unit = x * inverse

        def back(gradient: Floats) -> Floats:
            self.gradients[name] = (gradient * unit).sum(axis=(0, 1))
            scaled = gradient * weight
            result: Floats = inverse * (scaled - unit * np.mean(scaled * unit, axis=-1, keepdims=True))
            return result

        return unit * weight, back

    def attention(self, x: Floats, block: str, angles: tuple[Floats, Floats]) -> tuple[Floats, Back]:
        cos, sin = angles
        normed, norm_back = self.norm(x, block + "input_layernorm.weight")
        (q, q_back), (k, k_back), (v, v_back) = (
            self.linear(normed, f"{block}self_attn.{name}_proj.weight") for name in "qkv"
        )
        heads = x.shape[-1] // (2 * cos.shape[-1])
        q, k, v = (_split(part, heads) for part in (q, k, v))
        mixed, mix_back = _mix(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        y, out_back = self.linear(_join(mixed), block + "self_attn.o_proj.weight")

        def back(gradient: Floats) -> Floats:
            dq, dk, dv = mix_back(_split(out_back(gradient), heads))
            # A rotation's transpose turns the other way.
            inputs = q_back(_join(_rotate(dq, cos, -sin))) + k_back(_join(_rotate(dk, cos, -sin))) + v_back(_join(dv))
            return gradient + norm_back(inputs)

        return x + y, back

    def feed_forward(self, x: Floats, block: str) -> tuple[Floats, Back]:
        normed, norm_back = self.norm(x, block + "post_attention_layernorm.weight")
        gate, gate_back = self.linear(normed, block + "mlp.gate_proj.weight")
        up, up_back = self.linear(normed, block + "mlp.up_proj.weight")
        sigmoid = 1 / (1 + np.exp(-gate))
        silu = gate * sigmoid
        y, down_back = self.linear(silu * up, block + "mlp.down_proj.weight")

        def back(gradient: Floats) -> Floats:
            inner = down_back(gradient)
            slope = sigmoid + silu * (1 - sigmoid)
            return gradient + norm_back(gate_back(inner * up * slope) + up_back(inner * silu))

        return x + y, back


def _angles(tokens: int, config: DecoderConfig, dtype: npt.DTypeLike) -> tuple[Floats, Floats]:
    """Cosine and sine, (T, head width / 2) each."""
    half = config.width // config.heads // 2
    angles = np.outer(np.arange(tokens), config.theta ** (-np.arange(half) / half))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Turn each pair (x[i], x[i + half]) by the angle of its position, x (B, heads, T, head width)."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _mix(q: Floats, k: Floats, v: Floats) -> tuple[Floats, Callable[[Floats], tuple[Floats, Floats, Floats]]]:
    """Average values over the positions up to each one, weighted by how its query meets their keys."""
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    scores = scale * (q @ k.swapaxes(2, 3))
    scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
    weights = _softmax(scores)

    def back(gradient: Floats) -> tuple[Floats, Floats, Floats]:
        inner = gradient @ v.swapaxes(2, 3)
        inner -= (inner * weights).sum(axis=-1, keepdims=True)
        inner *= scale * weights
        return inner @ k, inner.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ gradient

    return weights @ v, back


def _softmax(x: Floats) -> Floats:
    exponential = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Floats = exponential / exponential.sum(axis=-1, keepdims=True)
    return result


def _split(x: Floats, heads: int) -> Floats:
    """(B, T, width) -> (B, heads, T, head width)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _join(x: Floats) -> Floats:
    """(B, heads, T, head width) -> (B, T, width)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
