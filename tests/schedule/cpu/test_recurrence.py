"""Recurrent layers: a step is its definition in float64, within a derived bound, and many steps are that many."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedule.cpu.graphs import EPSILON, TIERS, normal
from tvm_ternary.kernels.recurrence import Recurrence, block_width, pack_recurrent, reference_recurrence
from tvm_ternary.schedule.cpu.recurrence import ROWS, recurrence, schedule_recurrence
from tvm_ternary.schedule.cpu.rules import schedule_function
from tvm_ternary.schedule.cpu.simd import simd_of
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import resolve

FUNCTIONS = {"lstm": ("sigmoid", "tanh", "tanh"), "rnn": ("tanh",)}
ACTIVATION = 4e-7
"""Of sigmoid and tanh, as `vector_math` states it."""


def layer(cell: str, features: int = 37, **options: Any) -> Recurrence:
    """Both directions; 37 features are no multiple of any vector."""
    activations = (FUNCTIONS.get(cell, ("sigmoid", "tanh")),) * 2
    return Recurrence(cell, features, (False, True), activations, **options)


LAYERS = {
    "lstm": layer("lstm"),
    "peephole": layer("lstm", peephole=True, clip=0.5),
    "lengths": layer("lstm", lengths="int32"),
    "narrow": layer("lstm", features=3),
    "gru": layer("gru", lengths="int64"),
    "gru_reset_first": layer("gru_reset_first", features=48, clip=0.5),
    "rnn": layer("rnn", features=70, lengths="int32"),
    "forward": replace(layer("lstm"), backward=(False,), activations=(FUNCTIONS["lstm"],)),
}


@cache
def compiled(tier: str, shape: Recurrence, sizes: tuple[int | None, int | None]) -> Any:
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    function = recurrence(shape, *sizes, simd_of(target)).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target, tir_pipeline=TIR_PIPELINE)["main"]


class Case:
    """Operands, and what should come of them."""

    def __init__(self, shape: Recurrence, steps: int, batch: int, seed: int = 0) -> None:
        self.shape, self.steps, self.batch = shape, steps, batch
        ways, features, gates = len(shape.backward), shape.features, shape.gates
        self.seen = [normal(seed + d, steps, batch, gates * features) for d in range(ways)]
        raw = [normal(seed + 5 + d, features, gates * features) for d in range(ways)]
        self.weights = [weight / np.abs(weight).sum(axis=0) for weight in raw]
        self.peephole = normal(seed + 10, ways, 3, features) / 8
        self.inner = normal(seed + 11, ways, features) / 8
        self.lengths = np.random.default_rng(seed).integers(1, steps + 1, batch).astype(shape.lengths or "int32")
        self.start = {name: normal(seed + 12 + i, ways, batch, features) for i, name in enumerate(shape.states)}

    def run(self, tier: str, sizes: tuple[int | None, int | None] = (None, None)) -> list[np.ndarray]:
        """All steps of all directions, and the states behind the last."""
        shape, ways = self.shape, len(self.shape.backward)
        packed = [
            pack_recurrent(columns, len(phase.gates))
            for d, weight in enumerate(self.weights)
            for phase, columns in zip(shape.phases(d), self._by_phase(weight), strict=True)
        ]
        optional = [*self._extra(), (shape.lengths, self.lengths)]
        operands = [*self.seen, *packed, *(array for there, array in optional if there), *self.start.values()]
        state = (ways, self.batch, shape.features)
        outs = [np.full(dims, np.nan, np.float32) for dims in ((self.steps, *state), *[state] * len(shape.states))]
        tensors = [tvm.runtime.tensor(array) for array in (*operands, *outs)]
        compiled(tier, shape, sizes)(*tensors)
        return [tensor.numpy() for tensor in tensors[len(operands) :]]

    def _by_phase(self, weight: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([len(phase.gates) * self.shape.features for phase in self.shape.phases(0)])[:-1]
        return [np.ascontiguousarray(part) for part in np.split(weight, ends, axis=1)]

    def at(self, place: int, states: list[np.ndarray]) -> Case:
        """The step at a place alone, from these states on."""
        one = copy(self)
        one.steps, one.seen = 1, [array[place : place + 1] for array in self.seen]
        one.lengths = (place < self.lengths).astype(self.lengths.dtype)
        one.start = dict(zip(self.shape.states, states, strict=True))
        return one

    def check(self, tier: str) -> None:
        every, *last = self.run(tier)
        for d, backward in enumerate(self.shape.backward):
            states = list(self.start.values())
            for place in range(self.steps)[:: -1 if backward else 1]:
                step = self.at(place, states)
                (made,), *states = step.run(tier)
                step.check_step(d, made[d], [state[d] for state in states])
                assert np.array_equal(every[place, d], made[d])
            assert all(np.array_equal(got[d], state[d]) for got, state in zip(last, states, strict=True))

    def check_step(self, d: int, made: np.ndarray, states: list[np.ndarray]) -> None:
        """One step of a direction; behind a sequence's end it is nothing, and the states stay, to the bit."""
        shape = self.shape
        optional = (self.peephole[d] if shape.peephole else None, self.inner[d])
        lengths = self.lengths if shape.lengths else None
        start = {name: state[d] for name, state in self.start.items()}
        (want,), wanted = reference_recurrence(shape, self.seen[d], self.weights[d], start, d, *optional, lengths)
        for got, expected in zip((made, *states), (want, *wanted.values()), strict=True):
            assert np.abs(got - expected).max() <= self.bound(d)
        for row in np.flatnonzero(self.lengths == 0) if shape.lengths else ():
            assert not made[row].any()
            assert all(np.array_equal(got[row], start[name][row]) for name, got in zip(start, states, strict=True))

    def bound(self, d: int) -> float:
        """What rounding adds in a step, to first order and in the largest norm.

        A sum of H products and of what is added to it is off by H + 4 roundings of its terms' magnitudes; columns of
        the weights add up to 1. Sigmoid has slopes up to 1/4 and tanh up to 1; both are at most 1.
        """

        def largest(array: np.ndarray) -> float:
            return float(np.abs(array[d]).max())

        shape, size = self.shape, max(map(largest, self.start.values()))
        peep, inner = (largest(array) if there else 0.0 for there, array in self._extra())
        total = (shape.features + 4) * EPSILON * (float(np.abs(self.seen[d]).max()) + size + inner + peep * (size + 1))
        gate, fresh = total / 4 + ACTIVATION, total + ACTIVATION
        if shape.cell == "rnn":
            return fresh
        if shape.cell == "lstm":
            memory = (size + 1) * gate + fresh + 4 * EPSILON * (size + 1)
            return max(memory, gate + peep * memory / 4 + memory + ACTIVATION + 2 * EPSILON)
        # The reset gate is a factor of the product, or of what is multiplied.
        return fresh + (size + inner) * gate + (size + 1) * gate + 4 * EPSILON * (size + 1)

    def _extra(self) -> list[tuple[bool, np.ndarray]]:
        return [(self.shape.peephole, self.peephole), (self.shape.inner, self.inner)]


@pytest.mark.parametrize(
    ("tier", "name"),
    [
        *(("avx2", name) for name in LAYERS),
        *(("avx512", name) for name in ("lstm", "gru", "gru_reset_first")),
        *(("portable", name) for name in ("peephole", "narrow", "rnn")),
    ],
    indirect=["tier"],
)
def test_matches(name: str, tier: str) -> None:
    """Whole tiles of sequences, what is left of them, and one step. All layers on one tier; on others those of which
    vectors are full, ragged, or more than there is."""
    for steps, batch in ((5, ROWS + 2), (1, 1)):
        Case(LAYERS[name], steps, batch).check(tier)


@pytest.mark.parametrize("sizes", [(6, 2), (6, None), (None, 2 * ROWS)])
def test_known_sizes(sizes: tuple[int | None, int | None]) -> None:
    """The same sums in the same order; the compiler may contract other products into them."""
    case = Case(LAYERS["lengths"], 6, sizes[1] or 3)
    for got, want in zip(case.run("avx2", sizes), case.run("avx2"), strict=True):
        assert np.abs(got - want).max() <= 6 * case.bound(0)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    steps=st.integers(1, 20),
    batch=st.integers(1, 2 * ROWS + 1),
    seed=st.integers(0, 1000),
)
def test_any_steps_and_batch(name: str, steps: int, batch: int, seed: int) -> None:
    Case(LAYERS[name], steps, batch, seed).check("avx2")


def test_threads_share_sequences_and_directions() -> None:
    """Enough work for all of them."""
    Case(layer("lstm", features=128), 8, 3 * ROWS).check("avx2")


def test_states_that_are_rounded() -> None:
    """What is multiplied has 255 steps between its extremes, so one of them alone is kept as it is."""
    shape = replace(layer("rnn", features=5), backward=(False,), activations=(("relu",),), rounded=True)
    case = Case(shape, 1, 2)
    state = np.array([[[0, 0.5, 1, 255, 3.49], [0, -0.25, 0, 0, 63.5]]], np.float32)
    kept = np.array([[0, 0, 1, 255, 3], [0, -0.25, 0, 0, 63.5]])  # half steps go to even places
    case.start = {"hidden": state}
    every, _ = case.run("avx2")
    want, _ = reference_recurrence(shape, case.seen[0], case.weights[0], {"hidden": kept})
    assert np.abs(every[:, 0] - want).max() <= 16 * EPSILON * 255


@pytest.mark.parametrize(("features", "gates"), [(37, 4), (3, 4), (48, 3), (70, 1)])
def test_packing_holds_every_weight_once(features: int, gates: int) -> None:
    weight = normal(0, features, gates * features)
    packed = pack_recurrent(weight, gates)
    width = block_width(features, gates)
    assert packed.shape == (-(-features // width), features, gates, width)
    columns = packed.transpose(1, 2, 0, 3).reshape(features, gates, -1)
    assert np.array_equal(columns[:, :, :features].reshape(weight.shape), weight)
    assert not columns[:, :, features:].any()


def test_is_written_anew_for_a_target() -> None:
    """Importers write it for any CPU; the rule finds it by its attribute, and all else as it was."""
    wide = simd_of(tvm.target.Target(resolve(TIERS["avx512"]).tvm))
    shape = LAYERS["peephole"]
    assert Recurrence.from_text(shape.text) == shape
    scheduled, source = schedule_function(recurrence(shape, 4, None), wide)
    assert source == "rule:recurrence"
    tvm.ir.assert_structural_equal(scheduled.body, recurrence(shape, 4, None, wide).body, map_free_vars=True)
    other = tvm.tirx.PrimFunc([], tvm.tirx.Evaluate(0))
    assert schedule_recurrence(other, wide) is None
