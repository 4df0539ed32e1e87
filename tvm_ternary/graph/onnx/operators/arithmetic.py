"""Element by element: binary operators, the variadic ones, casts and clips."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.operators.shaping import filled
from tvm_ternary.graph.onnx.values import Constant, Value

_Operator = Callable[[relax.Expr, relax.Expr], relax.Expr]


def binary(operator: _Operator, *, commutes: bool = False) -> Callable[[Emitter, Node], relax.Expr]:
    """A converter for an operator with two broadcast operands.

    Of a commuting one the constant comes second, so that passes find a bias in one place.
    """

    def convert(emitter: Emitter, node: Node) -> relax.Expr:
        left, right = node.value(0), node.value(1)
        if commutes and isinstance(left, Constant) and not isinstance(right, Constant):
            left, right = right, left
        return operator(*_operands(emitter, node, [left, right]))

    return convert


def variadic(operator: _Operator, *, mean: bool = False) -> Callable[[Emitter, Node], Value]:
    """A converter for an operator over any number of broadcast operands (``Max``, ``Sum``, ``Mean``...)."""

    def convert(emitter: Emitter, node: Node) -> Value:
        values = sorted((node.value(i) for i in range(len(node.inputs))), key=lambda v: isinstance(v, Constant))
        operands = _operands(emitter, node, values)
        total = functools.reduce(lambda a, b: emitter.emit(operator(a, b)), operands)
        return R.divide(total, relax.const(len(operands), emitter.dtype(values[0]))) if mean else total

    return convert


def _operands(emitter: Emitter, node: Node, values: list[Value]) -> list[relax.Expr]:
    """Operands as tensors; a constant loses leading axes of one that the others have anyway."""
    ranks = [len(shape) if (shape := emitter.shape(value)) is not None else 0 for value in values]
    return [
        emitter.tensor(_without_leading_ones(value, max(ranks[:i] + ranks[i + 1 :], default=0)), node)
        for i, value in enumerate(values)
    ]


def _without_leading_ones(value: Value, other_rank: int) -> Value:
    if not isinstance(value, Constant) or value.array.ndim > other_rank or value.array.shape[:1] != (1,):
        return value
    shape = list(value.array.shape)
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    return Constant(value.array.reshape(shape), value.names)


def equal(emitter: Emitter, node: Node) -> relax.Expr:
    """``Equal``; of booleans it is the negated ``xor``, for TVM compares them as floats and LLVM refuses that."""
    if emitter.dtype(node.value(0)) != "bool":
        return binary(R.equal, commutes=True)(emitter, node)
    return R.logical_not(emitter.emit(binary(R.logical_xor)(emitter, node)))


def modulo(emitter: Emitter, node: Node) -> relax.Expr:
    """``Mod``: the sign follows the divisor, or with ``fmod`` the dividend."""
    if node.attributes.get("fmod", 0):
        return binary(R.mod)(emitter, node)
    dtype = emitter.dtype(node.value(0))
    if not dtype.startswith("float"):
        return binary(R.floor_mod)(emitter, node)
    _, divisor = _operands(emitter, node, [node.value(0), node.value(1)])
    rest, zero = emitter.emit(binary(R.mod)(emitter, node)), relax.const(0, dtype)
    crosses = R.logical_xor(R.less(rest, zero), R.less(divisor, zero))
    return R.where(R.logical_and(R.not_equal(rest, zero), crosses), R.add(rest, divisor), rest)


def power(emitter: Emitter, node: Node) -> relax.Expr:
    """``Pow``; squares and cubes become products, square roots a ``sqrt``; of integers it is taken in float64."""
    base = emitter.tensor(node.value(0), node)
    dtype = emitter.dtype(node.value(0))
    exponent = node.constant(1)
    if exponent is not None and exponent.size == 1 and exponent.ndim <= len(emitter.known_shape(node.value(0), node)):
        number = float(exponent.reshape(()))
        if number in (2.0, 3.0):
            square = emitter.emit(R.multiply(base, base))
            return square if number == 2.0 else R.multiply(square, base)
        if number == 0.5 and dtype.startswith("float"):
            return R.sqrt(base)
    raised = emitter.tensor(node.value(1), node)
    wide = dtype if dtype.startswith("float") else "float64"
    if dtype != wide:
        base = emitter.emit(R.astype(base, wide))
    if emitter.dtype(node.value(1)) != wide:
        raised = emitter.emit(R.astype(raised, wide))
    result = R.power(base, raised)
    return result if dtype == wide else R.astype(emitter.emit(result), dtype)


def where(emitter: Emitter, node: Node) -> relax.Expr:
    """``Where`` with broadcasting."""
    return R.where(*_operands(emitter, node, [node.value(i) for i in range(3)]))


def cast(emitter: Emitter, node: Node) -> Value:
    """``Cast``; one that changes nothing vanishes."""
    target = str(onnx.helper.tensor_dtype_to_np_dtype(node.required("to")))
    return node.value(0) if emitter.dtype(node.value(0)) == target else convert_with_tvm(emitter, node)


def cast_like(emitter: Emitter, node: Node) -> Value:
    """``CastLike``; a constant is cast now, for its type may be one that exists as weights only."""
    value, target = node.value(0), emitter.dtype(node.value(1))
    if emitter.dtype(value) == target:
        return value
    if isinstance(value, Constant):
        return Constant(value.array.astype(target), value.names)
    return convert_with_tvm(emitter, node)


def clip(emitter: Emitter, node: Node) -> Value:
    """``Clip`` with limits from attributes (before opset 11) or scalar inputs; a NaN limit is no limit."""
    result: Any = emitter.tensor(node.value(0), node)
    dtype = emitter.dtype(node.value(0))
    for index, name, operator in ((1, "min", R.maximum), (2, "max", R.minimum)):
        if name in node.attributes:
            result = emitter.emit(operator(result, relax.const(node.attributes[name], dtype)))
        elif node.has(index):
            limit = node.constant(index)
            if limit is None or not np.any(np.isnan(limit)):
                result = emitter.emit(operator(result, emitter.tensor(node.value(index), node)))
    return result


def is_inf(emitter: Emitter, node: Node) -> relax.Expr:
    """``IsInf`` of both signs, or of one."""
    x, dtype = emitter.tensor(node.value(0), node), emitter.dtype(node.value(0))
    signs = [sign for name, sign in (("positive", 1), ("negative", -1)) if node.attributes.get(f"detect_{name}", 1)]
    found = [emitter.emit(R.equal(x, relax.const(sign * np.inf, dtype))) for sign in signs]
    if not found:
        return filled(emitter.known_shape(node.value(0), node), np.zeros((), np.bool_))
    return functools.reduce(R.logical_or, found)


def identity(emitter: Emitter, node: Node) -> Value:
    """``Identity``."""
    return node.value(0)


def dropout(emitter: Emitter, node: Node) -> list[Value | None]:
    """``Dropout`` does nothing at inference, nor with a ratio of zero; its mask keeps everything."""
    ratio, training = node.constant(1), node.constant(2)
    drops = not node.has(1) or ratio is None or bool(ratio)
    if node.has(2) and (training is None or bool(training)) and drops:
        node.refuse("training mode", "export the model for inference")
    if len(node.outputs) < 2 or not node.outputs[1]:
        return [node.value(0)]
    shape = emitter.known_shape(node.value(0), node)
    return [node.value(0), filled(shape, np.ones((), np.bool_))]
