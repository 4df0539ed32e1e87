"""``LSTM``, unrolled over a known number of steps, so that its matrices are matrices like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.matrix import linear
from tvm_ternary.graph.onnx.operators.shaping import filled, window
from tvm_ternary.graph.onnx.values import Constant, describe

LONGEST = 1024
"""Steps up to which a sequence is unrolled."""

_DEFAULT_ACTIVATIONS = ("sigmoid", "tanh", "tanh")


@dataclass(frozen=True)
class _Direction:
    """One direction's weights: ``w`` (input, 4H), ``r`` (H, 4H) and ``bias`` (4H,), gates in the order i, o, f, c."""

    w: np.ndarray
    r: np.ndarray
    bias: np.ndarray
    names: tuple[tuple[str, ...], tuple[str, ...]]
    backward: bool


def lstm(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``LSTM`` with its default activations.

    Returns
    -------
    list
        Y (steps, directions, batch, H), Y_h and Y_c (directions, batch, H); batch first with ``layout`` 1.
    """
    directions = _directions(node)
    layout = node.attributes.get("layout", 0)
    x = emitter.tensor(node.value(0), node)
    dims = emitter.known_shape(node.value(0), node)
    if layout:
        x, dims = emitter.emit(R.permute_dims(x, [1, 0, 2])), [dims[1], dims[0], dims[2]]
    steps, batch = dims[0], dims[1]
    if not isinstance(steps, int):
        node.refuse(
            f"the number of steps, {describe(steps)}, is symbolic", f"fix it with --dim {describe(steps)}=VALUE"
        )
    lengths = node.constant(4)
    if node.has(4) and (lengths is None or (lengths != steps).any()):
        node.refuse("sequences of different lengths", "pad them and let the model mask the rest")
    if steps > LONGEST:
        node.refuse(f"{steps} steps are more than the {LONGEST} that are unrolled")
    hidden, last_hidden, last_cell = [], [], []
    for index, direction in enumerate(directions):
        start = [_initial(emitter, node, slot, index, batch, direction.r.shape[0], layout) for slot in (5, 6)]
        states, cell = _run(emitter, node, direction, x, start, steps)
        hidden.append(emitter.emit(R.stack(states[::-1] if direction.backward else states, 0)))
        last_hidden.append(states[-1])
        last_cell.append(cell)
    every, *last = (R.stack(hidden, 1), R.stack(last_hidden, 0), R.stack(last_cell, 0))
    if not layout:
        return [every, *last]
    return [
        R.permute_dims(emitter.emit(every), [2, 0, 1, 3]),
        *(R.permute_dims(emitter.emit(state), [1, 0, 2]) for state in last),
    ]


def _directions(node: Node) -> list[_Direction]:
    weights = {}
    for name, index in (("W", 1), ("R", 2), ("B", 3)):
        weights[name] = node.constant(index)
        if weights[name] is None and (name != "B" or node.has(index)):
            node.refuse(f"its weight {name} is computed while the model runs")
    _check(node)
    w, r, b = weights["W"], weights["R"], weights["B"]
    assert w is not None
    assert r is not None
    width = r.shape[2]
    b = np.zeros((len(w), 8 * width), w.dtype) if b is None else b
    kind = node.attributes.get("direction", "forward")
    names = tuple(_names(node, slot) for slot in (1, 2))
    return [
        _Direction(
            w[i].T,
            r[i].T,
            b[i, : 4 * width] + b[i, 4 * width :],
            tuple(tuple(f"{n}_reverse" if i else n for n in group) for group in names),  # type: ignore[arg-type]
            kind == "reverse" or i == 1,
        )
        for i in range(len(w))
    ]


def _names(node: Node, slot: int) -> tuple[str, ...]:
    value = node.value(slot)
    own = value.names if isinstance(value, Constant) else ()
    return (*own, f"{node.label}/weight_{'ih' if slot == 1 else 'hh'}")


def _check(node: Node) -> None:
    activations = [name.lower() for name in node.attributes.get("activations", ())]
    if any(name != _DEFAULT_ACTIVATIONS[i % 3] for i, name in enumerate(activations)):
        node.refuse(f"activations {activations} are not {list(_DEFAULT_ACTIVATIONS)}")
    for name in ("clip", "input_forget"):
        if node.attributes.get(name, 0):
            node.refuse(f"attribute {name} is set")
    if node.has(7):
        node.refuse("peephole weights are given")


def _initial(emitter: Emitter, node: Node, slot: int, index: int, batch: Any, width: int, layout: int) -> relax.Expr:
    """The state before the first step, (batch, H); zeros where none is given."""
    if not node.has(slot):
        dtype = emitter.dtype(node.value(0))
        return emitter.emit(filled([batch, width], np.zeros((), dtype)))
    axis = 1 if layout else 0
    state = emitter.tensor(node.value(slot), node)
    return emitter.emit(R.squeeze(emitter.emit(window(state, [axis], [index], [index + 1])), [axis]))


def _run(
    emitter: Emitter, node: Node, direction: _Direction, x: relax.Expr, state: list[relax.Expr], steps: int
) -> tuple[list[relax.Expr], relax.Expr]:
    """Hidden states in the order they are computed, and the last cell state."""
    hidden, cell = state
    width = direction.r.shape[0]
    bias = relax.const(direction.bias, str(direction.bias.dtype))
    inputs = emitter.emit(R.add(emitter.emit(linear(emitter, node, x, direction.w, direction.names[0])), bias))
    states = []
    for step in range(steps)[:: -1 if direction.backward else 1]:
        seen = emitter.emit(R.squeeze(emitter.emit(window(inputs, [0], [step], [step + 1])), [0]))
        kept = emitter.emit(linear(emitter, node, hidden, direction.r, direction.names[1]))
        gates = emitter.emit(R.add(seen, kept))
        entry, out, forget, candidate = (
            emitter.emit(window(gates, [1], [i * width], [(i + 1) * width])) for i in range(4)
        )
        fresh = R.multiply(R.sigmoid(entry), R.tanh(candidate))
        cell = emitter.emit(R.add(R.multiply(R.sigmoid(forget), cell), fresh))
        hidden = emitter.emit(R.multiply(R.sigmoid(out), R.tanh(cell)))
        states.append(hidden)
    return states, cell
