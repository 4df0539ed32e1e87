"""``LSTM``, ``GRU`` and ``RNN``, in one of two ways.

A known number of steps is unrolled, so that all matrices are like any other and can become ternary. A symbolic one, or
one too long to be unrolled, is a loop inside one function (`kernels.recurrence`): there the matrices of the inputs are
like any other, and those of the states stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.matrix import PROMOTED, linear
from tvm_ternary.graph.onnx.operators.shaping import filled, same_shape, window
from tvm_ternary.graph.onnx.values import Constant, Dim, Value, as_expr, describe
from tvm_ternary.kernels.recurrence import Recurrence, pack_recurrent
from tvm_ternary.schedule.cpu import recurrence

LONGEST = 1024
"""Steps up to which a sequence is unrolled."""

IN_LOOP = "multiplied inside the loop over {} steps, in float"
"""Why a matrix of the states is none of the model's matrices."""

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
    bias : (G * H,)
        What is added to the sum of both products.
    inner_bias : (H,) or None
        Where the last gate's product of ``r`` is used by itself, what is added to it.
    peephole : (3, H) or None
        Of an LSTM, factors of the cell's state in the gates i, o, f.
    names : tuple of tuple of str
        What the two matrices are called.
    backward : bool
        Whether it starts at the end.
    activations : tuple of str
    clip : float
        Bound of what activations see; infinite for none.
    """

    w: np.ndarray
    r: np.ndarray
    bias: np.ndarray
    inner_bias: np.ndarray | None
    peephole: np.ndarray | None
    names: tuple[tuple[str, ...], tuple[str, ...]]
    backward: bool
    activations: tuple[str, ...]
    clip: float

    @property
    def width(self) -> int:
        """Features of a state."""
        return int(self.r.shape[0])


_Step: TypeAlias = "Callable[[Emitter, Node, _Kind, _Cell, relax.Expr, list[relax.Expr]], list[relax.Expr]]"
"""Takes what the inputs add to the gates (batch, G * H) and the states (batch, H); gives the next states."""


@dataclass(frozen=True)
class _Kind:
    """What tells the operators apart.

    Attributes
    ----------
    cell : str
        What `Recurrence` calls it.
    step : callable
    activations : tuple of str
        The defaults of one direction.
    states : tuple of int
        The inputs that hold the states before the first step.
    inner_bias : bool
        Whether the last gate's product of the state has a bias of its own.
    product : callable
        Multiplies by a matrix; the steps of ``GRU`` and ``RNN`` use ``linear`` themselves.
    rounded : bool
        Whether ``product`` rounds what it multiplies to 8 bits.
    """

    cell: str
    step: _Step
    activations: tuple[str, ...]
    states: tuple[int, ...]
    inner_bias: bool = False
    product: Product = linear
    rounded: bool = False


def lstm(emitter: Emitter, node: Node, product: Product = linear, *, rounded: bool = False) -> list[relax.Expr | None]:
    """``LSTM``, with peepholes where they are given.

    Parameters
    ----------
    emitter, node
    product : callable, optional
        Multiplies by a matrix, as ``linear`` does.
    rounded : bool
        Whether ``product`` rounds what it multiplies to 8 bits.

    Returns
    -------
    list
        Y (steps, directions, batch, H), Y_h and Y_c (directions, batch, H); batch first with ``layout`` 1.
    """
    if node.attributes.get("input_forget", 0):
        node.refuse("attribute input_forget is set")
    kind = _Kind("lstm", _lstm_step, ("sigmoid", "tanh", "tanh"), (5, 6), product=product, rounded=rounded)
    return _layer(emitter, node, kind)


def gru(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``GRU``; Y and Y_h as of ``lstm``."""
    reset_last = bool(node.attributes.get("linear_before_reset", 0))
    cell, step = ("gru", _gru_step) if reset_last else ("gru_reset_first", _gru_step_reset_first)
    return _layer(emitter, node, _Kind(cell, step, ("sigmoid", "tanh"), (5,), inner_bias=reset_last))


def rnn(emitter: Emitter, node: Node) -> list[relax.Expr | None]:
    """``RNN``; Y and Y_h as of ``lstm``."""
    return _layer(emitter, node, _Kind("rnn", _rnn_step, ("tanh",), (5,)))


def _lstm_step(
    emitter: Emitter, node: Node, kind: _Kind, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    hidden, memory = states
    kept = emitter.emit(kind.product(emitter, node, hidden, cell.r, cell.names[1]))
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
    emitter: Emitter, node: Node, kind: _Kind, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    """The reset gate acts on the candidate's product: one product for all gates."""
    (hidden,) = states
    kept = emitter.emit(linear(emitter, node, hidden, cell.r, cell.names[1]))
    update, reset = _update_and_reset(emitter, cell, seen, kept)
    assert cell.inner_bias is not None
    inner = emitter.emit(R.add(_gate(emitter, cell, kept, 2), _const(cell.inner_bias)))
    inner = emitter.emit(R.multiply(reset, inner))
    return [_mixed(emitter, cell, emitter.emit(R.add(_gate(emitter, cell, seen, 2), inner)), update, hidden)]


def _gru_step_reset_first(
    emitter: Emitter, node: Node, kind: _Kind, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    """The reset gate acts on the state: the candidate has a product of its own."""
    (hidden,) = states
    split = 2 * cell.width
    gates, last = (_part_of(cell.names[1], part) for part in ("gates", "candidate"))
    kept = emitter.emit(linear(emitter, node, hidden, np.ascontiguousarray(cell.r[:, :split]), gates))
    update, reset = _update_and_reset(emitter, cell, seen, kept)
    inner = emitter.emit(R.multiply(reset, hidden))
    inner = emitter.emit(linear(emitter, node, inner, np.ascontiguousarray(cell.r[:, split:]), last))
    return [_mixed(emitter, cell, emitter.emit(R.add(_gate(emitter, cell, seen, 2), inner)), update, hidden)]


def _part_of(names: tuple[str, ...], part: str) -> tuple[str, ...]:
    """What a matrix is called that is made of some columns of another."""
    return tuple(f"{name}_{part}" for name in names)


def _update_and_reset(emitter: Emitter, cell: _Cell, seen: relax.Expr, kept: relax.Expr) -> list[relax.Expr]:
    sums = (emitter.emit(R.add(_gate(emitter, cell, seen, i), _gate(emitter, cell, kept, i))) for i in (0, 1))
    return [emitter.emit(_act(cell, cell.activations[0], total)) for total in sums]


def _mixed(emitter: Emitter, cell: _Cell, candidate: relax.Expr, update: relax.Expr, hidden: relax.Expr) -> relax.Expr:
    """(1 - z) h' + z h, as h' + z (h - h')."""
    fresh = emitter.emit(_act(cell, cell.activations[1], candidate))
    return emitter.emit(R.add(fresh, R.multiply(update, R.subtract(hidden, fresh))))


def _rnn_step(
    emitter: Emitter, node: Node, kind: _Kind, cell: _Cell, seen: relax.Expr, states: list[relax.Expr]
) -> list[relax.Expr]:
    kept = emitter.emit(linear(emitter, node, states[0], cell.r, cell.names[1]))
    return [emitter.emit(_act(cell, cell.activations[0], emitter.emit(R.add(seen, kept))))]


def _gate(emitter: Emitter, cell: _Cell, gates: relax.Expr, index: int) -> relax.Expr:
    return emitter.emit(window(gates, [1], [index * cell.width], [(index + 1) * cell.width]))


def _const(array: np.ndarray) -> relax.Expr:
    return relax.const(array, str(array.dtype))


def _act(cell: _Cell, name: str, x: relax.Expr) -> relax.Expr:
    return _ACTIVATIONS[name](x if np.isinf(cell.clip) else R.clip(x, -cell.clip, cell.clip))


def _layer(emitter: Emitter, node: Node, kind: _Kind) -> list[relax.Expr | None]:
    """All directions of a layer."""
    layout = node.attributes.get("layout", 0)
    x = emitter.tensor(node.value(0), node)
    dims = emitter.known_shape(node.value(0), node)
    if layout:
        x, dims = emitter.emit(R.permute_dims(x, [1, 0, 2])), [dims[1], dims[0], dims[2]]
    steps, batch, cells = dims[0], dims[1], _cells(node, kind)
    start = [_initial(emitter, node, slot, [len(cells), batch, cells[0].width], layout) for slot in kind.states]
    lengths = _lengths(emitter, node, steps)
    own = cells[0].names[1]
    named = (own[0], *_part_of(own, "gates")[:1])
    if isinstance(steps, int) and steps <= LONGEST and emitter.is_step_matrix(named, node.proto):
        every, *ends = _unrolled(emitter, node, kind, cells, x, steps, start, lengths)
    else:
        every, *ends = _looped(emitter, node, kind, cells, x, [steps, batch], start, lengths)
    if not layout:
        return [every, *ends]
    return [
        R.permute_dims(emitter.emit(every), [2, 0, 1, 3]),
        *(R.permute_dims(emitter.emit(state), [1, 0, 2]) for state in ends),
    ]


def _lengths(emitter: Emitter, node: Node, steps: Dim) -> relax.Expr | None:
    """The number of steps of each sequence (batch,), None where all have all of them."""
    known = node.constant(4)
    if not node.has(4) or (known is not None and isinstance(steps, int) and (known == steps).all()):
        return None
    return emitter.tensor(node.value(4), node)


def _initial(emitter: Emitter, node: Node, slot: int, dims: list[Dim], layout: int) -> relax.Expr:
    """The states before the first step, (directions, batch, H); zeros where none are given."""
    dtype = emitter.dtype(node.value(0))
    if not node.has(slot):
        return emitter.emit(filled(dims, np.zeros((), dtype)))
    state = emitter.tensor(node.value(slot), node)
    if layout:
        state = emitter.emit(R.permute_dims(state, [1, 0, 2]))
    given = emitter.known_shape(state, node)
    if not same_shape(emitter, given, dims):
        node.refuse(f"a first state of {describe(given)}, expected {describe(dims)}", "say with --dim what is equal")
    return state


def _looped(
    emitter: Emitter,
    node: Node,
    kind: _Kind,
    cells: Sequence[_Cell],
    x: relax.Expr,
    dims: list[Dim],
    start: Sequence[relax.Expr],
    lengths: relax.Expr | None,
) -> list[relax.Expr]:
    """One call for all steps and directions, in float32; ``dims`` are steps and batch."""
    dtype = emitter.dtype(x)
    if dtype not in PROMOTED | {"float32"}:
        node.refuse(f"its elements are {dtype}, and the number of steps, {describe(dims[0])}, is not unrolled")

    def cast(value: relax.Expr, dtype: str) -> relax.Expr:
        return value if emitter.dtype(value) == dtype else emitter.emit(R.astype(value, dtype))

    shape = Recurrence(
        cell=kind.cell,
        features=cells[0].width,
        backward=tuple(cell.backward for cell in cells),
        activations=tuple(cell.activations for cell in cells),
        clip=None if np.isinf(cells[0].clip) else cells[0].clip,
        peephole=cells[0].peephole is not None,
        lengths="" if lengths is None else emitter.dtype(lengths),
        rounded=kind.rounded,
    )
    operands = [cast(_inputs(emitter, node, kind, cell, x), "float32") for cell in cells]
    reason = IN_LOOP.format(describe(dims[0]))
    for number, cell in enumerate(cells):
        operands += _packed(emitter, node, cell, shape, number, reason)
    for extra in ([cell.peephole for cell in cells], [cell.inner_bias for cell in cells]):
        given = [array for array in extra if array is not None]
        operands += [_const(np.stack(given).astype(np.float32))] if given else []
    operands += [] if lengths is None else [lengths]
    operands += [cast(state, "float32") for state in start]
    known_steps, known_batch = (dim if isinstance(dim, int) else None for dim in dims)
    function = emitter.builder.add_func(recurrence(shape, known_steps, known_batch), "recurrence")
    steps, batch = map(as_expr, dims)
    every = [steps, len(cells), batch, shape.features]
    results = [every, *([len(cells), batch, shape.features] for _ in shape.states)]
    types = [relax.TensorType(result, "float32") for result in results]
    made = emitter.emit(relax.call_tir(function, operands, types))
    return [cast(emitter.emit(made[number]), dtype) for number in range(len(types))]


def _packed(emitter: Emitter, node: Node, cell: _Cell, shape: Recurrence, number: int, reason: str) -> list[relax.Expr]:
    """The matrix of a direction's states as the function reads it, by phase."""
    phases = shape.phases(number)
    by_gate = cell.r.astype(np.float32).reshape(shape.features, shape.gates, shape.features)
    packed = []
    for phase, part in zip(phases, ("gates", "candidate"), strict=False):
        names = cell.names[1] if len(phases) == 1 else _part_of(cell.names[1], part)
        matrix = by_gate[:, list(phase.gates)].reshape(shape.features, -1)
        form = pack_recurrent(matrix, len(phase.gates))
        packed.append(emitter.inner_matrix(form, matrix.shape, names, node.proto, reason))
    return packed


def _unrolled(
    emitter: Emitter,
    node: Node,
    kind: _Kind,
    cells: Sequence[_Cell],
    x: relax.Expr,
    steps: int,
    start: Sequence[relax.Expr],
    lengths: relax.Expr | None,
) -> list[relax.Expr]:
    """Every step a product of its own."""
    hidden = []
    last: list[list[relax.Expr]] = [[] for _ in kind.states]
    column = None if lengths is None else emitter.emit(R.expand_dims(lengths, 1))
    for index, cell in enumerate(cells):
        first = [emitter.emit(R.squeeze(window(state, [0], [index], [index + 1]), [0])) for state in start]
        outputs, end = _run(emitter, node, kind, cell, x, first, steps, column)
        hidden.append(emitter.emit(R.stack(outputs[::-1] if cell.backward else outputs, 0)))
        for states, state in zip(last, end, strict=True):
            states.append(state)
    return [R.stack(hidden, 1), *(R.stack(states, 0) for states in last)]


def _run(
    emitter: Emitter,
    node: Node,
    kind: _Kind,
    cell: _Cell,
    x: relax.Expr,
    states: list[relax.Expr],
    steps: int,
    lengths: relax.Expr | None,
) -> tuple[list[relax.Expr], list[relax.Expr]]:
    """Outputs in the order they are computed, and the last states. Beyond a sequence's end its states stay."""
    inputs = _inputs(emitter, node, kind, cell, x)
    outputs = []
    for place in range(steps)[:: -1 if cell.backward else 1]:
        seen = emitter.emit(R.squeeze(emitter.emit(window(inputs, [0], [place], [place + 1])), [0]))
        fresh = kind.step(emitter, node, kind, cell, seen, states)
        output = fresh[0]
        if lengths is not None:
            inside = emitter.emit(R.greater(lengths, relax.const(place, emitter.dtype(lengths))))
            fresh = [emitter.emit(R.where(inside, new, old)) for new, old in zip(fresh, states, strict=True)]
            output = emitter.emit(R.where(inside, output, relax.const(0, emitter.dtype(output))))
        states = fresh
        outputs.append(output)
    return outputs, states


def _inputs(emitter: Emitter, node: Node, kind: _Kind, cell: _Cell, x: relax.Expr) -> relax.Expr:
    """What the inputs add to the gates in all steps, (steps, batch, G * H)."""
    product = emitter.emit(kind.product(emitter, node, x, cell.w, cell.names[0]))
    return emitter.emit(R.add(product, _const(cell.bias)))


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
        bias, inner_bias = outer + inner, None
        if kind.inner_bias:
            bias[-r.shape[2] :], inner_bias = outer[-r.shape[2] :], inner[-r.shape[2] :]
        cells.append(
            _Cell(
                w[i].T,
                r[i].T,
                bias,
                inner_bias,
                None if peephole is None else peephole[i].reshape(3, -1),
                tuple(tuple(f"{n}_reverse" if i else n for n in group) for group in names),  # type: ignore[arg-type]
                backward,
                activations[count * i : count * (i + 1)],
                float(node.attributes.get("clip", 0.0)) or np.inf,
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
