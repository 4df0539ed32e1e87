"""nanoguard's network as an ONNX graph, written from ``nanoguard/model.py`` of metatronnanoguard 0.1.0.

A bidirectional transformer whose parts are those of recent decoders: RMSNorm without weights, rotary positions, queries
and keys normalized after they are turned, squared ReLU, and the embeddings mixed into the input of every block. The
mean over a prompt's tokens is classified. Attention is not masked: the model was trained with its padding in sight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
# What torch's rms_norm and LayerNorm add to mean square and variance when they are not told.
RMS_EPSILON = float(np.finfo(np.float32).eps)
LAYER_EPSILON = 1e-5

Arrays = Mapping[str, npt.NDArray[Any]]


def build(weights: Arrays, config: Mapping[str, Any]) -> onnx.ModelProto:
    """Make a graph from ``input_ids`` and ``attention_mask``, int64 (batch, sequence), to ``logits`` (batch, 2).

    Parameters
    ----------
    weights : mapping
        The checkpoint's ``model_state_dict``; matrices are (out_features, in_features).
    config : mapping
        The checkpoint's ``config``.
    """
    graph = _Graph(weights)
    embedded = graph.add("Gather", graph.weight("transformer.wte.weight"), "input_ids")
    first = x = graph.rms_norm(embedded)
    angles = [
        graph.positions(table, name)
        for table, name in zip(rotary_tables(config), ("rotary.cos", "rotary.sin"), strict=True)
    ]
    for i in range(config["n_layer"]):
        kept, mixed = (graph.constant(float(weights[name][i])) for name in ("resid_lambdas", "x0_lambdas"))
        x = graph.add("Add", graph.add("Mul", kept, x), graph.add("Mul", mixed, first))
        block = f"transformer.h.{i}."
        x = graph.add("Add", x, _attention(graph, graph.rms_norm(x), block + "attn.", config["n_head"], angles))
        x = graph.add("Add", x, _feed_forward(graph, graph.rms_norm(x), block + "mlp."))
    _classify(graph, graph.rms_norm(x))
    return graph.model()


def rotary_tables(config: Mapping[str, Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosine and sine, (positions, 1, head width / 2), of the precision that the package keeps them in."""
    width = config["n_embd"] // config["n_head"]
    frequencies = 1.0 / 10000.0 ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.outer(np.arange(config["sequence_len"], dtype=np.float32), frequencies.astype(np.float32))[:, None]
    return to_bfloat16(np.cos(angles)), to_bfloat16(np.sin(angles))


def to_bfloat16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The nearest number that bfloat16 has, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


class _Graph:
    """Nodes and initializers as they are added; a value is known by its name."""

    def __init__(self, weights: Arrays) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value: float | list[int] | npt.NDArray[Any], name: str | None = None) -> str:
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
        name = name or f"constant_{len(self.initializers)}"
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def weight(self, name: str) -> str:
        return self.constant(self.weights[name], name)

    def linear(self, x: str, name: str) -> str:
        return self.add("MatMul", x, self.constant(self.weights[name].T, name))

    def rms_norm(self, x: str) -> str:
        mean = self.add("ReduceMean", self.add("Mul", x, x), self.constant([-1]), keepdims=1)
        return self.add("Div", x, self.add("Sqrt", self.add("Add", mean, self.constant(RMS_EPSILON))))

    def positions(self, table: npt.NDArray[np.float32], name: str) -> str:
        """Rows of a table (positions, 1, n) for the tokens there are."""
        tokens = self.add("Shape", "input_ids", start=1, end=2)
        return self.add("Slice", self.constant(table, name), self.constant([0]), tokens, self.constant([0]))

    def halves(self, x: str) -> tuple[str, str]:
        """The two halves of the last axis."""
        first, second = f"first_{len(self.nodes)}", f"second_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Split", [x], [first, second], axis=-1, num_outputs=2))
        return first, second

    def model(self) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
        graph = helper.make_graph(self.nodes, "nanoguard", inputs, [logits], list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def _attention(graph: _Graph, x: str, block: str, heads: int, angles: list[str]) -> str:
    apart = graph.constant([0, 0, heads, -1])
    q, k, v = (graph.add("Reshape", graph.linear(x, f"{block}c_{name}.weight"), apart) for name in "qkv")
    q, k = (graph.rms_norm(_rotate(graph, part, *angles)) for part in (q, k))
    q, v = (graph.add("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
    k = graph.add("Transpose", k, perm=[0, 2, 3, 1])
    width = graph.weights[block + "c_q.weight"].shape[0] // heads
    scores = graph.add("Mul", graph.add("MatMul", q, k), graph.constant(width**-0.5))
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    joined = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), graph.constant([0, 0, -1]))
    return graph.linear(joined, block + "c_proj.weight")


def _rotate(graph: _Graph, x: str, cos: str, sin: str) -> str:
    """Turn each pair (x[i], x[i + half]) backwards by its position's angle."""
    first, second = graph.halves(x)
    turned = (
        graph.add("Add", graph.add("Mul", first, cos), graph.add("Mul", second, sin)),
        graph.add("Sub", graph.add("Mul", second, cos), graph.add("Mul", first, sin)),
    )
    return graph.add("Concat", *turned, axis=-1)


def _feed_forward(graph: _Graph, x: str, block: str) -> str:
    hidden = graph.add("Relu", graph.linear(x, block + "c_fc.weight"))
    return graph.linear(graph.add("Mul", hidden, hidden), block + "c_proj.weight")


def _classify(graph: _Graph, x: str) -> None:
    mask = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=TensorProto.FLOAT), graph.constant([2]))
    count = graph.add("Max", graph.add("ReduceSum", mask, graph.constant([1]), keepdims=0), graph.constant(1.0))
    total = graph.add("ReduceSum", graph.add("Mul", x, mask), graph.constant([1]), keepdims=0)
    normed = graph.add(
        "LayerNormalization",
        graph.add("Div", total, count),
        graph.weight("cls_norm.weight"),
        graph.weight("cls_norm.bias"),
        epsilon=LAYER_EPSILON,
    )
    graph.add("Add", graph.linear(normed, "cls_head.weight"), graph.weight("cls_head.bias"), output="logits")
