"""Recurrent layers on a CPU: one function for all steps, whose states stay in the cache from one to the next.

A tile is up to four sequences of one direction. A step multiplies their states by the matrix, which is packed so that a
block of outputs reads what it needs of it in a row: the sums of all gates of a block stay in registers while the
inputs run, each element of a state broadcast to whole vectors of weights. Then the gates, and the new states, are made
of the sums at once, before the next block.

Sequences and directions are independent, and shared among threads; steps are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import BufferStore, IfThenElse, PrimFunc, Select, Stmt, Var

from tvm_ternary.kernels.recurrence import RECURRENCE, Phase, Recurrence, block_width
from tvm_ternary.schedule.cpu.attention.operands import ZERO, across, buffer, tiles, vectors, zeros
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space, static
from tvm_ternary.schedule.cpu.simd import BASELINE, Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math

ROWS = 4
"""Sequences of a tile at most: they share what is read of the matrix."""

_OPAQUE = 8  # what FuseOps leaves alone


def recurrence(shape: Recurrence, steps: int | None, batch: int | None, simd: Simd = BASELINE) -> PrimFunc:
    """The function of a layer.

    Its arguments are, in order: what the inputs add to the gates, (steps, batch, G * H), for each direction; for each
    direction the packed matrix of each phase; (D, 3, H) peepholes and (D, H) inner biases, where there are some;
    (batch,) lengths, where there are some; the states before the first step, (D, batch, H) each; the outputs of all
    steps (steps, D, batch, H), and the states behind the last.

    Parameters
    ----------
    shape : Recurrence
    steps, batch : int or None
        None where it is known at run time.
    simd : Simd
        By default what every CPU has: importers do not know the target, and `schedule_recurrence` does.

    Returns
    -------
    PrimFunc
        All float32 but the lengths. It carries the attribute by which `recurrence_of` knows it.
    """
    extents = (
        Var(name, "int64") if given is None else index(given) for name, given in (("steps", steps), ("batch", batch))
    )
    on = _Operands(shape, simd, *extents)
    function = PrimFunc([*on.inputs, *on.outputs], scope("root", _by_rows(on)))
    function = function.with_attr("tirx.noalias", True).with_attr("op_pattern", _OPAQUE)
    return expand_vector_math(function.with_attr(RECURRENCE, shape.text))


def schedule_recurrence(func: PrimFunc, simd: Simd) -> PrimFunc | None:
    """Write a function that `recurrence` made for a target.

    Returns
    -------
    PrimFunc or None
        None where it is no recurrence.
    """
    if RECURRENCE not in func.attrs:
        return None
    steps, batch, _ = func.params[0].shape
    return recurrence(Recurrence.from_text(str(func.attrs[RECURRENCE])), static(steps), static(batch), simd)


@dataclass(frozen=True)
class _Operands:
    """The arguments by what they are."""

    shape: Recurrence
    simd: Simd
    steps: Expr
    batch: Expr

    @property
    def directions(self) -> int:
        return len(self.shape.backward)

    @cached_property
    def seen(self) -> list[Var]:
        width = self.shape.gates * self.shape.features
        return [self._operand(f"seen{d}", self.steps, self.batch, width) for d in range(self.directions)]

    @cached_property
    def weights(self) -> list[list[Var]]:
        """By direction and phase."""
        return [
            [self._weight(f"weight{d}_{number}", len(phase.gates)) for number, phase in enumerate(self.shape.phases(d))]
            for d in range(self.directions)
        ]

    @cached_property
    def peephole(self) -> Var:
        return self._operand("peephole", self.directions, 3, self.shape.features)

    @cached_property
    def inner(self) -> Var:
        return self._operand("inner", self.directions, self.shape.features)

    @cached_property
    def lengths(self) -> Var:
        return self._operand("lengths", self.batch, dtype=self.shape.lengths)

    @cached_property
    def start(self) -> dict[str, Var]:
        return {name: self._state(f"first_{name}") for name in self.shape.states}

    @cached_property
    def every(self) -> Var:
        return self._operand("every", self.steps, self.directions, self.batch, self.shape.features)

    @cached_property
    def last(self) -> dict[str, Var]:
        return {name: self._state(f"last_{name}") for name in self.shape.states}

    @property
    def inputs(self) -> list[Var]:
        shape = self.shape
        optional = [(shape.peephole, "peephole"), (shape.inner, "inner"), (shape.lengths, "lengths")]
        given = [getattr(self, name) for there, name in optional if there]
        weights = [weight for phases in self.weights for weight in phases]
        return [*self.seen, *weights, *given, *self.start.values()]

    @property
    def outputs(self) -> list[Var]:
        return [self.every, *self.last.values()]

    def _operand(self, name: str, *extents: int | Expr, dtype: str = "float32") -> Var:
        return tirx.decl_buffer([index(extent) for extent in extents], dtype, name)

    def _state(self, name: str) -> Var:
        return self._operand(name, self.directions, self.batch, self.shape.features)

    def _weight(self, name: str, gates: int) -> Var:
        features, width = self.shape.features, block_width(self.shape.features, gates)
        return self._operand(name, -(-features // width), features, gates, width)


def _by_rows(on: _Operands) -> Stmt:
    """All directions and tiles of sequences."""
    shape, batch = on.shape, static(on.batch)
    rows = _rows(on) if batch is None else min(_rows(on), batch)
    work = on.steps * (rows * shape.features * shape.features * shape.gates)

    def tile(direction: int, first: Expr) -> Stmt:
        whole = _Tile(on, direction, first, rows).write()
        if rows == 1 or (batch is not None and batch % rows == 0):
            return whole
        rest = loop(on.batch - first, lambda row: _Tile(on, direction, first + row, 1).write(), name="row")
        return IfThenElse(first + rows <= on.batch, whole, rest)

    def body(at: list[Expr]) -> Stmt:
        direction, number = at
        forward = tile(0, number * rows)
        if on.directions == 1:
            return forward
        return IfThenElse(tirx.EQ(direction, index(0)), forward, tile(1, number * rows))

    return space([index(on.directions), tiles(on.batch, rows)], work, body)


def _rows(on: _Operands) -> int:
    """As many sequences as have room for their sums in three quarters of the registers."""
    gates = max(len(phase.gates) for phase in on.shape.phases(0))
    sums = gates * block_width(on.shape.features, gates) // on.simd.lanes("float32")
    return min(max(on.simd.registers * 3 // 4 // sums, 1), ROWS)


class _Tile:
    """``rows`` sequences of a direction, from ``first`` on."""

    def __init__(self, on: _Operands, direction: int, first: Expr, rows: int) -> None:
        self.on, self.shape, self.direction, self.first, self.rows = on, on.shape, direction, first, rows
        self.phases = self.shape.phases(direction)
        made = [name for phase in self.phases for name, _ in phase.updates if not name.startswith("kept")]
        names = dict.fromkeys([*self.shape.states, *made, *(["rounded"] if self.shape.rounded else [])])
        self.values = {name: buffer(name, rows, self.shape.features) for name in names}

    def write(self) -> Stmt:
        """All steps."""
        steps, d = self.on.steps, self.direction

        def load(name: str, row: int) -> Stmt:
            source = self.on.start[name]
            return self._each(lambda j: BufferStore(self.values[name], source[d, self.first + row, j], [row, j]))

        def store(name: str, row: int) -> Stmt:
            goal = self.on.last[name]
            return self._each(lambda j: BufferStore(goal, self.values[name][row, j], [d, self.first + row, j]))

        def step(number: Expr) -> Stmt:
            return self._step(steps - 1 - number if self.shape.backward[d] else number)

        every = [(name, row) for name in self.shape.states for row in range(self.rows)]
        loads, stores = ([move(name, row) for name, row in every] for move in (load, store))
        return scope("sequences", sequence(loads, loop(steps, step, name="step"), stores), list(self.values.values()))

    def _step(self, place: Expr) -> Stmt:
        return sequence(
            *(self._phase(number, phase, place) for number, phase in enumerate(self.phases)),
            [self._finish(row, place) for row in range(self.rows)],
        )

    def _each(self, write: Callable[[Expr], Stmt]) -> Stmt:
        """A statement for every element of a state, in vectors and what is left one by one."""
        features, lanes = self.shape.features, self.on.simd.lanes("float32")
        whole = features // lanes
        parts = [loop(whole, lambda n: vectors(lanes, lanes, lambda c: write(n * lanes + c)), name="part")]
        rest = features - whole * lanes
        tail = [loop(rest, lambda c: write(whole * lanes + c), name="rest")] if rest else []
        return sequence(parts if whole else [], tail)

    def _if_active(self, row: int, place: Expr, yes: Stmt, no: Stmt | None = None) -> Stmt:
        """What is done within a sequence, and behind its end."""
        if not self.shape.lengths:
            return yes
        length = tirx.Cast("int64", self.on.lengths[self.first + row])
        return IfThenElse(place < length, yes, no)

    def _finish(self, row: int, place: Expr) -> Stmt:
        at = [place, index(self.direction), self.first + row]
        output, hidden, every = self.values["output"], self.values["hidden"], self.on.every

        def hand_on(j: Expr) -> Stmt:
            return sequence(
                BufferStore(every, output[row, j], [*at, j]),
                BufferStore(hidden, output[row, j], [row, j]),
            )

        nothing = self._each(lambda j: BufferStore(every, ZERO, [*at, j])) if self.shape.lengths else None
        return self._if_active(row, place, self._each(hand_on), nothing)

    def _phase(self, number: int, phase: Phase, place: Expr) -> Stmt:
        features = self.shape.features
        width = block_width(features, len(phase.gates))
        whole, rest = divmod(features, width)
        weight = self.on.weights[self.direction][number]
        source = "rounded" if self.shape.rounded else phase.source

        def block(n: Expr, count: int) -> Stmt:
            return _Block(self, phase, weight, self.values[source], place, n, count).write()

        rounding = [self._round(phase.source, row) for row in range(self.rows)] if self.shape.rounded else []
        parts = [loop(whole, lambda n: block(n, width), name="block")] if whole else []
        return sequence(rounding, parts, [block(index(whole), rest)] if rest else [])

    def _round(self, name: str, row: int) -> Stmt:
        """A state as it comes back from 8 bits with a scale and zero point of its own; zero has a place among them."""
        lanes, state = self.on.simd.lanes("float32"), self.values[name]
        low, high, scale, origin = (buffer(n, lanes) for n in ("low", "high", "scale", "origin"))

        def widen(j: Expr) -> Stmt:
            lane = tirx.floormod(j, index(lanes))
            return sequence(
                BufferStore(low, tirx.min(low[lane], state[row, j]), [lane]),
                BufferStore(high, tirx.max(high[lane], state[row, j]), [lane]),
            )

        def rounded(j: Expr) -> Stmt:
            place = tirx.nearbyint(state[row, j] / scale[0]) + origin[0]
            limited = tirx.min(tirx.max(place, ZERO), tirx.const(255.0, "float32"))
            return BufferStore(self.values["rounded"], (limited - origin[0]) * scale[0], [row, j])

        spread = (high[0] - low[0]) / tirx.const(255.0, "float32")
        body = sequence(
            zeros([low, high], lanes),
            self._each(widen),
            across(low, lanes, tirx.min),
            across(high, lanes, tirx.max),
            BufferStore(scale, Select(tirx.EQ(spread, ZERO), tirx.const(1.0, "float32"), spread), [0]),
            BufferStore(origin, tirx.nearbyint((ZERO - low[0]) / scale[0]), [0]),
            self._each(rounded),
        )
        return scope("rounding", body, [low, high, scale, origin])


@dataclass(frozen=True)
class _Block:
    """Outputs ``n * width .. n * width + count`` of all gates of a phase."""

    tile: _Tile
    phase: Phase
    weight: Var
    source: Var
    place: Expr
    n: Expr
    count: int

    @cached_property
    def sums(self) -> list[dict[int, Var]]:
        """By row and gate."""
        width = int(self.weight.shape[3])
        return [
            {gate: buffer(f"kept{gate}_{row}", width) for gate in self.phase.gates} for row in range(self.tile.rows)
        ]

    def write(self) -> Stmt:
        width = int(self.weight.shape[3])
        lanes = min(self.tile.on.simd.lanes("float32"), width)
        every = [acc for sums in self.sums for acc in sums.values()]

        def element(k: Expr) -> Stmt:
            def one(row: int, slot: int, acc: Var) -> Stmt:
                def at(c: Expr) -> Stmt:
                    return BufferStore(acc, acc[c] + self.source[row, k] * self.weight[self.n, k, slot, c], [c])

                return vectors(width, lanes, at)

            pairs = [(row, sums) for row, sums in enumerate(self.sums)]
            return sequence([one(row, slot, acc) for row, sums in pairs for slot, acc in enumerate(sums.values())])

        product = loop(self.tile.shape.features, element, name="k")
        updates = [self._update(row, lanes) for row in range(self.tile.rows)]
        return scope("block", sequence(zeros(every, lanes), product, updates), every)

    def _update(self, row: int, lanes: int) -> Stmt:
        def one(name: str, value: Callable[[Callable[[str], Expr]], Expr]) -> Stmt:
            def write(c: Expr) -> Stmt:
                goal, at = self._target(name, row, c)
                return BufferStore(goal, value(lambda other: self._read(other, row, c)), at)

            whole = self.count // lanes * lanes
            rest = self.count - whole
            parts = [vectors(whole, lanes, write)] if whole else []
            return sequence(parts, [loop(rest, lambda c: write(whole + c), name="rest")] if rest else [])

        body = sequence([one(name, value) for name, value in self.phase.updates])
        return self.tile._if_active(row, self.place, body)

    def _target(self, name: str, row: int, c: Expr) -> tuple[Var, list[Expr]]:
        if name.startswith("kept"):
            return self.sums[row][int(name.removeprefix("kept"))], [c]
        return self.tile.values[name], [index(row), self._output(c)]

    def _output(self, c: Expr) -> Expr:
        return self.n * int(self.weight.shape[3]) + c

    def _read(self, name: str, row: int, c: Expr) -> Expr:
        on, d, j = self.tile.on, self.tile.direction, self._output(c)
        if name.startswith("seen"):
            gate = int(name.removeprefix("seen"))
            return on.seen[d][self.place, self.tile.first + row, gate * self.tile.shape.features + j]
        if name.startswith("peephole"):
            return on.peephole[d, int(name.removeprefix("peephole")), j]
        if name == "inner":
            return on.inner[d, j]
        goal, at = self._target(name, row, c)
        return goal[tuple(at)]
