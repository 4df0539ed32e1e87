"""Products: every multiplication by a weight, however it is spelled, becomes ``matmul(x, W)``, W a (K, N) parameter."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.values import Constant, Value

PROMOTED = frozenset({"float16", "bfloat16"})
"""Element types that products widen to float32."""


def matmul(emitter: Emitter, node: Node) -> relax.Expr:
    """``MatMul``: numpy semantics, either side may be the weight."""
    left, right = node.value(0), node.value(1)
    if isinstance(right, Constant) and (weight := _as_matrix(emitter, right, left, node)) is not None:
        return linear(emitter, node, left, weight, right.names)
    if isinstance(left, Constant) and (weight := _as_matrix(emitter, left, right, node)) is not None:
        return _weight_on_the_left(emitter, node, weight, left.names, right)
    reason = _why_no_matrix(left if isinstance(left, Constant) else right, node)
    factors = emitter.tensor(left, node, reason), emitter.tensor(right, node, reason)
    return R.multiply(*factors) if _is_outer(emitter, left, right) else R.matmul(*factors)


def gemm(emitter: Emitter, node: Node) -> relax.Expr:
    """``Gemm``: alpha * op(A) @ op(B) + beta * C; the factors are folded into the weights."""
    for index in (0, 1):
        if len(emitter.known_shape(node.value(index), node)) != 2:
            node.refuse(f"input {index} is no matrix", "check the file with onnx.checker")
    alpha, beta = (float(node.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    left, right = (
        _transposed(emitter, node.value(index), node) if node.attributes.get(name, 0) else node.value(index)
        for index, name in ((0, "transA"), (1, "transB"))
    )
    if isinstance(right, Constant):
        left, right = left, _scaled(emitter, right, alpha)
    else:
        left = _scaled(emitter, left, alpha)
    product = emitter.emit(matmul(emitter, Node(node.proto, node.opset, (left, right), {})))
    bias = node.optional(2)
    if bias is None or beta == 0.0:
        return product
    bias = _scaled(emitter, bias, beta)
    if isinstance(bias, Constant) and bias.array.ndim == 2 and bias.array.shape[0] == 1:
        bias = Constant(bias.array[0], bias.names)
    return R.add(product, emitter.tensor(bias, node))


def linear(emitter: Emitter, node: Node, x: Value, weight: np.ndarray, names: tuple[str, ...]) -> relax.Expr:
    """Multiply activations (..., K) by a (K, N) weight; the result has the activations' dtype.

    Half-precision activations are widened, for the matrices are float32.
    """
    data = emitter.tensor(x, node)
    dtype = emitter.dtype(x)
    rank = len(emitter.known_shape(x, node))
    if dtype in PROMOTED:
        data = emitter.emit(R.astype(data, "float32"))
    if rank == 1:
        data = emitter.emit(R.expand_dims(data, 0))
    product = R.matmul(data, emitter.matrix(weight, names, node.proto))
    if rank == 1:
        product = R.squeeze(emitter.emit(product), [0])
    return R.astype(emitter.emit(product), dtype) if dtype in PROMOTED else product


def _weight_on_the_left(
    emitter: Emitter, node: Node, weight: np.ndarray, names: tuple[str, ...], x: Value
) -> relax.Expr:
    """W @ x is (x^T @ W^T)^T over the last two axes."""
    rank = len(emitter.known_shape(x, node))
    transposed = np.ascontiguousarray(weight.T)
    if rank == 1:
        return linear(emitter, node, x, transposed, names)
    swap = [*range(rank - 2), rank - 1, rank - 2]
    columns = emitter.emit(R.permute_dims(emitter.tensor(x), swap))
    return R.permute_dims(emitter.emit(linear(emitter, node, columns, transposed, names)), swap)


def _is_outer(emitter: Emitter, left: Value, right: Value) -> bool:
    """Whether the products are sums of a single term, (..., M, 1) times (..., 1, N)."""
    shapes = [emitter.shape(left) or [], emitter.shape(right) or []]
    return min(map(len, shapes)) >= 2 and isinstance(shapes[0][-1], int) and shapes[0][-1] == 1


def _as_matrix(emitter: Emitter, weight: Constant, x: Value, node: Node) -> np.ndarray | None:
    """The weight as (K, N), None where the product is no plain multiplication of rows by a matrix."""
    if _why_no_matrix(weight, node) is not None or isinstance(x, Constant):
        return None
    if weight.array.ndim > len(emitter.known_shape(x, node)) and weight.array.ndim > 2:
        return None
    return weight.array.reshape(weight.array.shape[-2:])


def _why_no_matrix(weight: Value, node: Node) -> str | None:
    if not isinstance(weight, Constant):
        return "both factors are activations"
    shape = weight.array.shape
    if str(weight.array.dtype) not in PROMOTED | {"float32"}:
        return f"its elements are {weight.array.dtype}"
    if len(shape) < 2:
        return "it is a vector"
    if any(size != 1 for size in shape[:-2]):
        return "a different matrix for every batch"
    inner = shape[-1] if node.inputs[0] is weight else shape[-2]
    return "an outer product, as of positions and frequencies" if inner == 1 else None


def _transposed(emitter: Emitter, value: Value, node: Node) -> Value:
    if isinstance(value, Constant):
        return Constant(value.array.T, value.names)
    return emitter.emit(R.permute_dims(emitter.tensor(value, node), [1, 0]))


def _scaled(emitter: Emitter, value: Value, factor: float) -> Value:
    if factor == 1.0:
        return value
    if isinstance(value, Constant):
        return Constant((value.array * np.asarray(factor, value.array.dtype)), value.names)
    tensor = emitter.tensor(value)
    return emitter.emit(R.multiply(tensor, relax.const(factor, emitter.dtype(value))))
