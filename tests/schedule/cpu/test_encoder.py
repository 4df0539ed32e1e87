"""A whole transformer encoder of unknown batch and length: no function lacks a rule, and the numbers are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special
from tvm import relax

from tests.schedule.cpu.graphs import TIERS, Array, Compiled, compile_graph, normal, runs_here, tensor

op = relax.op
WIDTH, HEADS, INNER, WORDS, LONGEST, LAYERS = 48, 4, 96, 101, 64, 2


def weights() -> dict[str, Array]:
    shapes: dict[str, tuple[int, ...]] = {"words": (WORDS, WIDTH), "positions": (LONGEST, WIDTH)}
    for layer in range(LAYERS):
        for name, shape in {
            "q": (WIDTH, WIDTH),
            "k": (WIDTH, WIDTH),
            "v": (WIDTH, WIDTH),
            "o": (WIDTH, WIDTH),
            "up": (WIDTH, INNER),
            "down": (INNER, WIDTH),
        }.items():
            shapes[f"{layer}{name}"] = shape
            shapes[f"{layer}{name}.bias"] = shape[1:]
        for name in ("norm1", "norm2"):
            shapes[f"{layer}{name}"] = shapes[f"{layer}{name}.bias"] = (WIDTH,)
    return {name: normal(seed, *shape) / np.float32(4) for seed, (name, shape) in enumerate(shapes.items())}


class Graph:
    """The encoder in relax operators, as an ONNX file spells it."""

    def __init__(self, emit: Any, values: dict[str, Array]) -> None:
        self.emit = emit
        self.values = {name: relax.const(value) for name, value in values.items()}

    def __getattr__(self, name: str) -> Any:
        operator = getattr(op.nn if hasattr(op.nn, name) else op, name)
        return lambda *arguments: self.emit(operator(*arguments))

    def linear(self, x: Any, name: str) -> Any:
        return self.add(self.matmul(x, self.values[name]), self.values[f"{name}.bias"])

    def norm(self, x: Any, name: str) -> Any:
        return self.layer_norm(x, self.values[name], self.values[f"{name}.bias"], [-1], 1e-5)

    def heads(self, x: Any, name: str, order: tuple[int, ...]) -> Any:
        batch, length, _ = x.ty.shape
        split = self.reshape(self.linear(x, name), (batch, length, HEADS, WIDTH // HEADS))
        return self.permute_dims(split, order)

    def attention_block(self, x: Any, mask: Any, layer: int) -> Any:
        batch, length, _ = x.ty.shape
        q, v = self.heads(x, f"{layer}q", (0, 2, 1, 3)), self.heads(x, f"{layer}v", (0, 2, 1, 3))
        k = self.heads(x, f"{layer}k", (0, 2, 3, 1))
        scores = self.add(self.divide(self.matmul(q, k), scalar((WIDTH // HEADS) ** 0.5)), mask)
        context = self.permute_dims(self.matmul(self.softmax(scores, -1), v), (0, 2, 1, 3))
        return self.linear(self.reshape(context, (batch, length, WIDTH)), f"{layer}o")

    def run(self, ids: Any, mask: Any) -> Any:
        batch, length = ids.ty.shape
        x = self.add(
            self.take(self.values["words"], ids, 0), self.take(self.values["positions"], self.arange(length), 0)
        )
        additive = self.astype(self.expand_dims(mask, (1, 2)), "float32")
        additive = self.multiply(self.subtract(scalar(1), additive), scalar(-1e9))
        for layer in range(LAYERS):
            x = self.norm(self.add(self.attention_block(x, additive, layer), x), f"{layer}norm1")
            h = self.linear(x, f"{layer}up")
            half = self.multiply(h, self.add(self.erf(self.divide(h, scalar(2**0.5))), scalar(1)))
            x = self.norm(self.add(self.linear(self.multiply(half, scalar(0.5)), f"{layer}down"), x), f"{layer}norm2")
        weight = self.astype(self.broadcast_to(self.expand_dims(mask, 2), (batch, length, WIDTH)), "float32")
        total = self.sum(self.multiply(x, weight), [1])
        return self.divide(total, self.maximum(self.sum(weight, [1]), scalar(1e-9)))


def scalar(value: float) -> Any:
    return relax.const(np.float32(value))


def reference(values: dict[str, Array], ids: Array, mask: Array) -> Array:
    """The same in float64."""
    w = {name: value.astype(np.float64) for name, value in values.items()}
    batch, length = ids.shape

    def norm(x: Array, name: str) -> Array:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        result: Array = x * w[name] + w[f"{name}.bias"]
        return result

    def heads(x: Array, name: str) -> Array:
        split = (x @ w[name] + w[f"{name}.bias"]).reshape(batch, length, HEADS, WIDTH // HEADS)
        return split.transpose(0, 2, 1, 3)

    x = w["words"][ids] + w["positions"][:length]
    for layer in range(LAYERS):
        q, k, v = (heads(x, f"{layer}{name}") for name in "qkv")
        scores = q @ k.transpose(0, 1, 3, 2) / (WIDTH // HEADS) ** 0.5 + (1 - mask[:, None, None]) * -1e9
        context = (special.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(batch, length, WIDTH)
        x = norm(context @ w[f"{layer}o"] + w[f"{layer}o.bias"] + x, f"{layer}norm1")
        h = x @ w[f"{layer}up"] + w[f"{layer}up.bias"]
        x = norm((h * special.ndtr(h)) @ w[f"{layer}down"] + w[f"{layer}down.bias"] + x, f"{layer}norm2")
    result: Array = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return result


@pytest.fixture(scope="module", params=sorted({next(filter(runs_here, TIERS)), [*TIERS][-1]}))
def encoder(request: pytest.FixtureRequest) -> Compiled:
    """For the widest vectors of this host, and the narrowest: each rule by itself is tested on all."""

    def build(emit: Any, ids: Any, mask: Any) -> Any:
        return Graph(emit, weights()).run(ids, mask)

    return compile_graph(request.param, build, tensor(("b", "s"), "int64"), tensor(("b", "s"), "int64"))


def test_every_function_has_a_rule(encoder: Compiled) -> None:
    assert encoder.rules == {"rule:matmul", "rule:rows", "rule:columns", "rule:injective"}


def test_layers_are_fused(encoder: Compiled) -> None:
    """Activation and residual are done with the product they follow."""
    products = [name for name, source in encoder.sources.items() if source == "rule:matmul"]
    assert any("erf" in name for name in products)
    assert all("matmul" in name for name in products)
    assert not any("erf" in name for name in encoder.sources if name not in products)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (1, 64), (2, 16), (3, 33)])
def test_numbers(encoder: Compiled, batch: int, length: int) -> None:
    generator = np.random.default_rng(length)
    ids = generator.integers(0, WORDS, (batch, length))
    mask = (np.arange(length) < generator.integers(1, length + 1, (batch, 1))).astype(np.int64)
    exact = reference(weights(), ids, mask)
    error = np.linalg.norm(encoder(ids, mask) - exact) / np.linalg.norm(exact)
    assert error <= 2e-6
