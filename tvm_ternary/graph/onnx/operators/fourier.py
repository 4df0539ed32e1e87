"""``DFT`` and ``STFT`` of a known length, as products with a table."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.values import Dim, as_expr, describe

_LARGEST = 1 << 24
"""Elements of the largest table."""


def dft(emitter: Emitter, node: Node) -> relax.Expr:
    """``DFT``; the last axis holds the real part, or that and the imaginary one."""
    dims = emitter.known_shape(node.value(0), node)
    old = node.opset < 20
    axis = int(node.attributes.get("axis", 1)) if old else _integer(emitter, node, 2, -2)
    axis = axis_of(axis, len(dims), node)
    inverse, onesided = (bool(node.attributes.get(name, 0)) for name in ("inverse", "onesided"))
    size = dims[axis]
    if not isinstance(size, int):
        node.refuse(f"the length of its signal, {describe(size)}, is symbolic")
    length = _integer(emitter, node, 1, 2 * (size - 1) if inverse and onesided else size)
    order = [*(i for i in range(len(dims)) if i != axis), axis]
    order[-2:] = order[:-3:-1]
    data = emitter.emit(R.permute_dims(emitter.tensor(node.value(0), node), order))
    result = _transformed(emitter, node, data, length, inverse, onesided)
    return R.permute_dims(result, [int(place) for place in np.argsort(order)])


def stft(emitter: Emitter, node: Node) -> relax.Expr:
    """``STFT``: the ``DFT`` of overlapping frames, weighted by a window."""
    _, size, _ = emitter.known_shape(node.value(0), node)
    step = _integer(emitter, node, 1, 0)
    window = emitter.tensor(node.value(2), node) if node.has(2) else None
    given = emitter.known_shape(window, node)[0] if window is not None else 0
    length = _integer(emitter, node, 3, given if isinstance(given, int) else 0)
    if step < 1 or length < 1:
        node.refuse(f"frames of {length} every {step}")
    count = emitter.algebra.simplify(emitter.algebra.divide(size - length, step) + 1)

    def compute(signal: te.Tensor, count: Any) -> te.Tensor:
        shape = [signal.shape[0], count, as_expr(length), signal.shape[2]]
        return te.compute(shape, lambda b, f, i, p: signal(b, f * step + i, p), name="frames")

    frames = emitter.builder.emit_te(
        compute, emitter.tensor(node.value(0), node), as_expr(count), primfunc_name_hint="frames"
    )
    if window is not None:
        frames = emitter.emit(R.multiply(frames, emitter.emit(R.expand_dims(window, 1))))
    return _transformed(emitter, node, frames, length, False, bool(node.attributes.get("onesided", 1)))


def _integer(emitter: Emitter, node: Node, index: int, default: int) -> int:
    """A scalar input that has to be known."""
    if not node.has(index):
        return default
    (value,) = emitter.dims(node.value(index), node)
    if not isinstance(value, int):
        node.refuse(f"input {index}, {describe(value)}, is symbolic")
    return value


def _transformed(
    emitter: Emitter, node: Node, data: relax.Expr, length: int, inverse: bool, onesided: bool
) -> relax.Expr:
    """Transform signals (..., size, parts) to (..., frequencies, parts)."""
    *outer, size, parts = emitter.known_shape(data, node)
    if size * parts * length * 2 > _LARGEST:
        node.refuse(f"a transform of {size} elements to {length}: its table would have more than {_LARGEST} elements")
    table = _table(size, parts, length, inverse, onesided)
    rows = _reshaped(emitter, data, [*outer, size * parts])
    flat = table.reshape(size * parts, -1).astype(emitter.dtype(data))
    product = emitter.emit(R.matmul(rows, relax.const(flat, str(flat.dtype))))
    return _reshaped(emitter, product, [*outer, *table.shape[1:]])


def _table(size: int, parts: int, length: int, inverse: bool, onesided: bool) -> np.ndarray:
    """What becomes of every part of every element alone, (size * parts, frequencies, parts): a transform is linear."""
    units = np.kron(np.eye(size), np.array([[1], [1j]][:parts]))
    if inverse and onesided:
        return np.fft.irfft(units, length)[..., None]
    spectrum = np.fft.ifft(units, length) if inverse else np.fft.fft(units, length)
    if onesided:
        spectrum = spectrum[:, : length // 2 + 1]
    return np.stack([spectrum.real, spectrum.imag], -1)


def _reshaped(emitter: Emitter, x: relax.Expr, dims: list[Dim]) -> relax.Expr:
    return emitter.emit(R.reshape(x, relax.ShapeExpr([as_expr(dim) for dim in dims])))
