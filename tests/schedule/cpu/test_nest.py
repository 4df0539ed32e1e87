"""The helpers that write loops: every element once, in range, whatever the lengths."""

from __future__ import annotations

import pytest
from tvm import tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import Evaluate, For, ForKind, IfThenElse, IntImm, SeqStmt, Stmt, Var

from tvm_ternary.schedule.cpu.nest import (
    PARALLEL_MIN_WORK,
    TASK_WORK,
    TYPICAL_DYNAMIC,
    decompose,
    fit_lanes,
    index,
    loop,
    product,
    sequence,
    space,
    static,
    strips,
    substitute,
    typical,
)


def value(expression: Expr, at: dict[Var, int]) -> int:
    """An index expression with numbers put in."""
    result = static(Analyzer().simplify(substitute(expression, {var: IntImm("int64", i) for var, i in at.items()})))
    assert result is not None
    return result


def visited(stmt: Stmt, at: dict[Var, int]) -> list[list[int]]:
    """Run loops and branches of a statement; its leaves are calls whose arguments are recorded."""
    if isinstance(stmt, SeqStmt):
        return [row for child in stmt.seq for row in visited(child, at)]
    if isinstance(stmt, IfThenElse):
        branch = stmt.then_case if value(stmt.condition, at) else stmt.else_case
        return visited(branch, at) if branch is not None else []
    if isinstance(stmt, For):
        return [row for i in range(value(stmt.extent, at)) for row in visited(stmt.body, {**at, stmt.loop_var: i})]
    return [[value(argument, at) for argument in stmt.value.args[1:]]]


def record(*arguments: Expr | int) -> Stmt:
    return Evaluate(tirx.call_extern("int32", "record", *arguments))


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("known", [True, False])
def test_strips_do_each_element_once(lanes: int, known: bool) -> None:
    size = Var("n", "int64")
    for n in range(0, 50):

        def body(base: Expr, width: int, stale: Expr | None) -> Stmt:
            return record(base, width, index(0) if stale is None else stale)

        stmt = sequence(strips(n if known else size, lanes, body))
        seen: list[int] = []
        for base, width, stale in visited(stmt, {size: n}):
            assert 0 <= base <= base + width <= n
            seen.extend(range(base + stale, base + width))
        assert sorted(seen) == list(range(n))


@pytest.mark.parametrize(("extent", "lanes"), [(0, 1), (1, 1), (2, 2), (3, 2), (15, 8), (16, 16), (1000, 16)])
def test_fit_lanes(extent: int, lanes: int) -> None:
    assert fit_lanes(extent, 16) == lanes
    assert fit_lanes(Var("n", "int64"), 16) == 16


def test_decompose_is_row_major() -> None:
    flat, size = Var("i", "int64"), Var("n", "int64")
    indices = decompose(flat, [2, size, 1, 3])
    seen = [[value(i, {flat: at, size: 4}) for i in indices] for at in range(24)]
    assert seen == [[a, b, 0, c] for a in range(2) for b in range(4) for c in range(3)]


@pytest.mark.parametrize("work", [1, 1 << 12, 1 << 16])
@pytest.mark.parametrize("known", [True, False])
def test_space_visits_every_point_once(work: int, known: bool) -> None:
    size = Var("n", "int64")
    for n in (0, 1, 3, 16):
        stmt = space([2, n if known else size, 5], work, lambda i: record(*i))
        seen = sorted(visited(stmt, {size: n}))
        assert seen == [[a, b, c] for a in range(2) for b in range(n) for c in range(5)]


def test_only_enough_work_wakes_other_threads() -> None:
    few = space([4, 8], 10, lambda i: record(*i))
    many = space([64, 64], PARALLEL_MIN_WORK // 64, lambda i: record(*i))
    unknown = space([Var("n", "int64"), 64], 1 << 12, lambda i: record(*i))
    assert isinstance(few, For)
    assert few.kind == ForKind.SERIAL
    assert isinstance(many, For)
    assert many.kind == ForKind.PARALLEL
    assert isinstance(unknown, IfThenElse)
    assert isinstance(space([Var("n", "int64")], 1, lambda i: record(*i)), IfThenElse)
    assert unknown.then_case.kind == ForKind.PARALLEL
    assert unknown.else_case.kind == ForKind.SERIAL


def test_each_variable_of_an_amount_counts() -> None:
    n, m, counts = Var("n", "int64"), Var("m", "int32"), tirx.decl_buffer([index(1)], "int64", "counts")
    many = TYPICAL_DYNAMIC
    assert [typical(one) for one in (0, index(7), n, m)] == [1, 7, many, many]
    assert typical((n * 64 + m.astype("int64")) * 1000) == 65000 * many
    assert typical(n * n * 3) == 3 * many * many
    # However little it would be, it may be more.
    assert typical(tirx.floordiv(n + 31, index(32))) == typical(n - 100) == many
    assert typical(counts[0]) == many
    assert typical(counts[0].astype("int64") * 1000 + n) == 1001 * many


def tasks_of(stmt: Stmt, at: dict[Var, int]) -> int:
    """How many tasks the parallel loop of a guarded nest has."""
    assert isinstance(stmt, IfThenElse)
    assert stmt.then_case.kind == ForKind.PARALLEL
    return value(stmt.then_case.extent, at)


def test_open_work_makes_tasks_of_all_axes() -> None:
    """As a step over a cache: open extents, of which the first is one, and work that grows with an open length."""
    batch, tiles, keys = (Var(name, "int64") for name in ("batch", "tiles", "keys"))
    extents = [batch, index(8), tirx.floordiv(tiles + 3, index(4))]
    at = {batch: 1, tiles: 4, keys: 4096}
    assert tasks_of(space(extents, keys * 512, lambda i: record(*i)), at) == 8
    # A variable alone is too little: the last axis stays a loop.
    assert tasks_of(space([batch, index(8), index(5)], keys, lambda i: record(*i)), at) == 1


@pytest.mark.parametrize(("work", "tasks"), [(TASK_WORK // 64 - 1, 3), (TASK_WORK // 64 + 1, 3 * 100)])
def test_tasks_carry_no_more_than_they_should(work: int, tasks: int) -> None:
    n = Var("n", "int64")
    assert tasks_of(space([3, n], work, lambda i: record(*i)), {n: 100}) == tasks


def test_one_task_wakes_nobody() -> None:
    batch = Var("batch", "int64")
    alone = space([1], PARALLEL_MIN_WORK, lambda i: record(*i))
    assert isinstance(alone, Evaluate)
    stmt = space([batch], PARALLEL_MIN_WORK, lambda i: record(*i))
    assert isinstance(stmt, IfThenElse)
    assert [value(stmt.condition, {batch: n}) for n in (0, 1, 2)] == [0, 0, 1]


def test_a_loop_of_one_is_its_body() -> None:
    assert isinstance(loop(1, lambda i: record(i)), Evaluate)


def test_product_folds_constants() -> None:
    assert static(product([2, index(3), 4])) == 24
    assert static(product([])) == 1
