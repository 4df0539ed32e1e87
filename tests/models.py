"""Small ONNX models with random weights, spelled as exporters spell them, for every test that needs a model.

All are opset 17 unless asked otherwise, keep batch and length dynamic, and are the same bytes on every call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class GraphBuilder:
    """Adds nodes one by one; every method gives the name of a value.

    Parameters
    ----------
    name : str
        The graph's name.
    opset : int
        Version of the standard operator set.
    seed : int
        Of the random weights.
    """

    def __init__(self, name: str = "model", opset: int = 17, seed: int = 0) -> None:
        self.name = name
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.path = ""

    def input(self, name: str, dtype: int, shape: Sequence[int | str | None]) -> str:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str | None] | None = None) -> str:
        """Declare an output."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, *shape: int, scale: float = 0.2) -> str:
        """A random float initializer."""
        return self.constant(self.random.standard_normal(shape).astype(np.float32) * np.float32(scale), name)

    def constant(self, value: Any, name: str | None = None) -> str:
        """An initializer with given values; Python numbers become int64 or float32, arrays keep their dtype."""
        array = np.asarray(value)
        if array.dtype == np.float64 and not isinstance(value, np.ndarray):
            array = array.astype(np.float32)
        name = name or f"const_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.nodes_of(op, *inputs, outputs=[output], domain=domain, **attributes)[0]

    def nodes_of(
        self, op: str, *inputs: str, outputs: Sequence[str | None], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; None makes a name, "" leaves one out."""
        name = f"{self.path}/{op}_{len(self.nodes)}"
        names = [f"{name}_output_{i}" if output is None else output for i, output in enumerate(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=name, domain=domain, **attributes))
        return names

    def dim(self, value: str, axis: int) -> str:
        """One dimension of a value as torch exports it: Shape, Gather, then a vector of one element."""
        size = self.node("Gather", self.node("Shape", value), self.constant(axis), axis=0)
        return self.node("Unsqueeze", size, self.constant([0]))

    def reshape(self, value: str, *dims: int | str) -> str:
        """Reshape to numbers and computed vectors of one element."""
        parts = [self.constant([dim]) if isinstance(dim, int) else dim for dim in dims]
        return self.node("Reshape", value, self.node("Concat", *parts, axis=0))

    def linear(self, value: str, name: str, inner: int, outer: int, *, bias: bool = True) -> str:
        """A product with a weight whose name the exporter lost, and a bias that kept its own."""
        self.path = "/" + name.replace(".", "/")
        weight = self.weight(f"onnx::MatMul_{len(self.initializers)}", inner, outer)
        product = self.node("MatMul", value, weight)
        result = self.node("Add", self.weight(f"{name}.bias", outer), product) if bias else product
        self.path = ""
        return result

    def model(self, **keywords: Any) -> onnx.ModelProto:
        """The finished model; checked, unless it leaves the shape of an output open or leaves the standard."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        domains = {node.domain for node in self.nodes} - {""}
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8, **keywords)
        if not domains and all(value.type.tensor_type.HasField("shape") for value in self.outputs):
            onnx.checker.check_model(model)
        return model


def mlp(features: Sequence[int] = (10, 24, 7)) -> onnx.ModelProto:
    """Gemm and Relu in turn, the weights stored (out, in) as torch stores them."""
    g = GraphBuilder("mlp")
    x = g.input("x", FLOAT, ["batch", features[0]])
    for i, (inner, outer) in enumerate(itertools.pairwise(features)):
        last = i == len(features) - 2
        weight, bias = g.weight(f"layers.{i}.weight", outer, inner), g.weight(f"layers.{i}.bias", outer)
        x = g.node("Gemm", x, weight, bias, transB=1, output="y" if last else None)
        x = x if last else g.node("Relu", x)
    g.output("y", FLOAT, ["batch", features[-1]])
    return g.model()


def gemm(trans_a: bool, trans_b: bool, alpha: float = 1.0, beta: float = 1.0, bias: str = "row") -> onnx.ModelProto:
    """One Gemm of x (5, 6) or its transpose with a weight (6, 4) or its transpose.

    ``bias`` is ``row`` (4,), ``matrix`` (5, 4), ``scalar`` () or ``none``.
    """
    g = GraphBuilder("gemm")
    x = g.input("x", FLOAT, [6, 5] if trans_a else ["rows", 6])
    shapes = {"row": (4,), "matrix": (5 if trans_a else 1, 4), "scalar": ()}
    inputs = [x, g.weight("fc.weight", *((4, 6) if trans_b else (6, 4)))]
    inputs += [] if bias == "none" else [g.weight("fc.bias", *shapes[bias])]
    g.node("Gemm", *inputs, transA=int(trans_a), transB=int(trans_b), alpha=alpha, beta=beta, output="y")
    g.output("y", FLOAT, [None, 4])
    return g.model()


def _attention(g: GraphBuilder, q: str, k: str, v: str, mask: str, head: int) -> str:
    """softmax(q k^T / sqrt(head) + mask) v over (batch, heads, length, head) tensors."""
    scores = g.node("MatMul", q, g.node("Transpose", k, perm=[0, 1, 3, 2]))
    scaled = g.node("Div", scores, g.node("Sqrt", g.constant(float(head))))
    return g.node("MatMul", g.node("Softmax", g.node("Add", scaled, mask), axis=-1), v)


def _heads(g: GraphBuilder, value: str, batch: str, length: str, heads: int, head: int) -> str:
    return g.node("Transpose", g.reshape(value, batch, length, heads, head), perm=[0, 2, 1, 3])


def _joined(g: GraphBuilder, value: str, batch: str, length: str, width: int) -> str:
    return g.reshape(g.node("Transpose", value, perm=[0, 2, 1, 3]), batch, length, width)


class Cache:
    """Keys and values of the tokens before, and of all: nothing, outputs, or inputs and outputs.

    Parameters
    ----------
    g : GraphBuilder
    kind : str
        ``none``, ``out`` (a prompt) or ``both`` (the steps behind it).
    layers, heads, head : int
    """

    def __init__(self, g: GraphBuilder, kind: str, layers: int, heads: int, head: int) -> None:
        self.g, self.kind = g, kind
        self.past = kind == "both"
        self.keys = "past + length" if self.past else "length"
        self.shape = ["batch", heads, self.keys, head]
        for name in self._names("past", layers) if self.past else ():
            g.input(name, FLOAT, ["batch", heads, "past", head])

    @staticmethod
    def _names(which: str, layers: int) -> list[str]:
        return [f"{which}.{i}.{part}" for i in range(layers) for part in ("key", "value")]

    def count(self) -> str:
        """How many tokens come before, a scalar."""
        if not self.past:
            return self.g.constant(0)
        return self.g.node("Gather", self.g.node("Shape", "past.0.key"), self.g.constant(2), axis=0)

    def joined(self, layer: int, key: str, value: str) -> list[str]:
        """All keys and values of a layer, given the new ones."""
        if self.kind == "none":
            return [key, value]
        parts = []
        for name, new in (("key", key), ("value", value)):
            olds = [f"past.{layer}.{name}"] if self.past else []
            parts.append(self.g.node("Concat", *olds, new, axis=2, output=f"present.{layer}.{name}"))
            self.g.output(parts[-1], FLOAT, self.shape)
        return parts


def gpt2(
    layers: int = 2, width: int = 32, heads: int = 4, vocabulary: int = 50, longest: int = 24, *, cache: str = "none"
) -> onnx.ModelProto:
    """A GPT-2-shaped decoder: learned positions, a causal mask from a table, fused q/k/v, tanh-GELU, tied embedding.

    The projections are Reshape-Gemm-Reshape, as torch exports ``Conv1D``. For ``cache`` see `Cache`.
    """
    g = GraphBuilder("gpt2", seed=1)
    ids = g.input("input_ids", INT64, ["batch", "length"])
    stored = Cache(g, cache, layers, heads, width // heads)
    g.output("logits", FLOAT, ["batch", "length", vocabulary])
    batch, length = g.dim(ids, 0), g.dim(ids, 1)
    table = g.weight("transformer.wte.weight", vocabulary, width)
    count = g.node("Gather", g.node("Shape", ids), g.constant(1), axis=0)
    before = stored.count()
    end = g.node("Add", before, count)
    positions = g.node("Unsqueeze", g.node("Range", before, end, g.constant(1)), g.constant([0]))
    tokens = g.node("Gather", table, ids, axis=0)
    x = g.node("Add", tokens, g.node("Gather", g.weight("transformer.wpe.weight", longest, width), positions, axis=0))
    causal = g.constant(np.tril(np.ones((1, 1, longest, longest), dtype=bool)), "transformer.causal")
    first, last = (g.node("Unsqueeze", bound, g.constant([0])) for bound in (before, end))
    rows = g.node("Slice", causal, first, last, g.constant([2]), g.constant([1]))
    keep = g.node("Slice", rows, g.constant([0]), last, g.constant([3]), g.constant([1]))
    mask = g.node("Where", keep, g.constant(0.0), g.constant(np.finfo(np.float32).min))
    for i in range(layers):
        x = _gpt2_block(g, x, i, stored, batch, length, mask, width, heads)
    x = _layer_norm(g, x, "transformer.ln_f", width)
    g.node("MatMul", x, g.node("Transpose", table, perm=[1, 0]), output="logits")
    return g.model()


def _layer_norm(g: GraphBuilder, x: str, name: str, width: int) -> str:
    scale = g.constant(1 + 0.1 * g.random.standard_normal(width).astype(np.float32), f"{name}.weight")
    return g.node("LayerNormalization", x, scale, g.weight(f"{name}.bias", width), epsilon=1e-5)


def _conv1d(g: GraphBuilder, x: str, name: str, batch: str, length: str, inner: int, outer: int) -> str:
    flat = g.node("Reshape", x, g.constant([-1, inner]))
    product = g.node("Gemm", flat, g.weight(f"{name}.weight", inner, outer), g.weight(f"{name}.bias", outer))
    return g.reshape(product, batch, length, outer)


def _gpt2_block(
    g: GraphBuilder, x: str, index: int, stored: Cache, batch: str, length: str, mask: str, width: int, heads: int
) -> str:
    name = f"transformer.h.{index}"
    fused = _conv1d(g, _layer_norm(g, x, f"{name}.ln_1", width), f"{name}.attn.c_attn", batch, length, width, 3 * width)
    parts = g.nodes_of("Split", fused, g.constant([width] * 3), outputs=[None] * 3, axis=2)
    q, k, v = (_heads(g, part, batch, length, heads, width // heads) for part in parts)
    k, v = stored.joined(index, k, v)
    attended = _joined(g, _attention(g, q, k, v, mask, width // heads), batch, length, width)
    x = g.node("Add", _conv1d(g, attended, f"{name}.attn.c_proj", batch, length, width, width), x)
    inner = _conv1d(g, _layer_norm(g, x, f"{name}.ln_2", width), f"{name}.mlp.c_fc", batch, length, width, 4 * width)
    cubed = g.node("Mul", g.node("Pow", inner, g.constant(3.0)), g.constant(0.044715))
    argument = g.node("Mul", g.node("Add", inner, cubed), g.constant(float(np.sqrt(2 / np.pi))))
    gate = g.node("Add", g.node("Tanh", argument), g.constant(1.0))
    gelu = g.node("Mul", g.node("Mul", inner, g.constant(0.5)), gate)
    return g.node("Add", x, _conv1d(g, gelu, f"{name}.mlp.c_proj", batch, length, 4 * width, width))


def llama(
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocabulary: int = 50,
    inner: int = 48,
    *,
    cache: str = "none",
) -> onnx.ModelProto:
    """A LLaMA-shaped decoder: RoPE, RMSNorm, SwiGLU, grouped key and value heads, a mask from both inputs.

    For ``cache`` see `Cache`.
    """
    g = GraphBuilder("llama", seed=2)
    ids = g.input("input_ids", INT64, ["batch", "length"])
    stored = Cache(g, cache, layers, kv_heads, width // heads)
    g.output("logits", FLOAT, ["batch", "length", vocabulary])
    attention = g.input("attention_mask", INT64, ["batch", stored.keys])
    batch, length = g.dim(ids, 0), g.dim(ids, 1)
    total = g.dim(attention, 1) if stored.past else length
    x = g.node("Gather", g.weight("model.embed_tokens.weight", vocabulary, width), ids, axis=0)
    head = width // heads
    before = stored.count()
    mask = _causal_mask(g, before, attention, batch, length, total)
    cos, sin = _rotary_tables(g, ids, before, batch, head)
    for i in range(layers):
        name = f"model.layers.{i}"
        normed = _rms_norm(g, x, f"{name}.input_layernorm", width)
        q, k, v = (
            _heads(
                g, g.linear(normed, f"{name}.self_attn.{p}_proj", width, n * head, bias=False), batch, length, n, head
            )
            for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = _rotate(g, q, cos, sin, head), _rotate(g, k, cos, sin, head)
        k, v = stored.joined(i, k, v)
        k, v = (_repeat_heads(g, value, batch, total, kv_heads, heads // kv_heads, head) for value in (k, v))
        attended = _joined(g, _attention(g, q, k, v, mask, head), batch, length, width)
        x = g.node("Add", x, g.linear(attended, f"{name}.self_attn.o_proj", width, width, bias=False))
        normed = _rms_norm(g, x, f"{name}.post_attention_layernorm", width)
        gate = g.linear(normed, f"{name}.mlp.gate_proj", width, inner, bias=False)
        up = g.linear(normed, f"{name}.mlp.up_proj", width, inner, bias=False)
        swiglu = g.node("Mul", g.node("Mul", gate, g.node("Sigmoid", gate)), up)
        x = g.node("Add", x, g.linear(swiglu, f"{name}.mlp.down_proj", inner, width, bias=False))
    x = _rms_norm(g, x, "model.norm", width)
    g.nodes[-1].output[0] = "hidden"
    g.node("MatMul", "hidden", g.weight("lm_head.weight", width, vocabulary), output="logits")
    return g.model()


def _rms_norm(g: GraphBuilder, x: str, name: str, width: int) -> str:
    mean = g.node("ReduceMean", g.node("Pow", x, g.constant(2.0)), axes=[-1], keepdims=1)
    deviation = g.node("Sqrt", g.node("Add", mean, g.constant(1e-6)))
    scale = g.constant(1 + 0.1 * g.random.standard_normal(width).astype(np.float32), f"{name}.weight")
    return g.node("Mul", scale, g.node("Mul", x, g.node("Div", g.constant(1.0), deviation)))


def _causal_mask(g: GraphBuilder, before: str, attention: str, batch: str, length: str, total: str) -> str:
    """(batch, 1, length, total): minus infinity, almost, for keys behind a query and where attention is 0."""
    lowest = g.constant(np.finfo(np.float32).min)
    full = g.node("Expand", lowest, g.node("Concat", length, total, axis=0))
    count, keys = (g.node("Squeeze", size, g.constant([0])) for size in (length, total))
    columns = g.node("Range", g.constant(0), keys, g.constant(1))
    rows = g.node("Range", before, g.node("Add", before, count), g.constant(1))
    later = g.node("Greater", columns, g.node("Reshape", rows, g.constant([-1, 1])))
    if total == length:
        full = g.node("Trilu", full, g.constant(1), upper=1)
    above = g.node("Mul", full, g.node("Cast", later, to=FLOAT))
    target = g.node("Concat", batch, g.constant([1, -1, -1]), axis=0)
    ones = g.node("ConstantOfShape", g.node("Shape", target), value=numpy_helper.from_array(np.array([1])))
    unset = g.node("Equal", target, g.node("Mul", ones, g.constant(-1)))
    grid = g.node("Unsqueeze", g.node("Unsqueeze", above, g.constant([0])), g.constant([1]))
    causal = g.node("Expand", grid, g.node("Where", unset, ones, target))
    padding = g.node("Unsqueeze", attention, g.constant([1, 2]))
    absent = g.node("Equal", padding, g.constant(0))
    shown = g.node("Where", absent, lowest, g.constant(0.0))
    return g.node("Max", g.node("Add", causal, shown), lowest)


def _rotary_tables(g: GraphBuilder, ids: str, before: str, batch: str, head: int) -> tuple[str, str]:
    """Cosine and sine (batch, 1, length, head) of positions times frequencies, by a MatMul of inner size 1."""
    frequencies = g.constant(10000.0 ** (-np.arange(0, head, 2, dtype=np.float32) / head).reshape(1, -1, 1), "inv_freq")
    spread = g.node("Expand", frequencies, g.node("Concat", batch, g.constant([1, 1]), axis=0))
    end = g.node("Add", before, g.node("Gather", g.node("Shape", ids), g.constant(1)))
    bounds = [g.node("Cast", bound, to=FLOAT) for bound in (before, end)]
    positions = g.node("Unsqueeze", g.node("Range", *bounds, g.constant(1.0)), g.constant([0, 1]))
    angles = g.node("Transpose", g.node("MatMul", spread, positions), perm=[0, 2, 1])
    both = g.node("Unsqueeze", g.node("Concat", angles, angles, axis=-1), g.constant([1]))
    return g.node("Cos", both), g.node("Sin", both)


def _rotate(g: GraphBuilder, x: str, cos: str, sin: str, head: int) -> str:
    half, end = g.constant([head // 2]), g.constant([np.iinfo(np.int64).max])
    first = g.node("Slice", x, g.constant([0]), half, g.constant([3]), g.constant([1]))
    second = g.node("Slice", x, half, end, g.constant([-1]), g.constant([1]))
    turned = g.node("Concat", g.node("Neg", second), first, axis=-1)
    return g.node("Add", g.node("Mul", x, cos), g.node("Mul", turned, sin))


def _repeat_heads(g: GraphBuilder, x: str, batch: str, length: str, heads: int, times: int, head: int) -> str:
    apart = g.node("Unsqueeze", x, g.constant([2]))
    sizes = [g.constant([heads]), g.constant([times]), length, g.constant([head])]
    spread = g.node("Expand", apart, g.node("Concat", batch, *sizes, axis=0))
    return g.reshape(spread, batch, heads * times, length, head)


def lstm(direction: str = "forward", steps: int | str = 5, layout: int = 0, *, state: bool = True) -> onnx.ModelProto:
    """One LSTM of 6 inputs and 8 units over ``steps`` steps with all three outputs."""
    g = GraphBuilder("lstm", seed=3)
    width, units, ways = 6, 8, 2 if direction == "bidirectional" else 1
    x = g.input("x", FLOAT, ["batch", steps, width] if layout else [steps, "batch", width])
    weights = [
        g.weight("rnn.weight_ih", ways, 4 * units, width),
        g.weight("rnn.weight_hh", ways, 4 * units, units),
        g.weight("rnn.bias", ways, 8 * units),
    ]
    shape: list[int | str | None] = ["batch", ways, units] if layout else [ways, "batch", units]
    states = ["", g.input("h", FLOAT, shape), g.input("c", FLOAT, shape)] if state else []
    outputs = ["y", "y_h", "y_c"]
    g.nodes_of("LSTM", x, *weights, *states, outputs=outputs, hidden_size=units, direction=direction, layout=layout)
    g.output("y", FLOAT, [None] * 4)
    g.output("y_h", FLOAT, [None] * 3)
    g.output("y_c", FLOAT, [None] * 3)
    return g.model()
