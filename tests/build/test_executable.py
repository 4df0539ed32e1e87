"""The same module compiles to the same code every time: the pass that orders what TVM writes in the order of a hash."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm.script import tirx as T

from tvm_ternary.build.executable import order_shape_stores
from tvm_ternary.target import resolve

from . import small_model


@T.prim_func(s_tir=True)
def shuffled(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[2] = h[0] * h[1]
    h[5] = h[1] + 1
    h[3] = T.int64(7)


@T.prim_func(s_tir=True)
def in_order(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[2] = h[0] * h[1]
    h[3] = T.int64(7)
    h[4] = h[0] * 16
    h[5] = h[1] + 1


@T.prim_func(s_tir=True)
def chained(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[2] = h[4] + 1


@T.prim_func(s_tir=True)
def written_twice(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[4] = T.int64(7)


@T.prim_func(s_tir=True)
def unknown_place(h: T.Buffer((6,), "int64"), i: T.int64) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[i] = T.int64(7)


@T.prim_func(s_tir=True)
def looped(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[5] = T.int64(1)
    for i in range(4):
        h[i] = T.int64(7)


@T.prim_func(s_tir=True)
def kernel(h: T.Buffer((6,), "int64")) -> None:
    h[4] = T.int64(1)
    h[2] = T.int64(7)


def ordered(function: Any) -> Any:
    return order_shape_stores(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}))["f"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (shuffled, in_order),
        *((same, same) for same in (in_order, chained, written_twice, unknown_place, looped, kernel)),
    ],
    ids=lambda function: function.attrs["global_symbol"],
)
def test_independent_stores_are_put_in_order_and_nothing_else_is_touched(function: Any, expected: Any) -> None:
    tvm.ir.assert_structural_equal(ordered(function), expected.with_attr("global_symbol", "f"))


def test_the_build_pipeline_still_makes_what_the_pass_looks_for() -> None:
    """Should TVM write shape functions in another way, the pass would do nothing and builds would differ again."""
    target = tvm.target.Target(resolve("native").tvm)
    with target:
        lowered = tvm.relax.get_pipeline("default")(small_model.dynamic())
    stored = [int(store.indices[0]) for store in lowered["shape_func"].body.seq]
    after = [int(store.indices[0]) for store in order_shape_stores(lowered)["shape_func"].body.seq]
    assert len(after) > 2
    assert after == sorted(stored)
