"""``MaxPool`` and ``AveragePool``: padding that keeps the size is told as numbers, which symbolic sizes need."""

from __future__ import annotations

import onnx
from onnx import helper

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.operators.window import zeros_around
from tvm_ternary.graph.onnx.values import Value


def pool(emitter: Emitter, node: Node) -> Value | list[Value]:
    """A pooling whose padding does not depend on the image; TVM does the rest."""
    if node.attributes.get("auto_pad", "NOTSET") not in ("SAME_UPPER", "SAME_LOWER"):
        return convert_with_tvm(emitter, node)
    pads = zeros_around(emitter, node, node.required("kernel_shape"))
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    kept = [attribute for attribute in node.proto.attribute if attribute.name not in ("auto_pad", "pads")]
    del proto.attribute[:]
    proto.attribute.extend([*kept, helper.make_attribute("pads", pads)])
    return convert_with_tvm(emitter, Node.of(proto, node.opset, node.inputs))
