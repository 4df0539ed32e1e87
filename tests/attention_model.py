"""A small model of attention alone: two layers, causal by its mask, four heads over two of keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax
from tvm.relax import op as R

from tests.graph.passes.small_graphs import make_module, random
from tests.models import mlp
from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.runtime.manifest import TensorSpec

Array = npt.NDArray[Any]
WIDTH, HEADS, KV, SIZE, SCALE = 16, 4, 2, 4, 0.5
RUNNER = SegmentRunner(1)
"""Of the model's segments each is compiled once for all tests."""
WEIGHTS = {
    f"{name}{layer}": random(WIDTH, heads * SIZE, seed=layer) / WIDTH**0.5
    for layer in (0, 1)
    for name, heads in (("q", HEADS), ("k", KV), ("v", KV))
}


def attention_model() -> ImportedModel:
    """Takes x (batch, n, width) and a mask (batch, 1, n, n), gives y (batch, n, width)."""
    shapes = {"x": ("batch", "n", WIDTH), "mask": ("batch", 1, "n", "n")}

    def build(emit, x, mask, **w):  # type: ignore[no-untyped-def]
        return [_layer(emit, _layer(emit, x, mask, w, 0), mask, w, 1)]

    return replace(
        import_onnx(mlp()),
        module=make_module(shapes, WEIGHTS, build),
        params=WEIGHTS,
        inputs=tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items()),
        outputs=(TensorSpec("y", "float32", ("batch", "n", WIDTH)),),
    )


def _layer(
    emit: Callable[[relax.Expr], relax.Var], x: relax.Var, mask: relax.Var, w: dict[str, relax.Var], layer: int
) -> relax.Var:
    batch, length, _ = x.ty.shape.values

    def heads(name: str, count: int) -> relax.Var:
        product = emit(R.matmul(x, w[f"{name}{layer}"]))
        apart = emit(R.permute_dims(emit(R.reshape(product, (batch, length, count, SIZE))), [0, 2, 1, 3]))
        return apart if count == HEADS else emit(R.repeat(apart, HEADS // KV, 1))

    q, k, v = heads("q", HEADS), heads("k", KV), heads("v", KV)
    scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))
    seen = emit(R.add(emit(R.multiply(scores, relax.const(SCALE, "float32"))), mask))
    out = emit(R.permute_dims(emit(R.matmul(emit(R.nn.softmax(seen)), v)), [0, 2, 1, 3]))
    return emit(R.reshape(out, (batch, length, WIDTH)))


def sample(length: int, seed: int = 0) -> dict[str, Array]:
    """Inputs of one sequence."""
    mask = np.triu(np.full((1, 1, length, length), -np.inf, np.float32), 1)
    return {"x": random(1, length, WIDTH, seed=seed), "mask": mask}


def attention_of(number: int, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of one sequence, for `CalledAttention.run`."""
    scores = SCALE * np.einsum("hmd,hsd->hms", q, np.repeat(k, HEADS // KV, 0)) + (0 if mask is None else mask)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray((weights / weights.sum(-1, keepdims=True)) @ np.repeat(v, HEADS // KV, 0))


def heads_of(x: Array, layer: int) -> list[Array]:
    """Queries, keys and values (heads, n, size) of a layer's input (n, width), in float64."""
    products = (x.astype(np.float64) @ WEIGHTS[f"{name}{layer}"] for name in "qkv")
    return [product.reshape(len(x), -1, SIZE).swapaxes(0, 1) for product in products]


def outputs_of(inputs: dict[str, Array]) -> list[Array]:
    """What both layers give (n, width), in float64."""
    found, x = [], inputs["x"][0]
    for layer in (0, 1):
        x = attention_of(layer, *heads_of(x, layer), inputs["mask"][0]).swapaxes(0, 1).reshape(len(x), WIDTH)
        found.append(x)
    return found
