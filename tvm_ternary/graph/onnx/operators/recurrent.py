"""``LSTM``, ``GRU`` and ``RNN``, unrolled over a known number of steps, so that their matrices are like any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.matrix import linear
from tvm_ternary.graph.onnx.operators.shaping import filled, window
from tvm_ternary.graph.onnx.values import Constant, Dim, Value, describe

LONGEST = 1024
"""Steps up to which a sequence is unrolled."""

_ACTIVATIONS: dict[str, Callable[[relax.Expr], relax.Expr]] = {
    "relu": R.nn.relu,
    "sigmoid": R.sigmoid,
    "softplus": R.nn.softplus,
    "tanh": R.tanh,
}


Product: TypeAlias = "Callable[[Emitter, Node, Value, np.ndarray, tuple[str, ...]], relax.Expr]"
"""Multiplies activations (..., K) by a (K, N) weight of these names."""


@dataclass(frozen=True)
class _Cell:
    """One direction of a layer with G gates and H features.

    Attributes
    ----------
    w : (input, G * H)
    r : (H, G * H)
    bias, inner_bias : (G * H,)
        What is added to the products of ``w`` and to those of ``r``.
    peephole : (3, H) or None
        Of an LSTM, factors of the cell's state in the gates i, o, f.
    names : tuple of tuple of str
        What the two matrices are called.
    backward : bool
        Whether it starts at the end.
    activations : tuple of str
    clip : float
        Bound of what activations see; infinite for none.
    product : callable
        Multiplies by the two matrices.
    """

    w: np.ndarray
    r: np.ndarray
    bias: np.ndarray
    inner_bias: np.ndarray
    peephole: np.ndarray | None
    names: tuple[tuple[str, ...], tuple[str, ...]]
    backward: bool
    activations: tuple[str, ...]
    clip: float
    product: Product

    @property
    def width(self) -> int:
        """Features of a state."""
        return int(self.r.shape[0])


_Step: TypeAlias = "Callable[[Emitter, Node, _Cell, relax.Expr, list[relax.Expr]], list[relax.Expr]]"
"""Takes what the inputs add to the gates (batch, G * H) and the states (batch, H); gives the next states."""


@dataclass(frozen=True)
class _Kind:
    """What tells the operators apart.

    Attributes
    ----------
    step : callable
    activations : tuple of str
        The defaults of one direction.
    states : tuple of int
        The inputs that hold the states before the first step.
    inner_bias : bool
        Whether the bias of a state's product is added by the step; else it is added once, with that of the inputs.
    product : callable
        Multiplies by a matrix; the steps of ``GRU`` and ``RNN`` use ``linear`` themselves.
    """

    step: _Step
    activations: tuple[str, ...]
    states: tuple[int, ...]
    inner_bias: bool = False
    product: Product = linear


def lstm(emitter: Emitter, node: Node, product: Product = linear) -> list[relax.Expr | None]:
    """``LSTM``, with peepholes where they are given.

    Parameters
    ----------
    emitter, node
    product : callable, optional
        Multiplies by a matrix, as ``linear`` does.

    Returns
    -------
    list
        Y (steps, directions, batch, H), Y_h and Y_c (directions, batch, H); batch first with ``layout`` 1.
    """
    if node.attributes.get("input_forget", 0):
        node.refuse("attribute input_forget is set")
    return _unrolled(emitter, node, _Kind(_lstm_step, ("sigmoid", "tanh", "tanh"), (5, 6), product=product))


def gru(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``GRU``; Y and Y_h as of ``lstm``."""
    reset_last = bool(node.attributes.get("linear_before_reset", 0))
    step = _gru_step if reset_last else _gru_step_reset_first
    return _unrolled(emitter, node, _Kind(step, ("sigmoid", "tanh"), (5,), inner_bias=reset_last))


def rnn(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``RNN``; Y and Y_h as of ``lstm``."""
    return _unrolled(emitter, node, _Kind(_rnn_step, ("tanh",), (5,)))


def _lstm_step(
    emitter: Emitter, node: Node, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    hidden, memory = states
    kept = emitter.emit(cell.product(emitter, node, hidden, cell.r, cell.names[1]))
    gates = emitter.emit(R.add(seen, kept))
    entry, out, forget, candidate = (_gate(emitter, cell, gates, i) for i in range(4))
    f, g, h = cell.activations

    def peeking(gate: relax.Expr, index: int, state: relax.Expr) -> relax.Expr:
        if cell.peephole is None:
            return gate
        return emitter.emit(R.add(gate, emitter.emit(R.multiply(_const(cell.peephole[index]), state))))

    fresh = R.multiply(_act(cell, f, peeking(entry, 0, memory)), _act(cell, g, candidate))
    memory = emitter.emit(R.add(R.multiply(_act(cell, f, peeking(forget, 2, memory)), memory), fresh))
    hidden = emitter.emit(R.multiply(_act(cell, f, peeking(out, 1, memory)), _ACTIVATIONS[h](memory)))
    return [hidden, memory]


def _gru_step(
    emitter: Emitter, node: Node, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    """The reset gate acts on the candidate's product: one product for all gates."""
    (hidden,) = states
    kept = emitter.emit(linear(emitter, node, hidden, cell.r, cell.names[1]))
    kept = emitter.emit(R.add(kept, _const(cell.inner_bias)))
    update, reset = _update_and_reset(emitter, cell, seen, kept)
    inner = emitter.emit(R.multiply(reset, _gate(emitter, cell, kept, 2)))
    return [_mixed(emitter, cell, emitter.emit(R.add(_gate(emitter, cell, seen, 2), inner)), update, hidden)]


def _gru_step_reset_first(
    emitter: Emitter, node: Node, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    """The reset gate acts on the state: the candidate has a product of its own."""
    (hidden,) = states
    split = 2 * cell.width
    gates, last = (tuple(f"{name}_{part}" for name in cell.names[1]) for part in ("gates", "candidate"))
    kept = emitter.emit(linear(emitter, node, hidden, np.ascontiguousarray(cell.r[:, :split]), gates))
    update, reset = _update_and_reset(emitter, cell, seen, kept)
    inner = emitter.emit(R.multiply(reset, hidden))
    inner = emitter.emit(linear(emitter, node, inner, np.ascontiguousarray(cell.r[:, split:]), last))
    return [_mixed(emitter, cell, emitter.emit(R.add(_gate(emitter, cell, seen, 2), inner)), update, hidden)]


def _update_and_reset(emitter: Emitter, cell: _Cell, seen: relax.Expr, kept: relax.Expr) -> list[relax.Expr]:
    sums = (emitter.emit(R.add(_gate(emitter, cell, seen, i), _gate(emitter, cell, kept, i))) for i in (0, 1))
    return [emitter.emit(_act(cell, cell.activations[0], total)) for total in sums]


def _mixed(emitter: Emitter, cell: _Cell, candidate: relax.Expr, update: relax.Expr, hidden: relax.Expr) -> relax.Expr:
    """(1 - z) h' + z h, as h' + z (h - h')."""
    fresh = emitter.emit(_act(cell, cell.activations[1], candidate))
    return emitter.emit(R.add(fresh, R.multiply(update, R.subtract(hidden, fresh))))


def _rnn_step(
    emitter: Emitter, node: Node, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    kept = emitter.emit(linear(emitter, node, states[0], cell.r, cell.names[1]))
    return [emitter.emit(_act(cell, cell.activations[0], emitter.emit(R.add(seen, kept))))]


def _gate(emitter: Emitter, cell: _Cell, gates: relax.Expr, index: int) -> relax.Expr:
    return emitter.emit(window(gates, [1], [index * cell.width], [(index + 1) * cell.width]))


def _const(array: np.ndarray) -> relax.Expr:
    return relax.const(array, str(array.dtype))


def _act(cell: _Cell, name: str, x: relax.Expr) -> relax.Expr:
    return _ACTIVATIONS[name](x if np.isinf(cell.clip) else R.clip(x, -cell.clip, cell.clip))


def _unrolled(emitter: Emitter, node: Node, kind: _Kind) -> list[relax.Expr | None]:
    """All directions of a layer."""
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
    if steps > LONGEST:
        node.refuse(f"{steps} steps are more than the {LONGEST} that are unrolled")
    lengths = _lengths(emitter, node, steps)
    hidden = []
    last: list[list[relax.Expr]] = [[] for _ in kind.states]
    for index, cell in enumerate(_cells(node, kind)):
        start = [_initial(emitter, node, slot, index, batch, cell.width, layout) for slot in kind.states]
        outputs, end = _run(emitter, node, cell, kind.step, x, start, steps, lengths)
        hidden.append(emitter.emit(R.stack(outputs[::-1] if cell.backward else outputs, 0)))
        for states, state in zip(last, end, strict=True):
            states.append(state)
    every, *ends = (R.stack(hidden, 1), *(R.stack(states, 0) for states in last))
    if not layout:
        return [every, *ends]
    return [
        R.permute_dims(emitter.emit(every), [2, 0, 1, 3]),
        *(R.permute_dims(emitter.emit(state), [1, 0, 2]) for state in ends),
    ]


def _lengths(emitter: Emitter, node: Node, steps: int) -> relax.Expr | None:
    """The number of steps of each sequence (batch, 1), None where all have all of them."""
    known = node.constant(4)
    if not node.has(4) or (known is not None and (known == steps).all()):
        return None
    return emitter.emit(R.expand_dims(emitter.tensor(node.value(4), node), 1))


def _run(
    emitter: Emitter,
    node: Node,
    cell: _Cell,
    step: _Step,
    x: relax.Expr,
    states: list[relax.Expr],
    steps: int,
    lengths: relax.Expr | None,
) -> tuple[list[relax.Expr], list[relax.Expr]]:
    """Outputs in the order they are computed, and the last states. Beyond a sequence's end its states stay."""
    product = emitter.emit(cell.product(emitter, node, x, cell.w, cell.names[0]))
    inputs = emitter.emit(R.add(product, _const(cell.bias)))
    outputs = []
    for place in range(steps)[:: -1 if cell.backward else 1]:
        seen = emitter.emit(R.squeeze(emitter.emit(window(inputs, [0], [place], [place + 1])), [0]))
        fresh = step(emitter, node, cell, seen, states)
        output = fresh[0]
        if lengths is not None:
            inside = emitter.emit(R.greater(lengths, relax.const(place, emitter.dtype(lengths))))
            fresh = [emitter.emit(R.where(inside, new, old)) for new, old in zip(fresh, states, strict=True)]
            output = emitter.emit(R.where(inside, output, relax.const(0, emitter.dtype(output))))
        states = fresh
        outputs.append(output)
    return outputs, states


def _cells(node: Node, kind: _Kind) -> list[_Cell]:
    """The directions."""
    w, r = (_weight(node, index, name) for index, name in ((1, "W"), (2, "R")))
    assert w is not None
    assert r is not None
    b, peephole = _weight(node, 3, "B"), _weight(node, 7, "P")
    b = np.zeros((len(w), 2 * w.shape[1]), w.dtype) if b is None else b
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    direction = node.attributes.get("direction", "forward")
    if len(directions.get(direction, ())) != len(w):
        node.refuse(f"direction {direction} with weights of {len(w)}")
    activations = _activations(node, kind.activations, len(w))
    count = len(kind.activations)
    names = [_names(node, slot) for slot in (1, 2)]
    cells = []
    for i, backward in enumerate(directions[direction]):
        outer, inner = b[i].reshape(2, -1)
        cells.append(
            _Cell(
                w[i].T,
                r[i].T,
                outer if kind.inner_bias else outer + inner,
                inner,
                None if peephole is None else peephole[i].reshape(3, -1),
                tuple(tuple(f"{n}_reverse" if i else n for n in group) for group in names),  # type: ignore[arg-type]
                backward,
                activations[count * i : count * (i + 1)],
                float(node.attributes.get("clip", 0.0)) or np.inf,
                kind.product,
            )
        )
    return cells


def _weight(node: Node, index: int, name: str) -> np.ndarray | None:
    array = node.constant(index)
    if array is None and node.has(index):
        node.refuse(f"its weight {name} is computed while the model runs")
    return array


def _names(node: Node, slot: int) -> tuple[str, ...]:
    value = node.value(slot)
    own = value.names if isinstance(value, Constant) else ()
    return (*own, f"{node.label}/weight_{'ih' if slot == 1 else 'hh'}")


def _activations(node: Node, defaults: Sequence[str], directions: int) -> tuple[str, ...]:
    given = tuple(name.lower() for name in node.attributes.get("activations", ())) or (*defaults,) * directions
    if len(given) != len(defaults) * directions or any(name not in _ACTIVATIONS for name in given):
        node.refuse(f"activations {list(given)}: expected {len(defaults)} a direction of {sorted(_ACTIVATIONS)}")
    return given


def _initial(emitter: Emitter, node: Node, slot: int, index: int, batch: Dim, width: int, layout: int) -> Any:
    """The state before the first step, (batch, H); zeros where none is given."""
    if not node.has(slot):
        dtype = emitter.dtype(node.value(0))
        return emitter.emit(filled([batch, width], np.zeros((), dtype)))
    axis = 1 if layout else 0
    state = emitter.tensor(node.value(slot), node)
    return emitter.emit(R.squeeze(emitter.emit(window(state, [axis], [index], [index + 1])), [axis]))
