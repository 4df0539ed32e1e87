"""``FusedConv``: a convolution with a residual and an activation function behind it."""

from __future__ import annotations

import onnx
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.contrib.activation import activated
from tvm_ternary.graph.onnx.operators.convolution import conv

_LAST_STANDARD_OPSET = 11
"""Of ``Conv`` as ``FusedConv`` has it."""


def fused_conv(emitter: Emitter, node: Node) -> relax.Expr:
    """``FusedConv``: activation(Conv(x, w, b) + z)."""
    own = {"activation", "activation_params"}
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.op_type, proto.domain = "Conv", ""
    del proto.attribute[:], proto.input[3:]
    proto.attribute.extend(attribute for attribute in node.proto.attribute if attribute.name not in own)
    attributes = {name: value for name, value in node.attributes.items() if name not in own}
    result = emitter.emit(conv(emitter, Node(proto, _LAST_STANDARD_OPSET, node.inputs[:3], attributes)))
    if node.has(3):
        result = emitter.emit(R.add(result, emitter.tensor(node.value(3), node)))
    return activated(emitter, node, result, [float(value) for value in node.attributes.get("activation_params", ())])
