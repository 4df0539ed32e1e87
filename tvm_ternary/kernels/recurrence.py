"""Recurrent layers over any number of steps: ``LSTM``, ``GRU`` and ``RNN``, float32.

What is computed, and where the elements of its operands lie; how is `schedule.cpu.recurrence`. What the inputs add to
the gates is a product for all steps at once, and no part of it. The matrix of the states is: it is multiplied in
float32, for a ternary kernel is a function of its own, which a loop inside a function cannot call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.ir import Expr

RECURRENCE = "tvm_ternary.recurrence"
"""The attribute of a function that is a recurrence: its `Recurrence` as text."""

LANES = 16
"""A block of outputs is a multiple of so many wide."""

_SUMS = 4
"""So many sums of `LANES` elements are under way in a block: as many as the latency of a multiply-add needs."""

Read: TypeAlias = "Callable[[str], Expr]"
"""Gives the element of a named value at the place that is computed."""

Activation: TypeAlias = "Callable[[Expr], Expr]"


@dataclass(frozen=True)
class Phase:
    """A product by the state, and what is made of it.

    Attributes
    ----------
    source : str
        What is multiplied.
    gates : tuple of int
        The gates whose sums are computed.
    updates : tuple of (str, callable)
        In order: a value, and its element from those of others. Values are ``seenG`` and ``keptG``, what input and
        state add to gate G; ``hidden`` and ``memory``, the states; ``peepholeN``; ``inner``, the bias of a product;
        ``output``, which becomes ``hidden`` when the step is done; and any other name for what one phase hands to the
        next.
    """

    source: str
    gates: tuple[int, ...]
    updates: tuple[tuple[str, Callable[[Read], Expr]], ...]


@dataclass(frozen=True)
class Recurrence:
    """A family of layers: the same for any number of steps and any batch.

    Parameters
    ----------
    cell : str
        ``lstm``, ``gru``, ``gru_reset_first`` or ``rnn``; of a GRU, the first applies its reset gate to the product of
        the state and the other to the state. Gates are in ONNX's order, iofc, zrh and one.
    features : int
        Elements H of a state.
    backward : tuple of bool
        For each direction, whether it starts at the last step.
    activations : tuple of tuple of str
        For each direction, the functions f, g and h of ONNX, keys of `ACTIVATIONS`.
    clip : float or None
        Bound of what f and g see.
    peephole : bool
        Whether an LSTM's gates see its memory.
    lengths : str
        The element type of the sequences' lengths; empty where all have all steps.
    rounded : bool
        Whether a state is rounded to 8 bits before it is multiplied, with a scale and a zero point taken from the range
        of each sequence's own.
    """

    cell: str
    features: int
    backward: tuple[bool, ...]
    activations: tuple[tuple[str, ...], ...]
    clip: float | None = None
    peephole: bool = False
    lengths: str = ""
    rounded: bool = False

    @property
    def gates(self) -> int:
        """Gates of a cell."""
        return {"lstm": 4, "rnn": 1}.get(self.cell, 3)

    @property
    def states(self) -> tuple[str, ...]:
        """What is kept from step to step."""
        return ("hidden", "memory") if self.cell == "lstm" else ("hidden",)

    @property
    def inner(self) -> bool:
        """Whether the last gate has a bias that belongs to the product of the state."""
        return self.cell == "gru"

    def phases(self, direction: int) -> tuple[Phase, ...]:
        """A step of a direction: one product, or two where the second needs what is made of the first."""
        build = {"lstm": _lstm, "gru": _gru, "gru_reset_first": _gru_reset_first, "rnn": _rnn}[self.cell]
        first, *others = (ACTIVATIONS[name] for name in self.activations[direction])
        clipped = [self._clipped(function) for function in (first, *others[:1])]
        return build(self, [*clipped, *others[1:]])

    def _clipped(self, function: Activation) -> Activation:
        if self.clip is None:
            return function
        low, high = (tirx.const(sign * self.clip, "float32") for sign in (-1, 1))
        return lambda x: function(tirx.min(tirx.max(x, low), high))

    @property
    def text(self) -> str:
        """What `from_text` reads."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Recurrence:
        """The recurrence that an attribute tells."""
        values = json.loads(text)
        backward, activations = tuple(values.pop("backward")), tuple(map(tuple, values.pop("activations")))
        return cls(backward=backward, activations=activations, **values)


def block_width(features: int, gates: int) -> int:
    """Outputs of a block for each of its gates."""
    return LANES * min(-(-_SUMS // gates), -(-features // LANES))


def pack_recurrent(weight: npt.NDArray[np.float32], gates: int) -> npt.NDArray[np.float32]:
    """Put the columns that a block computes beside each other, so that it reads its weights in a row.

    Parameters
    ----------
    weight : (H, G * H)
        A matrix of the states; of a phase's gates only.
    gates : int
        G.

    Returns
    -------
    (ceil(H / width), H, G, width)
        Column c of gate g in block c // width; zeros behind the last.
    """
    features = len(weight)
    width = block_width(features, gates)
    blocks = -(-features // width)
    padded = np.zeros((features, gates, blocks * width), np.float32)
    padded[:, :, :features] = weight.reshape(features, gates, features)
    return np.ascontiguousarray(padded.reshape(features, gates, blocks, width).transpose(2, 0, 1, 3))


def _softplus(x: Expr) -> Expr:
    zero, one = (tirx.const(value, "float32") for value in (0.0, 1.0))
    return tirx.max(x, zero) + tirx.log(one + tirx.exp(tirx.min(x, zero - x)))


ACTIVATIONS: dict[str, Activation] = {
    "relu": lambda x: tirx.max(x, tirx.const(0.0, "float32")),
    "sigmoid": tirx.sigmoid,
    "softplus": _softplus,
    "tanh": tirx.tanh,
}


# Every function of a sum is a value of its own: nested in each other, they take the compiler minutes.


def _gate(at: Read, index: int) -> Expr:
    return at(f"seen{index}") + at(f"kept{index}")


def _opened(function: Activation, index: int) -> tuple[str, Callable[[Read], Expr]]:
    return f"kept{index}", lambda at: function(_gate(at, index))


def _lstm(shape: Recurrence, functions: Sequence[Activation]) -> tuple[Phase, ...]:
    f, g, h = functions

    def peeking(gate: int, peephole: int) -> tuple[str, Callable[[Read], Expr]]:
        if not shape.peephole:
            return _opened(f, gate)
        return f"kept{gate}", lambda at: f(_gate(at, gate) + at(f"peephole{peephole}") * at("memory"))

    def memory(at: Read) -> Expr:
        return at("kept2") * at("memory") + at("kept0") * at("kept3")

    def output(at: Read) -> Expr:
        return at("kept1") * h(at("memory"))

    before, after = (peeking(0, 0), peeking(2, 2), _opened(g, 3)), peeking(1, 1)
    return (Phase("hidden", (0, 1, 2, 3), (*before, ("memory", memory), after, ("output", output))),)


def _mixed(at: Read, update: str, candidate: str) -> Expr:
    """(1 - z) h' + z h, as h' + z (h - h')."""
    return at(candidate) + at(update) * (at("hidden") - at(candidate))


def _gru(shape: Recurrence, functions: Sequence[Activation]) -> tuple[Phase, ...]:
    f, g = functions

    def candidate(at: Read) -> Expr:
        return g(at("seen2") + at("kept1") * (at("kept2") + at("inner")))

    updates = (_opened(f, 0), _opened(f, 1), ("kept2", candidate), ("output", lambda at: _mixed(at, "kept0", "kept2")))
    return (Phase("hidden", (0, 1, 2), updates),)


def _gru_reset_first(shape: Recurrence, functions: Sequence[Activation]) -> tuple[Phase, ...]:
    f, g = functions
    gates = (("update", lambda at: f(_gate(at, 0))), _opened(f, 1), ("reset", lambda at: at("kept1") * at("hidden")))
    rest = (_opened(g, 2), ("output", lambda at: _mixed(at, "update", "kept2")))
    return (Phase("hidden", (0, 1), gates), Phase("reset", (2,), rest))


def _rnn(shape: Recurrence, functions: Sequence[Activation]) -> tuple[Phase, ...]:
    (f,) = functions
    return (Phase("hidden", (0,), (("output", lambda at: f(_gate(at, 0))),)),)


_FUNCTIONS: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "tanh": np.tanh,
}


def reference_recurrence(
    shape: Recurrence,
    seen: npt.NDArray[np.floating],
    weight: npt.NDArray[np.floating],
    start: Mapping[str, npt.NDArray[np.floating]],
    direction: int = 0,
    peephole: npt.NDArray[np.floating] | None = None,
    inner: npt.NDArray[np.floating] | None = None,
    lengths: npt.NDArray[np.integer] | None = None,
) -> tuple[npt.NDArray[np.float64], dict[str, npt.NDArray[np.float64]]]:
    """One direction by its definition, in float64; states are not rounded.

    Parameters
    ----------
    shape : Recurrence
    seen : (steps, batch, G * H)
        What the inputs add to the gates, biases included.
    weight : (H, G * H)
    start : mapping
        The states before the first step, (batch, H) each.
    direction : int
    peephole : (3, H), optional
        In the order of the gates i, o, f.
    inner : (H,), optional
    lengths : (batch,), optional

    Returns
    -------
    every : (steps, batch, H)
        Zeros behind the end of a sequence.
    last : dict
        The states behind the last step.

    References
    ----------
    ``LSTM``, ``GRU`` and ``RNN`` of the ONNX standard, opset 22.
    """
    f, *others = (_FUNCTIONS[name] for name in shape.activations[direction])
    bound = np.inf if shape.clip is None else shape.clip
    h, c = (start.get(name, np.zeros(())).astype(np.float64) for name in ("hidden", "memory"))
    seen, weight = seen.astype(np.float64), weight.astype(np.float64)
    p_i, p_o, p_f = np.zeros((3, 1)) if peephole is None else peephole.astype(np.float64)
    every = np.zeros((*seen.shape[:2], shape.features))

    def clip(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.clip(x, -bound, bound)

    for step in range(len(seen))[:: -1 if shape.backward[direction] else 1]:
        x = np.split(seen[step], shape.gates, axis=-1)
        r = np.split(h @ weight, shape.gates, axis=-1)
        new_c = c
        if shape.cell == "lstm":
            keep, enter = f(clip(x[2] + r[2] + p_f * c)), f(clip(x[0] + r[0] + p_i * c))
            new_c = keep * c + enter * others[0](clip(x[3] + r[3]))
            new_h = f(clip(x[1] + r[1] + p_o * new_c)) * others[1](new_c)
        elif shape.cell == "rnn":
            new_h = f(clip(x[0] + r[0]))
        else:
            z, reset = f(clip(x[0] + r[0])), f(clip(x[1] + r[1]))
            late = weight[:, 2 * shape.features :]
            product = reset * (r[2] + inner) if shape.cell == "gru" else (reset * h) @ late
            new_h = (1 - z) * others[0](clip(x[2] + product)) + z * h
        active = np.ones((len(h), 1), bool) if lengths is None else (step < lengths)[:, None]
        every[step] = np.where(active, new_h, 0)
        h, c = np.where(active, new_h, h), np.where(active, new_c, c)
    return every, {"hidden": h, "memory": c} if shape.cell == "lstm" else {"hidden": h}
