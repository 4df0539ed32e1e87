"""Where the windows of convolutions and poolings lie over an image."""

from __future__ import annotations

from collections.abc import Sequence

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node


def zeros_around(emitter: Emitter, node: Node, sizes: Sequence[int]) -> list[int]:
    """Read ``pads``, or what ``auto_pad`` stands for.

    Parameters
    ----------
    emitter : Emitter
    node : Node
        Its first input is the image, channels first.
    sizes : sequence of int
        The window.

    Returns
    -------
    list of int
        What is added before each dimension, then behind each.

    Raises
    ------
    UnsupportedOperatorError
        If ``auto_pad`` is unknown, or depends on a size that only the model's inputs tell.
    """
    strides = node.attributes.get("strides") or [1] * len(sizes)
    dilation = node.attributes.get("dilations") or [1] * len(sizes)
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * (2 * len(sizes))
    if mode == "NOTSET":
        return list(node.attributes.get("pads") or [0] * (2 * len(sizes)))
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        node.refuse(f"auto_pad is {mode!r}; expected NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    before, behind = [], []
    dims = emitter.known_shape(node.value(0), node)[2:]
    for size, window, stride, step in zip(dims, sizes, strides, dilation, strict=True):
        reach = (window - 1) * step + 1
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
