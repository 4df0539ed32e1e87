"""``NonMaxSuppression``: of boxes that overlap, those with the highest scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.relax import op as R
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.shaping import window


def non_max_suppression(emitter: Emitter, node: Node) -> relax.Expr:
    """``NonMaxSuppression``: batch, class and box of all that are kept, by falling scores.

    A box is kept if its score is above the threshold and no kept box of its class overlaps it by more than the other.
    How many there are is known when the model has run.
    """
    scores = emitter.tensor(node.value(1), node)
    corners = _corners(emitter, node)
    order = emitter.emit(R.argsort(scores, -1, descending=True, dtype="int64"))
    limits = [_limit(emitter, node, slot, value) for slot, value in ((2, 0), (3, 0.0), (4, -np.inf))]
    kept = emitter.builder.emit_te(_kept, corners, scores, order, *limits, primfunc_name_hint="non_max_suppression")
    count = tirx.Var(f"{node.label}_boxes", "int64")
    places = emitter.builder.match_cast(R.nonzero(kept), relax.TensorType([3, count], "int64"))
    rows = emitter.emit(R.permute_dims(places, [1, 0]))
    boxes = emitter.emit(R.expand_dims(emitter.emit(R.gather_nd(order, rows)), 1))
    return R.concat([emitter.emit(window(rows, [1], [0], [2])), boxes], 1)


def _corners(emitter: Emitter, node: Node) -> relax.Expr:
    """Boxes as their lower and their upper corner, (batch, boxes, 4)."""
    boxes = emitter.tensor(node.value(0), node)
    first, second = (emitter.emit(window(boxes, [2], [i], [i + 2])) for i in (0, 2))
    if node.attributes.get("center_point_box", 0):
        half = emitter.emit(R.multiply(second, relax.const(0.5, "float32")))
        return emitter.emit(R.concat([R.subtract(first, half), R.add(first, half)], 2))
    return emitter.emit(R.concat([R.minimum(first, second), R.maximum(first, second)], 2))


def _limit(emitter: Emitter, node: Node, slot: int, default: float) -> relax.Expr:
    """A bound as a tensor of one element."""
    dtype = "int64" if slot == 2 else "float32"
    if not node.has(slot):
        return relax.const(np.full(1, default, dtype))
    return emitter.emit(R.reshape(emitter.tensor(node.value(slot), node), [1]))


def _kept(
    corners: te.Tensor, scores: te.Tensor, order: te.Tensor, most: te.Tensor, overlap: te.Tensor, least: te.Tensor
) -> te.Tensor:
    """Whether each box is kept, by falling scores, (batch, classes, boxes) bool."""
    batches, classes, count = scores.shape

    def body(inputs: list[Any], outputs: list[Any]) -> Any:
        with IRBuilder() as builder:
            box, score, place, limit, shared, lowest = (T.buffer_proxy(buffer) for buffer in inputs)
            kept = T.buffer_proxy(outputs[0])
            number = T.buffer_proxy(outputs[1])
            with T.serial(0, batches) as b, T.serial(0, classes) as c:
                number[b, c] = T.int64(0)
                with T.serial(0, count) as i:
                    good = tirx.And(score[b, c, place[b, c, i]] > lowest[0], number[b, c] < limit[0])
                    kept[b, c, i] = good
                    with T.If(good), T.Then(), T.serial(0, i) as j:
                        one, two = place[b, c, i], place[b, c, j]
                        clash = _share(box, b, one, two) > shared[0]
                        kept[b, c, i] = tirx.And(kept[b, c, i], tirx.Not(tirx.And(kept[b, c, j], clash)))
                    number[b, c] = number[b, c] + kept[b, c, i].astype("int64")
            return builder.get()

    shape = [batches, classes, count]
    outputs = te.extern(
        [shape, shape[:2]],
        [corners, scores, order, most, overlap, least],
        body,
        dtype=["bool", "int64"],
        name="non_max_suppression",
    )
    return outputs[0]


def _share(box: Any, batch: Any, one: Any, two: Any) -> Any:
    """The intersection of two boxes over their union."""
    zero = tirx.const(0.0, "float32")

    def side(index: Any, axis: int) -> Any:
        return box[batch, index, axis + 2] - box[batch, index, axis]

    def common(axis: int) -> Any:
        end = tirx.min(box[batch, one, axis + 2], box[batch, two, axis + 2])
        return tirx.max(end - tirx.max(box[batch, one, axis], box[batch, two, axis]), zero)

    shared = common(0) * common(1)
    union = side(one, 0) * side(one, 1) + side(two, 0) * side(two, 1) - shared
    return tirx.Select(union > zero, shared / tirx.max(union, tirx.const(1e-30, "float32")), zero)
