"""What is known about the values of a tensor, and so which masks are boolean, however they are spelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R

from tests.graph.passes.small_graphs import make_module
from tvm_ternary.graph.passes.dataflow import Dataflow
from tvm_ternary.graph.passes.mask_values import KnownValues, Values, only_hides

Emit = Callable[[relax.Expr], relax.Var]
INF, LOWEST = -np.inf, float(np.finfo(np.float32).min)


def number(value: float, dtype: str = "float32") -> relax.Expr:
    return relax.const(value, dtype)


def seen(emit: Emit, x: relax.Expr) -> relax.Var:
    return emit(R.greater(x, number(0)))


def chosen(emit: Emit, x: relax.Expr, hidden: float, otherwise: float = 0) -> relax.Var:
    return emit(R.where(seen(emit, x), number(otherwise), number(hidden)))


def one_less(emit: Emit, x: relax.Expr, factor: float) -> relax.Var:
    """As exporters have it: (1 - seen) * lowest."""
    return emit(R.multiply(emit(R.subtract(number(1), emit(R.astype(seen(emit, x), "float32")))), number(factor)))


def added(emit: Emit, x: relax.Expr, *hidden: float) -> relax.Var:
    return emit(R.add(*(chosen(emit, x, one) for one in hidden)))


def moved(emit: Emit, x: relax.Expr) -> relax.Var:
    mask = emit(R.broadcast_to(emit(R.expand_dims(chosen(emit, x, INF), [0])), (3, 4, 6)))
    turned = emit(R.permute_dims(mask, [0, 2, 1]))
    return emit(R.concat([turned, emit(R.full((3, 6, 1), number(INF), "float32"))], 2))


def integers(emit: Emit, x: relax.Expr) -> relax.Var:
    return emit(R.astype(emit(R.multiply(emit(R.astype(seen(emit, x), "int64")), number(-7, "int64"))), "float32"))


SPELLINGS: dict[str, tuple[Callable[[Emit, relax.Expr], relax.Expr], set[float] | None]] = {
    "chosen": (lambda emit, x: chosen(emit, x, INF), {0, INF}),
    "chosen the other way": (lambda emit, x: chosen(emit, x, 0, LOWEST), {0, LOWEST}),
    "one less": (lambda emit, x: one_less(emit, x, LOWEST), {0, LOWEST}),
    "of a constant": (lambda emit, x: relax.const(np.triu(np.full((4, 6), INF, np.float32), 1)), {0, INF}),
    "a triangle": (lambda emit, x: emit(R.triu(relax.const(np.full((4, 6), -9, np.float32)), 1)), {0, -9}),
    "two infinities": (lambda emit, x: added(emit, x, INF, INF), {0, INF}),
    "bounded": (
        lambda emit, x: emit(R.maximum(added(emit, x, LOWEST, LOWEST), number(LOWEST))),
        {0, LOWEST},
    ),
    "moved": (moved, {0, INF}),
    "integers": (integers, {0, -7}),
    "two numbers": (lambda emit, x: added(emit, x, -1e4, INF), {0, -1e4, INF}),
    "two lowest overflow": (lambda emit, x: added(emit, x, LOWEST, LOWEST), {0, LOWEST, INF}),
    "integers of floats": (lambda emit, x: emit(R.astype(chosen(emit, x, INF), "int32")), None),
    "large integers": (lambda emit, x: emit(R.where(seen(emit, x), number(2**62, "int64"), number(0, "int64"))), None),
    "another format": (
        lambda emit, x: emit(R.add(emit(R.astype(chosen(emit, x, INF), "bfloat16")), number(0, "bfloat16"))),
        None,
    ),
    "an input": (lambda emit, x: x, None),
    "a sum with an input": (lambda emit, x: emit(R.add(chosen(emit, x, INF), x)), None),
    "many numbers": (lambda emit, x: relax.const(np.arange(24, dtype=np.float32).reshape(4, 6)), None),
}


def known(build: Callable[[Emit, relax.Expr], relax.Expr]) -> Values | None:
    module = make_module({"x": (4, 6)}, {}, lambda emit, x: [emit(R.abs(x)), build(emit, x)])
    main = module["main"]
    (result,) = (b.value.fields[1] for block in main.body.blocks for b in block.bindings if b.var == main.body.body)
    return KnownValues(Dataflow(main)).of(result)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    build, values = SPELLINGS[name]
    got = known(build)
    assert (None if got is None else set(got)) == (None if values is None else set(map(float, map(np.float32, values))))


def test_infinity_times_zero_is_among_them() -> None:
    got = known(lambda emit, x: one_less(emit, x, INF))
    assert got is not None
    assert any(map(np.isnan, got))
    assert only_hides(got) is None


@given(values=st.frozensets(st.sampled_from([0.0, -0.0, -1e4, LOWEST, INF, 5.0, np.nan, np.inf]), max_size=4))
def test_a_mask_that_only_hides_adds_one_negative_number(values: frozenset[float]) -> None:
    others = [value for value in values if value != 0]
    want: Any = others[0] if len(others) == 1 and others[0] < 0 else None
    assert only_hides(values) == want
    assert only_hides(None) is None
