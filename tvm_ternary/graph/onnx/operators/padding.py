"""``Pad`` in every mode, by known or symbolic amounts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, te, tirx

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.values import Dim, as_expr


def pad(emitter: Emitter, node: Node) -> relax.Expr:
    """``Pad``; a negative amount cuts off."""
    dims = emitter.known_shape(node.value(0), node)
    axes = list(range(len(dims)))
    if node.has(3):
        axes = [axis_of(axis, len(dims), node) for axis in node.integers("axes", 3) or []]
    given = list(node.attributes["pads"]) if "pads" in node.attributes else emitter.dims(node.value(1), node)
    if len(given) != 2 * len(axes):
        node.refuse(f"{len(given)} amounts for {len(axes)} axes, expected two for each")
    before: list[Dim] = [0] * len(dims)
    shape = list(dims)
    for axis, first, last in zip(axes, given, given[len(axes) :], strict=False):
        before[axis] = first
        shape[axis] = emitter.algebra.simplify(first + dims[axis] + last)
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", *_SOURCES):
        node.refuse(f"mode {mode}; expected one of constant, {', '.join(_SOURCES)}")
    data, dtype = emitter.tensor(node.value(0), node), emitter.dtype(node.value(0))
    fill = relax.const(node.attributes.get("value", 0), dtype)
    if node.has(2):
        fill = emitter.tensor(node.value(2), node)
    moved = [
        axis
        for axis, first in enumerate(before)
        if not (emitter.algebra.equal(first, 0) and emitter.algebra.equal(shape[axis], dims[axis]))
    ]
    return emitter.builder.emit_te(_padded, data, fill, before, shape, moved, mode, primfunc_name_hint="pad")


def _padded(
    data: te.Tensor, fill: te.Tensor, before: list[Dim], shape: list[Dim], moved: list[int], mode: str
) -> te.Tensor:
    def compute(*indices: Any) -> Any:
        places = [index - as_expr(first) for index, first in zip(indices, before, strict=True)]
        if mode != "constant":
            for axis in moved:
                places[axis] = _SOURCES[mode](places[axis], data.shape[axis])
            return data(*places)
        inside = [tirx.And(places[axis] >= 0, places[axis] < data.shape[axis]) for axis in moved]
        value = fill() if not len(fill.shape) else fill(0)
        return tirx.if_then_else(tirx.all(*inside), data(*places), value) if inside else data(*places)

    return te.compute([as_expr(dim) for dim in shape], compute, name="pad")


def _reflected(place: Any, extent: Any) -> Any:
    """Back and forth between both ends, without repeating them."""
    period = tirx.max(2 * (extent - 1), 1)
    inside = tirx.floormod(place, period)
    return tirx.min(inside, period - inside) if not _is_one(extent) else tirx.const(0, "int64")


def _is_one(extent: Any) -> bool:
    return isinstance(extent, tirx.IntImm) and int(extent) == 1


_SOURCES: dict[str, Callable[[Any, Any], Any]] = {
    "edge": lambda place, extent: tirx.max(tirx.min(place, extent - 1), 0),
    "reflect": _reflected,
    "wrap": tirx.floormod,
}
"""Where an element beyond the ends comes from."""
