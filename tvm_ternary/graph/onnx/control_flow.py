"""``If``, ``Loop`` and ``Scan``: what they do is decided at import, so that the module is one straight sequence.

A condition that is known takes its branch. One that the model computes has both branches computed, and one of the two
results chosen: the branches of real models are small, and a module without jumps is fused and scheduled like any other.
Loops are unrolled, so that a counter is a constant in each of its steps and shapes stay known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node, axis_of
from tvm_ternary.graph.onnx.operators.shaping import same_shape, window
from tvm_ternary.graph.onnx.values import Constant, Value, describe

LONGEST = 1024
"""Steps up to which a loop is unrolled."""

Run: TypeAlias = "Callable[[onnx.GraphProto, Mapping[str, Value]], list[Value]]"
"""Walks a graph with values for its inputs and those of the graphs around it; gives its outputs."""


def branch(emitter: Emitter, node: Node, run: Run, scope: Mapping[str, Value]) -> list[Value]:
    """``If``."""
    graphs = [node.required(name) for name in ("then_branch", "else_branch")]
    known = node.constant(0)
    if known is not None:
        return run(graphs[0 if bool(np.all(known)) else 1], scope)
    condition = _scalar(emitter, node, node.value(0))
    results = [run(graph, scope) for graph in graphs]
    return [_chosen(emitter, node, condition, *pair) for pair in zip(*results, strict=True)]


def _scalar(emitter: Emitter, node: Node, condition: Value) -> relax.Expr:
    tensor = emitter.tensor(condition, node)
    return tensor if emitter.shape(condition) == [] else emitter.emit(R.reshape(tensor, []))


def _chosen(emitter: Emitter, node: Node, condition: relax.Expr, yes: Value, no: Value) -> Value:
    """One of two values of the same shape."""
    if yes is no:
        return yes
    shapes = [emitter.known_shape(value, node) for value in (yes, no)]
    if not same_shape(emitter, *shapes) or emitter.dtype(yes) != emitter.dtype(no):
        node.refuse(
            f"its condition depends on the model's inputs, and its branches give {describe(shapes[0])} and "
            f"{describe(shapes[1])}, which have to be the same",
            "make the deciding input a constant with --constant NAME=VALUE, or fix the dimensions it looks at",
        )
    return emitter.emit(R.where(condition, emitter.tensor(yes, node), emitter.tensor(no, node)))


def loop(emitter: Emitter, node: Node, run: Run, scope: Mapping[str, Value]) -> list[Value]:
    """``Loop``: its steps in a row.

    Where the body decides by the model's data whether to go on, all steps are computed, and those behind the last
    change nothing.
    """
    body = node.required("body")
    counter, going, *names = [value.name for value in body.input]
    limit, condition = _trip_count(node), node.constant(1)
    states = [node.value(2 + i) for i in range(len(names))]
    rows: list[list[Value]] = [[] for _ in body.output[1 + len(names) :]]
    active: relax.Expr | None = None
    if node.has(1) and condition is None:
        active = _scalar(emitter, node, node.value(1))
    if condition is not None and not np.all(condition):
        limit = 0
    step = 0
    while step < limit:
        if step == LONGEST:
            node.refuse(f"more than the {LONGEST} steps that are unrolled", "export the model without this loop")
        true = Constant(np.array(True))
        own = {counter: Constant(np.array(step)), going: true, **dict(zip(names, states, strict=True))}
        more, *results = run(body, {**scope, **own})
        fresh, scanned = results[: len(names)], results[len(names) :]
        if active is None:
            states = fresh
        else:
            pairs = zip(fresh, states, strict=True)
            states = [_chosen(emitter, node, active, new, old) for new, old in pairs]
        for row, value in zip(rows, scanned, strict=True):
            row.append(value)
        step += 1
        if isinstance(more, Constant):
            if not np.all(more.array):
                break
        elif limit > LONGEST:
            node.refuse("how many steps it has depends on the model's data", "export it with a largest number of steps")
        elif step < limit:
            again = _scalar(emitter, node, more)
            active = again if active is None else emitter.emit(R.logical_and(active, again))
    if active is not None and rows:
        node.refuse("how many rows its scan outputs have depends on the model's data")
    return [*states, *(_stacked(emitter, node, row, 0) for row in rows)]


def _trip_count(node: Node) -> float:
    count = node.constant(0)
    if count is not None:
        limit = int(count.reshape(()))
        if limit > LONGEST and not _may_end_early(node):
            node.refuse(f"{limit} steps are more than the {LONGEST} that are unrolled")
        return limit
    if node.has(0):
        problem = "its trip count depends on the model's inputs"
        node.refuse(problem, "make it a constant with --constant NAME=VALUE, or fix the dimensions it is made of")
    return np.inf


def _may_end_early(node: Node) -> bool:
    """Whether the body computes its condition, rather than handing on the one that it was given."""
    body = node.required("body")
    made = {name: inner for inner in body.node for name in inner.output}
    name = body.output[0].name
    while name in made and made[name].op_type == "Identity":
        name = made[name].input[0]
    return bool(name != body.input[1].name)


def scan(emitter: Emitter, node: Node, run: Run, scope: Mapping[str, Value]) -> list[Value]:
    """``Scan``: one step for each part of its inputs along an axis."""
    if node.opset < 9:
        return _scan_of_batches(emitter, node, run, scope)
    values = [node.value(i) for i in range(len(node.inputs))]
    return _scanned(emitter, node, run, scope, values)


def _scan_of_batches(emitter: Emitter, node: Node, run: Run, scope: Mapping[str, Value]) -> list[Value]:
    """The first version: states and inputs have a batch in front, which the body does not see."""
    if node.has(0):
        node.refuse("sequences of different lengths", "pad them and let the model mask the rest")
    values = [node.value(i) for i in range(1, len(node.inputs))]
    batch = emitter.known_shape(values[0], node)[0]
    if not isinstance(batch, int):
        node.refuse(f"its batch, {describe(batch)}, is symbolic", f"fix it with --dim {describe(batch)}=VALUE")
    rows = []
    for index in range(batch):
        parts: list[Value] = [_part(emitter, node, value, 0, index) for value in values]
        rows.append(_scanned(emitter, node, run, scope, parts, directions="directions"))
    return [_stacked(emitter, node, list(row), 0) for row in zip(*rows, strict=True)]


def _scanned(
    emitter: Emitter,
    node: Node,
    run: Run,
    scope: Mapping[str, Value],
    values: Sequence[Value],
    directions: str = "scan_input_directions",
) -> list[Value]:
    body = node.required("body")
    count = int(node.required("num_scan_inputs"))
    states, inputs = list(values[: len(values) - count]), values[len(values) - count :]
    axes = [
        axis_of(axis, emitter.rank(value), node)
        for axis, value in zip(node.attributes.get("scan_input_axes", [0] * count), inputs, strict=True)
    ]
    steps = emitter.known_shape(inputs[0], node)[axes[0]]
    if not isinstance(steps, int):
        hint = f"fix it with --dim {describe(steps)}=VALUE"
        node.refuse(f"the number of steps, {describe(steps)}, is symbolic", hint)
    if steps > LONGEST:
        node.refuse(f"{steps} steps are more than the {LONGEST} that are unrolled")
    backward = node.attributes.get(directions, [0] * count)
    names = [value.name for value in body.input]
    rows: list[list[Value]] = [[] for _ in body.output[len(states) :]]
    for step in range(steps):
        parts = [
            _part(emitter, node, value, axis, steps - 1 - step if turned else step)
            for value, axis, turned in zip(inputs, axes, backward, strict=True)
        ]
        results = run(body, {**scope, **dict(zip(names, [*states, *parts], strict=True))})
        states = results[: len(states)]
        for row, value in zip(rows, results[len(states) :], strict=True):
            row.append(value)
    axes = node.attributes.get("scan_output_axes", [0] * len(rows))
    turned = node.attributes.get("scan_output_directions", [0] * len(rows))
    return [
        *states,
        *(
            _stacked(emitter, node, row[::-1] if back else row, axis)
            for row, axis, back in zip(rows, axes, turned, strict=True)
        ),
    ]


def _part(emitter: Emitter, node: Node, value: Value, axis: int, index: int) -> Value:
    """One position along an axis, which vanishes."""
    if isinstance(value, Constant):
        return Constant(value.array.take(index, axis=axis), value.names)
    part = emitter.emit(window(emitter.tensor(value, node), [axis], [index], [index + 1]))
    return emitter.emit(R.squeeze(part, [axis]))


def _stacked(emitter: Emitter, node: Node, row: Iterable[Value], axis: int) -> Value:
    """The values of all steps along a new axis."""
    values = list(row)
    if not values:
        node.refuse("a loop without steps has nothing to stack")
    if all(isinstance(value, Constant) for value in values):
        return Constant(np.stack([value.array for value in values], axis))  # type: ignore[union-attr]
    return emitter.emit(R.stack([emitter.tensor(value, node) for value in values], axis))


CONTROL_FLOW = {"If": branch, "Loop": loop, "Scan": scan}
"""The operators that run graphs of their own."""
