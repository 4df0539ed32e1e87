"""``Conv``: padding that keeps the size becomes padding of the convolution, never a padded copy of the image."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.values import Constant, Value

_BY_RANK = {3: R.nn.conv1d, 4: R.nn.conv2d}


def conv(emitter: Emitter, node: Node) -> Value | list[Value]:
    """``Conv`` over one or two dimensions with any padding; TVM converts the others."""
    x, weight = node.value(0), node.value(1)
    rank = emitter.rank(x)
    if rank not in _BY_RANK or not isinstance(weight, Constant):
        return convert_with_tvm(emitter, node)
    window = list(weight.array.shape[2:])
    strides = node.attributes.get("strides") or [1] * len(window)
    dilation = node.attributes.get("dilations") or [1] * len(window)
    padding = _padding(emitter, node, x, window, strides, dilation)
    result = _BY_RANK[rank](
        emitter.tensor(x, node),
        emitter.tensor(weight, node),
        strides,
        padding,
        dilation,
        int(node.attributes.get("group", 1)),
    )
    bias = node.optional(2)
    if bias is None:
        return result
    if isinstance(bias, Constant):
        wide = relax.const(bias.array.reshape(-1, *[1] * len(window)), str(bias.array.dtype))
    else:
        wide = emitter.emit(R.reshape(emitter.tensor(bias, node), [-1, *[1] * len(window)]))
    return R.add(emitter.emit(result), wide)


def _padding(
    emitter: Emitter, node: Node, x: Value, window: list[int], strides: list[int], dilation: list[int]
) -> list[int]:
    """Zeros before each dimension, then behind each."""
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * (2 * len(window))
    if mode == "NOTSET":
        return list(node.attributes.get("pads") or [0] * (2 * len(window)))
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        node.refuse(f"auto_pad is {mode!r}; expected NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    before, behind = [], []
    for size, taps, stride, step in zip(emitter.known_shape(x, node)[2:], window, strides, dilation, strict=True):
        reach = (taps - 1) * step + 1
        if stride == 1:
            total = reach - 1
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        else:
            node.refuse(f"auto_pad is {mode} with strides {strides} over a symbolic size")
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        behind.append(large if mode == "SAME_UPPER" else small)
    return before + behind
