"""Models that no exporter writes: small good ones, their bytes or their graph changed at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import onnx
from onnx import helper

from tests.models import gemm, gpt2, llama, mlp

_NUMBERS = (0, 1, -1, 2, 7, 63, 64, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)
_TEXTS = ("", "x", "y", "?", "n+1", "../../etc/passwd", "/dev/zero", "\x00", "\n", "a" * 300, "-1", "0", "é", "(((")
_OPERATORS = (
    *("Relu", "Add", "MatMul", "Gemm", "Conv", "Reshape", "Transpose", "Gather", "Concat", "Slice", "Split", "Softmax"),
    *(
        "Expand",
        "Tile",
        "Range",
        "ConstantOfShape",
        "Shape",
        "Squeeze",
        "Unsqueeze",
        "Pad",
        "Resize",
        "Loop",
        "If",
        "Scan",
    ),
    *("LSTM", "Attention", "ReduceMean", "Where", "Cast", "OneHot", "TopK", "Einsum", "LayerNormalization", "Constant"),
    *(
        "DequantizeLinear",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvTranspose",
        "MaxPool",
        "Identity",
    ),
)


@cache
def _bases() -> tuple[bytes, ...]:
    models = (mlp(), gemm(False, True), gpt2(layers=1), llama(layers=1))
    return tuple(model.SerializeToString(deterministic=True) for model in models)


def mutant(seed: int) -> bytes:
    """The file of a number: one of the models with its bytes changed, or its graph in one to four places."""
    rng = random.Random(seed)
    data = rng.choice(_bases())
    if rng.random() < 0.3:
        return _bytes(rng, bytearray(data))
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.randint(1, 4)):
        rng.choice(_CHANGES)(rng, model)
    return model.SerializeToString()


def _bytes(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.randint(1, 8)):
        at, kind = rng.randrange(len(data)), rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 3:
            data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 64)]
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        if not data:
            break
    return bytes(data)


def _node(rng: random.Random, model: onnx.ModelProto) -> onnx.NodeProto:
    return rng.choice(model.graph.node) if model.graph.node else model.graph.node.add(op_type="Relu")


def _tensor(rng: random.Random, model: onnx.ModelProto) -> onnx.TensorProto:
    return rng.choice(model.graph.initializer) if model.graph.initializer else model.graph.initializer.add(name="w")


def _name(rng: random.Random, model: onnx.ModelProto) -> str:
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    return rng.choice([*names, *(tensor.name for tensor in model.graph.initializer), *_TEXTS])


def _operator(rng: random.Random, model: onnx.ModelProto) -> None:
    _node(rng, model).op_type = rng.choice((*_OPERATORS, rng.choice(_TEXTS)))


def _wire(rng: random.Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    ends = node.output if node.output and rng.random() < 0.2 else node.input
    kind = rng.randrange(3)
    if kind == 0 or not ends:
        ends.append(_name(rng, model))
    elif kind == 1:
        ends[rng.randrange(len(ends))] = _name(rng, model)
    else:
        del ends[rng.randrange(len(ends))]


def _attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    names = ("axis", "axes", "perm", "to", "value", "transA", "alpha", "epsilon", "mode", "pads", "kernel_shape")
    name = rng.choice([*(one.name for one in node.attribute), *names])
    numbers = [rng.choice(_NUMBERS) for _ in range(rng.randint(1, 4))]
    value = rng.choice([numbers, numbers[0], float(numbers[0]), rng.choice(_TEXTS), [float(one) for one in numbers]])
    for index, one in enumerate(node.attribute):
        if one.name == name:
            del node.attribute[index]
            break
    if rng.random() < 0.8:
        node.attribute.append(helper.make_attribute(name, value))


def _weight(rng: random.Random, model: onnx.ModelProto) -> None:
    tensor = _tensor(rng, model)
    kind = rng.randrange(5)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_NUMBERS)
    elif kind == 1:
        tensor.data_type = rng.randrange(30)
    elif kind == 2:
        size = len(tensor.raw_data)
        tensor.raw_data = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, rng.randbytes(8)))
    elif kind == 3:
        tensor.name = _name(rng, model)
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key=rng.choice(("location", "offset", "length")), value=rng.choice(_TEXTS))


def _interface(rng: random.Random, model: onnx.ModelProto) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    kind = rng.randrange(5)
    if kind == 0:
        value.name = _name(rng, model)
    elif kind == 1:
        value.type.tensor_type.elem_type = rng.randrange(30)
    elif kind == 2:
        value.type.tensor_type.ClearField("shape")
    elif kind == 3:
        value.type.tensor_type.shape.dim.add(dim_param=rng.choice(_TEXTS))
    else:
        value.type.tensor_type.shape.dim.add(dim_value=rng.choice(_NUMBERS))


def _arrangement(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    kind = rng.randrange(3)
    if kind == 0:
        rng.shuffle(nodes)
    elif nodes:
        at = rng.randrange(len(nodes))
        nodes = [*nodes[:at], *([nodes[at]] * 2 if kind == 1 else []), *nodes[at + 1 :]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _version(rng: random.Random, model: onnx.ModelProto) -> None:
    kind = rng.randrange(3)
    if kind == 0:
        model.opset_import[0].version = rng.choice((*range(1, 30), *_NUMBERS))
    elif kind == 1:
        _node(rng, model).domain = rng.choice(("com.microsoft", "ai.onnx.ml", *_TEXTS))
    else:
        model.ir_version = rng.choice(_NUMBERS)


_CHANGES: tuple[Callable[[random.Random, onnx.ModelProto], None], ...] = (
    *(_operator, _wire, _wire, _attribute, _attribute, _weight, _weight, _interface, _arrangement, _version),
)
