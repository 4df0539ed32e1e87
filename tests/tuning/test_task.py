"""Decisions become annotations by way of a MetaSchedule trace, and come back from it."""

from __future__ import annotations

import json

import pytest
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Trace
from tvm_ffi import structural_equal

from tvm_ternary.schedule.records import trace_decisions
from tvm_ternary.tuning.search import decisions_of
from tvm_ternary.tuning.task import decided_schedule, schedule_function, space_size, trace_json

from .toy import Toy, realize

POINTS = [(1, 8), (4, 16), (2, 8)]


@pytest.mark.parametrize("point", POINTS)
def test_a_decided_schedule_tells_what_was_decided(point: tuple[int, int]) -> None:
    toy = Toy()
    schedule = decided_schedule(toy.workload(), toy.space, point)
    assert decisions_of(schedule.trace) == point
    text = json.dumps(trace_json(schedule.trace))
    assert trace_decisions(json.loads(text)) == dict(zip(("rows", "columns"), point, strict=True))
    again = Schedule(toy.workload())
    Trace.apply_json_to_schedule(json.loads(text), again)
    assert structural_equal(again.mod, schedule.mod)


def test_sampling_leaves_the_trace_that_deciding_does() -> None:
    toy = Toy()
    sampled = Schedule(toy.workload(), seed=7)
    schedule_function(toy.space)(sampled)
    point = decisions_of(sampled.trace)
    assert trace_json(sampled.trace) == trace_json(decided_schedule(toy.workload(), toy.space, point).trace)


def test_decisions_change_the_code_and_not_the_workload() -> None:
    toy = Toy()
    modules = [realize(decided_schedule(toy.workload(), toy.space, point).mod) for point in POINTS]
    assert not structural_equal(modules[0], modules[1])
    assert structural_equal(toy.workload(), toy.workload())


def test_a_decision_that_is_no_candidate_is_refused() -> None:
    toy = Toy()
    with pytest.raises(ValueError, match="not in tuple"):
        decided_schedule(toy.workload(), toy.space, (3, 8))


def test_the_size_of_a_space() -> None:
    assert space_size(Toy()) == 6
