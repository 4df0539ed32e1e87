"""``Resize`` and ``Upsample``.

An image of four dimensions keeps TVM's operator, which the passes behind know, where that follows the standard. All
else is done an axis at a time: a table of weights for every place of the result, and a sum over the neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.values import Dim, as_expr, describe

_MODES = ("nearest", "linear", "cubic")
_PLACES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
_CROP = "tf_crop_and_resize"
_TVM_PLACES = frozenset(_PLACES) - {"half_pixel_symmetric"}
_FINEST = 256
"""The largest denominator of a scale that is taken for a fraction."""


@dataclass(frozen=True)
class _Axis:
    """What becomes of one axis.

    Attributes
    ----------
    size : Dim
        The size of the result.
    scale : float or None
        The factor, where it is known; else the quotient of both sizes.
    start, end : float
        The part of the axis that is cut out, as fractions of its length.
    """

    size: Dim
    scale: float | None
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class _Kernel:
    """How neighbours are weighted, from the node's attributes."""

    mode: str
    places: str
    rounding: str
    cubic: float
    exclude: bool
    antialias: bool
    outside: float

    @classmethod
    def of(cls, node: Node) -> _Kernel:
        """Read the attributes; older operator sets know no others than the first two values here."""
        get = node.attributes.get
        old = node.op == "Upsample" or node.opset < 11
        kernel = cls(
            str(get("mode", "nearest")),
            str(get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")),
            str(get("nearest_mode", "floor" if old else "round_prefer_floor")),
            float(get("cubic_coeff_a", -0.75)),
            bool(get("exclude_outside", 0)),
            bool(get("antialias", 0)),
            float(get("extrapolation_value", 0.0)),
        )
        if kernel.mode not in _MODES or kernel.places not in (*_PLACES, _CROP):
            node.refuse(f"mode {kernel.mode} with {kernel.places} is not known")
        return kernel


def resize(emitter: Emitter, node: Node) -> relax.Expr:
    """``Resize`` or ``Upsample`` by known scales, or to known or symbolic sizes."""
    kernel = _Kernel.of(node)
    dims = emitter.known_shape(node.value(0), node)
    changes = _changes(emitter, node, dims, kernel)
    data, dtype = emitter.tensor(node.value(0), node), emitter.dtype(node.value(0))
    if not changes:
        return data
    if _is_plain(emitter, dims, changes, kernel):
        sizes = [changes[axis].size if axis in changes else dims[axis] for axis in (2, 3)]
        return R.image.resize2d(
            data,
            relax.ShapeExpr([as_expr(size) for size in sizes]),
            [0.0] * 4,
            "NCHW",
            "nearest_neighbor" if kernel.mode == "nearest" else kernel.mode,
            kernel.places,
            kernel.rounding,
            kernel.cubic,
            kernel.exclude,
            kernel.outside,
        )
    whole = dtype.startswith("float") or kernel.mode == "nearest"
    if not whole:
        data = emitter.emit(R.astype(data, "float32"))
    for axis, change in changes.items():
        data = _resized(emitter, node, data, axis, change, kernel)
    return data if whole else R.astype(data, dtype)


def _is_plain(emitter: Emitter, dims: list[Dim], changes: dict[int, _Axis], kernel: _Kernel) -> bool:
    """Whether TVM's operator does it: it takes every scale for the quotient of the sizes, which have to be known."""
    if len(dims) != 4 or not changes.keys() <= {2, 3} or kernel.places not in _TVM_PLACES or kernel.antialias:
        return False
    if kernel.mode != "nearest" and not all(isinstance(change.size, int) for change in changes.values()):
        return False
    for axis, change in changes.items():
        if change.scale is not None:
            exact = _fraction(change.scale)
            if exact is None or not emitter.algebra.equal(
                change.size * exact.denominator, dims[axis] * exact.numerator
            ):
                return False
        if kernel.places == "align_corners" and not emitter.algebra.proves(as_expr(change.size) > 1):
            return False
    return True


def _changes(emitter: Emitter, node: Node, dims: list[Dim], kernel: _Kernel) -> dict[int, _Axis]:
    """The axes that are resized or cropped."""
    axes = [axis_of(axis, len(dims), node) for axis in node.attributes.get("axes", range(len(dims)))]
    slots = (None, 1, None) if node.op == "Upsample" or node.opset < 11 else (1, 2, 3)
    roi, scales = (_numbers(node, slot, name) for slot, name in zip(slots[:2], ("roi", "scales"), strict=True))
    sizes = None
    if slots[2] is not None and node.has(slots[2]):
        sizes = emitter.dims(node.value(slots[2]), node) or None
    if sizes is not None:
        scales = _common_scale(node, [dims[axis] for axis in axes], sizes)
        if scales is not None:
            sizes = [int(scale * dims[axis] + 0.5) for scale, axis in zip(scales, axes, strict=True)]
    elif scales:
        sizes = [_scaled(emitter, node, dims[axis], scale) for axis, scale in zip(axes, scales, strict=True)]
    else:
        node.refuse("neither scales nor sizes are given")
    if len(sizes) != len(axes):
        node.refuse(f"{len(sizes)} sizes for {len(axes)} axes")
    changes = {}
    for place, axis in enumerate(axes):
        change = _Axis(sizes[place], scales[place] if scales else None)
        if kernel.places == _CROP:
            if roi is None or len(roi) != 2 * len(axes):
                node.refuse(f"{_CROP} without a region of two numbers for each axis")
            change = _Axis(change.size, change.scale, roi[place], roi[place + len(axes)])
        same = emitter.algebra.equal(change.size, dims[axis]) and change.scale in (None, 1.0)
        if not same or (change.start, change.end) != (0.0, 1.0):
            changes[axis] = change
    return changes


def _numbers(node: Node, slot: int | None, name: str) -> list[float] | None:
    """Floats of an attribute or a known input, None where there are none."""
    if name in node.attributes:
        return [float(item) for item in node.attributes[name]]
    if slot is None or not node.has(slot):
        return None
    array = node.constant(slot)
    if array is None:
        node.refuse(f"its {name} are computed from the model's data")
    return [float(item) for item in array.reshape(-1)] or None


def _common_scale(node: Node, dims: list[Dim], sizes: list[Dim]) -> list[float] | None:
    """The scale that keeps the ratio of the sides, None where each side is stretched by itself."""
    policy = node.attributes.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return None
    if not all(isinstance(item, int) for item in (*dims, *sizes)):
        node.refuse(f"keep_aspect_ratio_policy {policy} with symbolic sizes {describe(dims)}")
    scales = [size / dim for size, dim in zip(sizes, dims, strict=True)]
    return [min(scales) if policy == "not_larger" else max(scales)] * len(dims)


def _scaled(emitter: Emitter, node: Node, dim: Dim, scale: float) -> Dim:
    """The size times the scale, rounded down."""
    if isinstance(dim, int):
        return math.floor(dim * scale)
    exact = _fraction(scale)
    if exact is None:
        node.refuse(f"scale {scale} of the symbolic size {describe(dim)} is no plain fraction")
    return emitter.algebra.divide(dim * exact.numerator, exact.denominator)


def _fraction(scale: float) -> Fraction | None:
    """The fraction that a float32 stands for, None where it stands for none with a small denominator."""
    exact = Fraction(scale).limit_denominator(_FINEST)
    return exact if np.float32(float(exact)) == np.float32(scale) else None


def _resized(emitter: Emitter, node: Node, data: relax.Expr, axis: int, change: _Axis, kernel: _Kernel) -> relax.Expr:
    """Resize one axis."""
    length = emitter.known_shape(data, node)[axis]
    if change.scale is None and isinstance(change.size, int) and isinstance(length, int):
        change = replace(change, scale=change.size / length)
    count = 1 if kernel.mode == "nearest" else _neighbours(node, change, kernel)

    def tables(length: Any, size: Any) -> list[te.Tensor]:
        return _table(length, size, change, kernel, count)

    table = emitter.builder.emit_te(tables, as_expr(length), as_expr(change.size), primfunc_name_hint="resize_table")
    first, weights, inside = (emitter.emit(relax.TupleGetItem(table, index)) for index in range(3))

    def compute(data: te.Tensor, first: te.Tensor, weights: te.Tensor, inside: te.Tensor) -> te.Tensor:
        shape = [first.shape[0] if i == axis else dim for i, dim in enumerate(data.shape)]

        def element(*indices: Any) -> Any:
            place, last = indices[axis], data.shape[axis] - 1

            def neighbour(index: Any) -> Any:
                return data(*indices[:axis], tirx.max(tirx.min(first(place) + index, last), 0), *indices[axis + 1 :])

            total = neighbour(0)
            if kernel.mode != "nearest":
                terms = (weights(place, i).astype(data.dtype) * neighbour(i) for i in range(count))
                total = sum(terms, tirx.const(0, data.dtype))
            if kernel.places == _CROP:
                total = tirx.if_then_else(inside(place), total, tirx.const(kernel.outside, data.dtype))
            return total

        return te.compute(shape, element, name="resize")

    return emitter.builder.emit_te(compute, data, first, weights, inside, primfunc_name_hint="resize")


def _neighbours(node: Node, change: _Axis, kernel: _Kernel) -> int:
    """How many elements make one of the result: an even number, half of them on each side of it."""
    reach = 1 if kernel.mode == "linear" else 2
    if not kernel.antialias:
        return 2 * reach
    if change.scale is None:
        node.refuse("antialias with a scale that is symbolic")
    return 2 - 2 * (math.floor(-reach / min(change.scale, 1.0)) + 1)


def _table(length: Any, size: Any, change: _Axis, kernel: _Kernel, count: int) -> list[te.Tensor]:
    """For every place of the result: its first neighbour, the weights of all, and whether it lies in the image."""
    center = te.compute((size,), lambda place: _center(place, length, size, change, kernel), name="center")

    def left(place: Any) -> Any:
        return tirx.ceil(center(place)) - 1

    def share(place: Any) -> Any:
        """How far the place is from its left neighbour, above 0 and at most 1."""
        return center(place) - left(place)

    def start(place: Any) -> Any:
        if kernel.mode != "nearest":
            return left(place).astype("int64") - (count // 2 - 1)
        right = {
            "floor": share(place) >= 1.0,
            "ceil": tirx.const(True, "bool"),
            "round_prefer_ceil": share(place) >= 0.5,
            "round_prefer_floor": share(place) > 0.5,
        }[kernel.rounding]
        return left(place).astype("int64") + right.astype("int64")

    first = te.compute((size,), start, name="first")

    def weight(place: Any, index: Any) -> Any:
        distance = (index - (count // 2 - 1)).astype("float64") - share(place)
        if kernel.antialias:
            distance = distance * min(float(change.scale or 1.0), 1.0)
        value = _weight(tirx.abs(distance), kernel)
        if not kernel.exclude:
            return value
        position = first(place) + index
        return tirx.Select(tirx.And(position >= 0, position < length), value, tirx.const(0.0, "float64"))

    raw = te.compute((size, count), weight, name="raw")

    def share_of_all(place: Any, index: Any) -> Any:
        if not (kernel.exclude or kernel.antialias):
            return raw(place, index).astype("float32")
        return (raw(place, index) / sum(raw(place, i) for i in range(count))).astype("float32")

    weights = te.compute((size, count), share_of_all, name="weights")
    inside = te.compute(
        (size,),
        lambda place: tirx.And(center(place) >= 0.0, center(place) <= (length - 1).astype("float64")),
        name="inside",
    )
    return [first, weights, inside]


def _center(place: Any, length: Any, size: Any, change: _Axis, kernel: _Kernel) -> Any:
    """The place in the input, in float64, that one of the result stands for."""
    place, length, size = (item.astype("float64") for item in (place, length, size))
    exact = length * change.scale if change.scale is not None else size

    def unscaled(x: Any) -> Any:
        # TVM's bounds take quotients for integers: that of both sizes might be zero, and must not divide.
        return x / change.scale if change.scale is not None else x * length / size

    half = unscaled(place + 0.5) - 0.5
    if kernel.places == "asymmetric":
        return unscaled(place)
    if kernel.places == "half_pixel":
        return half
    if kernel.places == "half_pixel_symmetric":
        return half + length / 2.0 * (1.0 - size / exact)
    single = exact == 1.0
    if kernel.places == "pytorch_half_pixel":
        return tirx.Select(single, tirx.const(-0.5, "float64"), half)
    spread = change.end - change.start
    steps = place * spread * (length - 1.0) / tirx.Select(single, tirx.const(1.0, "float64"), exact - 1.0)
    middle = spread * (length - 1.0) / 2.0 if kernel.places == _CROP else tirx.const(0.0, "float64")
    return tirx.Select(single, middle, steps) + change.start * (length - 1.0)


def _weight(x: Any, kernel: _Kernel) -> Any:
    """The weight of a neighbour at a distance.

    References
    ----------
    Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981, equation 15.
    """
    zero = tirx.const(0.0, "float64")
    if kernel.mode == "linear":
        return tirx.max(1.0 - x, zero)
    a = kernel.cubic
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return tirx.Select(x <= 1.0, near, tirx.Select(x < 2.0, far, zero))
