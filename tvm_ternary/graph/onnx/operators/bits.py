"""Operators on the bits of integers."""

from __future__ import annotations

import numpy as np
import onnx
from tvm import relax, te, tirx
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.values import Value


def bit_shift(emitter: Emitter, node: Node) -> relax.Expr:
    """``BitShift``; a shift by a negative number or by the width and more leaves what no bit of the number decides."""
    x, by = (emitter.tensor(node.value(i), node) for i in (0, 1))
    dtype = emitter.dtype(node.value(0))
    width = np.dtype(dtype).itemsize * 8
    valid = emitter.emit(R.less(by, relax.const(width, dtype)))
    if not dtype.startswith("u"):
        positive = emitter.emit(R.greater_equal(by, relax.const(0, dtype)))
        valid = emitter.emit(R.logical_and(valid, positive))
    by = emitter.emit(R.where(valid, by, relax.const(width - 1, dtype)))
    right = node.required("direction") == "RIGHT"
    shifted = emitter.emit((R.right_shift if right else R.left_shift)(x, by))
    if right and not dtype.startswith("u"):  # the sign is what fills a number, at width - 1 the whole of it
        return shifted
    return R.where(valid, shifted, relax.const(0, dtype))


def bit_cast(emitter: Emitter, node: Node) -> Value:
    """``BitCast``: the same bits read as another type of the same width."""
    value = node.value(0)
    source, target = emitter.dtype(value), str(onnx.helper.tensor_dtype_to_np_dtype(node.required("to")))
    if source == target:
        return value
    if np.dtype(source).itemsize != np.dtype(target).itemsize:
        node.refuse(f"{source} as {target}, which has another width")
    if "bool" in (source, target):  # a byte of 0 or 1
        return R.astype(emitter.tensor(value, node), target)

    def compute(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: tirx.reinterpret(target, x(*i)), name="bit_cast")

    return emitter.builder.emit_te(compute, emitter.tensor(value, node), primfunc_name_hint="bit_cast")
