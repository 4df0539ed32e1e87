"""``Conv``: padding that keeps the size becomes padding of the convolution, never a padded copy of the image.

A convolution whose weight is chosen to be a matrix, as ternary ones are, becomes a product like any other: a row holds
what lies under the taps for one pixel, channels last, and is multiplied by a (K, N) weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.fallback import convert_with_tvm
from tvm_ternary.graph.onnx.operators.matrix import linear
from tvm_ternary.graph.onnx.operators.window import zeros_around
from tvm_ternary.graph.onnx.values import Constant, Value

_BY_RANK = {3: R.nn.conv1d, 4: R.nn.conv2d}


@dataclass(frozen=True)
class Taps:
    """How the taps of a convolution lie over an image; one number for each of its dimensions.

    Parameters
    ----------
    sizes, strides, dilation : sequence of int
    padding : sequence of int
        Zeros before each dimension, then behind each.
    """

    sizes: Sequence[int]
    strides: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]

    @property
    def is_pixel(self) -> bool:
        """Whether each pixel is multiplied where it is."""
        return {*self.sizes, *self.strides} == {1} and not any(self.padding)

    def result(self, image: Sequence[Any]) -> list[Any]:
        """The dimensions of the result."""
        count = len(self.sizes)
        reach = [(size - 1) * step + 1 for size, step in zip(self.sizes, self.dilation, strict=True)]
        zeros = [before + behind for before, behind in zip(self.padding[:count], self.padding[count:], strict=True)]
        pairs = zip(image, zeros, reach, self.strides, strict=True)
        return [(size + more - taps) // stride + 1 for size, more, taps, stride in pairs]


def conv(emitter: Emitter, node: Node) -> Value | list[Value]:
    """``Conv`` over one or two dimensions with any padding; TVM converts the others."""
    x, weight = node.value(0), node.value(1)
    rank = emitter.rank(x)
    if rank not in _BY_RANK or not isinstance(weight, Constant):
        return convert_with_tvm(emitter, node)
    sizes = list(weight.array.shape[2:])
    strides = node.attributes.get("strides") or [1] * len(sizes)
    dilation = node.attributes.get("dilations") or [1] * len(sizes)
    taps = Taps(sizes, strides, dilation, zeros_around(emitter, node, sizes))
    groups = int(node.attributes.get("group", 1))
    bias = node.optional(2)
    if groups == 1 and str(weight.array.dtype) == "float32" and emitter.is_chosen(weight.names, node.proto):
        return _product(emitter, node, x, weight, bias, taps)
    reason = "a convolution, ternary only if layers names it" if groups == 1 else f"a convolution of {groups} groups"
    result = _BY_RANK[rank](
        emitter.tensor(x, node),
        emitter.tensor(weight, node, reason),
        taps.strides,
        taps.padding,
        taps.dilation,
        groups,
    )
    if bias is None:
        return result
    return R.add(emitter.emit(result), _bias(emitter, node, bias, [-1, *[1] * len(sizes)]))


def _bias(emitter: Emitter, node: Node, bias: Value, shape: list[int]) -> relax.Expr:
    if isinstance(bias, Constant):
        return relax.const(bias.array.reshape(shape), str(bias.array.dtype))
    return emitter.emit(R.reshape(emitter.tensor(bias, node), shape))


def _product(emitter: Emitter, node: Node, x: Value, weight: Constant, bias: Value | None, taps: Taps) -> relax.Expr:
    """The pixels under the taps times a (K, N) matrix, K in the order of taps and then channels."""
    rank = emitter.rank(x)
    rows = emitter.emit(R.permute_dims(emitter.tensor(x, node), [0, *range(2, rank), 1]))
    if not taps.is_pixel:
        spread = emitter.builder.emit_te(partial(pixels_under_taps, taps=taps), rows, primfunc_name_hint="taps")
        rows = emitter.emit(R.reshape(spread, [*spread.ty.shape.values[: rank - 1], -1]))
    matrix = np.moveaxis(weight.array, [0, 1], [-1, -2]).reshape(-1, weight.array.shape[0])
    result = emitter.emit(linear(emitter, node, rows, np.ascontiguousarray(matrix), weight.names))
    if bias is not None:
        result = emitter.emit(R.add(result, _bias(emitter, node, bias, [-1])))
    return R.permute_dims(result, [0, rank - 1, *range(1, rank - 1)])


def pixels_under_taps(image: te.Tensor, taps: Taps) -> te.Tensor:
    """Lay out what each pixel of a convolution's result is made of.

    Parameters
    ----------
    image : (N, H, W, C) or (N, L, C)
    taps : Taps

    Returns
    -------
    (N, OH, OW, KH, KW, C) or (N, OL, K, C)
        Zeros where a tap lies in the padding.
    """
    batch, *image_sizes, channels = image.shape
    count = len(taps.sizes)

    def element(n: tirx.Var, *indices: tirx.Var) -> tirx.Expr:
        where, tap, channel = indices[:count], indices[count:-1], indices[-1]
        places, inside = [], []
        for d, size in enumerate(image_sizes):
            before, behind = taps.padding[d], taps.padding[count + d]
            place = where[d] * taps.strides[d] + tap[d] * taps.dilation[d] - before
            places.append(place)
            inside += ([place >= 0] if before else []) + ([place < size] if behind else [])
        value = image(n, *places, channel)
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, image.dtype)) if inside else value

    return te.compute([batch, *taps.result(image_sizes), *taps.sizes, channels], element, name="taps")
