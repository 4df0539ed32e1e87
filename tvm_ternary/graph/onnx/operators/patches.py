"""Images from patches: ``ConvTranspose`` to a given size and ``Col2Im``."""

from __future__ import annotations

from math import prod
from typing import Any

import onnx
from tvm import relax, te, tirx

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.values import Value, as_expr, describe


def conv_transpose(emitter: Emitter, node: Node) -> Value | list[Value]:
    """``ConvTranspose``; the size of the result, where it is given, says how much is cut off each side."""
    wanted = node.attributes.get("output_shape")
    if wanted is None:
        return convert_with_tvm(emitter, node)
    sides = emitter.known_shape(node.value(0), node)[2:]
    taps = emitter.known_shape(node.value(1), node)[2:]
    if not all(isinstance(side, int) for side in (*sides, *taps)):
        node.refuse(f"an output shape for the symbolic sides {describe(sides)}")
    ones, zeros = [1] * len(sides), [0] * len(sides)
    strides, dilations, extra = (
        list(node.attributes.get(name, default))
        for name, default in (("strides", ones), ("dilations", ones), ("output_padding", zeros))
    )
    first, last = [], []
    for axis, (side, size) in enumerate(zip(sides, wanted[-len(sides) :], strict=True)):
        total = strides[axis] * (side - 1) + extra[axis] + (taps[axis] - 1) * dilations[axis] + 1 - size
        if total < 0:
            extra[axis] -= total
            total = 0
        small, large = total // 2, total - total // 2
        upper = node.attributes.get("auto_pad", "NOTSET") == "SAME_UPPER"
        first.append(small if upper else large)
        last.append(large if upper else small)
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    replaced = {"pads": first + last, "output_padding": extra}
    kept = [a for a in proto.attribute if a.name not in {*replaced, "output_shape", "auto_pad"}]
    del proto.attribute[:]
    proto.attribute.extend([*kept, *(onnx.helper.make_attribute(name, value) for name, value in replaced.items())])
    return convert_with_tvm(emitter, Node.of(proto, node.opset, node.inputs))


def col2im(emitter: Emitter, node: Node) -> relax.Expr:
    """``Col2Im``: the sum of overlapping blocks (batch, channels * block, places)."""
    image, block = (node.integers(name, slot) for name, slot in (("image_shape", 1), ("block_shape", 2)))
    if image is None or block is None:
        node.refuse("the shape of the image or of its blocks is missing")
    count = len(image)
    steps = list(node.attributes.get("strides", [1] * count))
    dilations = list(node.attributes.get("dilations", [1] * count))
    pads = list(node.attributes.get("pads", [0] * (2 * count)))
    places = [
        (image[i] + pads[i] + pads[i + count] - dilations[i] * (block[i] - 1) - 1) // steps[i] + 1 for i in range(count)
    ]

    def compute(data: te.Tensor) -> te.Tensor:
        over = [te.reduce_axis((0, size), name=f"k{i}") for i, size in enumerate(block)]
        channels = tirx.indexdiv(data.shape[1], prod(block))

        def element(batch: Any, channel: Any, *position: Any) -> Any:
            offsets = [position[i] + pads[i] - over[i] * dilations[i] for i in range(count)]
            inside = [
                tirx.all(offset >= 0, tirx.indexmod(offset, steps[i]) == 0, offset < places[i] * steps[i])
                for i, offset in enumerate(offsets)
            ]
            row = channel * prod(block) + _flat(over, block)
            column = _flat([tirx.indexdiv(offset, steps[i]) for i, offset in enumerate(offsets)], places)
            value = tirx.if_then_else(tirx.all(*inside), data(batch, row, column), tirx.const(0, data.dtype))
            return te.sum(value, axis=over)

        return te.compute([data.shape[0], channels, *map(as_expr, image)], element, name="col2im")

    return emitter.builder.emit_te(compute, emitter.tensor(node.value(0), node), primfunc_name_hint="col2im")


def _flat(indices: list[Any], sizes: list[int]) -> Any:
    """The place in row order."""
    place: Any = 0
    for index, size in zip(indices, sizes, strict=True):
        place = place * size + index
    return place
