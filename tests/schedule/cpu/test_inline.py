"""Which stages are folded into their readers, and where rows are cut at conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from tests.schedule.cpu.graphs import Build, make_graph, tensor
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.schedule.cpu.inline import read_program
from tvm_ternary.schedule.cpu.nest import static
from tvm_ternary.schedule.cpu.pieces import find_cuts, settle
from tvm_ternary.schedule.cpu.program import CHOICE, Program, calls

op = relax.op


def program_of(build: Build, *inputs: Any) -> Program:
    """The one function of a graph, read."""
    lowered = lower_graph_ops(make_graph(build, *inputs))
    (function,) = (f for _, f in lowered.functions_items() if isinstance(f, tirx.PrimFunc))
    program = read_program(function)
    assert program is not None
    return program


def constants(values: list[Expr]) -> list[int | None]:
    return [static(value) for value in values]


def test_cheap_stages_are_inlined_everywhere() -> None:
    def build(emit: Any, x: Any) -> Any:
        y = emit(op.add(x, relax.const(np.float32(1))))
        return op.multiply(y, emit(op.subtract(y, x)))

    program = program_of(build, tensor(("b", "n")))
    assert len(program.stages) == 1
    assert not program.temporaries


def test_a_function_call_read_in_two_places_is_not_repeated() -> None:
    def build(emit: Any, x: Any) -> Any:
        y = emit(op.exp(x))
        return op.multiply(y, emit(op.permute_dims(y, (1, 0))))

    program = program_of(build, tensor(("n", "n")))
    assert len(program.stages) == 2
    assert calls(program.stages[1].body) == []


def test_a_function_call_read_twice_in_one_place_needs_no_buffer() -> None:
    def build(emit: Any, x: Any) -> Any:
        y = emit(op.exp(x))
        return op.multiply(y, emit(op.add(y, x)))

    assert len(program_of(build, tensor(("b", "n"))).stages) == 1


def test_a_function_call_is_not_repeated_by_a_broadcast() -> None:
    program = program_of(lambda emit, x, y: op.add(emit(op.exp(x)), y), tensor(("b", 1)), tensor(("b", "n")))
    assert len(program.stages) == 2


def test_expressions_do_not_grow_without_bound() -> None:
    """Squared forty times, an expression that is written out would have 2^40 terms."""

    def build(emit: Any, x: Any) -> Any:
        for _ in range(39):
            x = emit(op.multiply(x, x))
        return op.multiply(x, x)

    program = program_of(build, tensor(("b", "n")))
    assert 1 < len(program.stages) < 40


def test_a_mean_is_made_once_a_row() -> None:
    gamma = relax.const(np.ones(8, np.float32))
    program = program_of(lambda emit, x: op.nn.layer_norm(x, gamma, gamma, [-1]), tensor(("b", "n", 8)))
    assert [len(stage.axes) for stage in program.stages] == [3, 2, 3, 3]


def test_padding_stays_out_of_a_reduction() -> None:
    weight = relax.const(np.ones((4, 3, 5), np.float32))
    program = program_of(lambda emit, x: op.nn.conv1d(x, weight, 1, 2), tensor((1, 3, 20)))
    assert len(program.stages) == 2
    assert CHOICE in calls(program.stages[0].body)


def test_reshapes_leave_no_division() -> None:
    def build(emit: Any, x: Any) -> Any:
        batch, length, _ = x.ty.shape
        return op.permute_dims(emit(op.reshape(x, (batch, length, 4, 6))), (0, 2, 1, 3))

    program = program_of(build, tensor((2, 10, 24)))
    assert "//" not in program.stages[0].body.script()
    assert "%" not in program.stages[0].body.script()


@T.prim_func(s_tir=True)
def written_twice(x: T.Buffer((T.int64(8),), "float32"), y: T.Buffer((T.int64(8),), "float32")):
    t = T.sblock_alloc_buffer((T.int64(8),))
    for i in range(T.int64(8)):
        with T.sblock("first"):
            v = T.axis.spatial(T.int64(8), i)
            t[v] = x[v] + T.float32(1)
    for i in range(T.int64(8)):
        with T.sblock("second"):
            v = T.axis.spatial(T.int64(8), i)
            x[v] = T.float32(0)
    for i in range(T.int64(8)):
        with T.sblock("third"):
            v = T.axis.spatial(T.int64(8), i)
            y[v] = t[v]


def test_nothing_moves_past_a_write_to_what_it_reads() -> None:
    program = read_program(written_twice)
    assert program is not None
    assert [stage.name for stage in program.stages] == ["first", "second", "third"]


def test_a_concatenation_is_cut_where_its_parts_meet() -> None:
    inputs = [tensor((2, n)) for n in (3, 5, 7)]
    (stage,) = program_of(lambda emit, *x: op.concat(list(x), 1), *inputs).stages
    assert constants(find_cuts(stage, stage.axes[-1])) == [3, 8]


def test_a_padding_is_cut_at_both_ends() -> None:
    (stage,) = program_of(lambda emit, x: op.nn.pad(x, [0, 0, 3, 5]), tensor((2, 20))).stages
    column = stage.axes[-1]
    assert constants(find_cuts(stage, column)) == [3, 23]
    for low, high in ((0, 3), (3, 23), (23, 28)):
        piece = settle(stage, column, tirx.IntImm("int64", low), tirx.IntImm("int64", high))
        assert calls(piece.body) == []


def test_pieces_of_unknown_length_have_no_condition_left() -> None:
    (stage,) = program_of(lambda emit, x, y: op.concat([x, y], 1), tensor(("b", "n")), tensor(("b", "m"))).stages
    column = stage.axes[-1]
    (cut,) = find_cuts(stage, column)
    for low, high in ((tirx.IntImm("int64", 0), cut), (cut, column.extent)):
        assert calls(settle(stage, column, low, high).body) == []


def test_too_many_pieces_are_not_cut() -> None:
    inputs = [tensor((2, 3)) for _ in range(6)]
    (stage,) = program_of(lambda emit, *x: op.concat(list(x), 1), *inputs).stages
    assert find_cuts(stage, stage.axes[-1]) == []


def test_a_choice_that_does_not_follow_the_axis_is_no_cut() -> None:
    (stage,) = program_of(lambda emit, x, y: op.concat([x, y], 0), tensor((2, 9)), tensor((3, 9))).stages
    assert find_cuts(stage, stage.axes[-1]) == []
    assert constants(find_cuts(stage, stage.axes[0])) == [2]
