"""Tables of int8 rows: which, what the graph is then, and that it computes the same but for the rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tests.ternary_matmul import NATIVE
from tvm_ternary.build.executable import build_executable
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.quantize_tables import QuantizedTables, quantize_tables
from tvm_ternary.quantize.tables import quantize_rows
from tvm_ternary.schedule.cpu import schedule_module

from .small_graphs import operators, random

TABLE = random(19, 12)
IDS = np.array([[3, 0, 18], [5, 5, 1]])


def looked_up(build: Callable[..., relax.Expr], *arrays: np.ndarray) -> tuple[tvm.IRModule, dict[str, relax.Expr]]:
    """A module that gives what ``build(emit, ids, *tables)`` does; the tables are named t0, t1..."""
    ids = relax.Var("ids", relax.TensorType([tvm.tirx.Var("batch", "int64"), 3], "int64"))
    tables = [relax.const(array) for array in arrays]
    builder = relax.BlockBuilder()
    with builder.function("main", [ids]):
        with builder.dataflow():
            result = builder.emit_output(build(builder.emit, ids, *tables))
        builder.emit_func_output(result)
    module = builder.get()
    module["main"] = module["main"].with_attr("num_input", 1)
    return module, {f"t{number}": table for number, table in enumerate(tables)}


def passed(build: Callable[..., relax.Expr], *arrays: np.ndarray) -> QuantizedTables:
    module, tables = looked_up(build, *arrays)
    return quantize_tables(module, tables, list(tables))


def run(module: tvm.IRModule, ids: np.ndarray) -> np.ndarray:
    scheduled, _ = schedule_module(lower_graph_ops(module), tvm.target.Target(NATIVE.tvm))
    main = relax.VirtualMachine(build_executable(scheduled, NATIVE.tvm), tvm.cpu())["main"]
    return np.asarray(main(tvm.runtime.tensor(ids)).numpy())


def rounded(table: np.ndarray) -> np.ndarray:
    codes, scale = quantize_rows(table)
    return np.asarray(codes * scale)


@pytest.mark.parametrize("mode", ["nan", "clip", "fast"])
def test_rows_are_the_rounded_ones(mode: str) -> None:
    result = passed(lambda emit, ids, table: op.take(table, ids, 0, mode), TABLE)
    assert list(result.tables) == ["t0.rows", "t0.row_scale"]
    assert {name: str(table.value.dtype) for name, table in result.tables.items()} == {
        "t0.rows": "int8",
        "t0.row_scale": "float32",
    }
    assert result.kept == {}
    assert result.errors["t0"] == pytest.approx(
        np.linalg.norm(rounded(TABLE) - TABLE) / np.linalg.norm(TABLE), rel=1e-5
    )
    np.testing.assert_array_equal(run(result.module, IDS), rounded(TABLE)[IDS])
    # One kernel reads codes and scales.
    assert len(operators(lower_graph_ops(result.module))) == 1


def test_outside_is_what_it_was() -> None:
    ids = np.array([[-1, 19, 2]])
    nan = run(passed(lambda emit, ids, table: op.take(table, ids, 0, "nan"), TABLE).module, ids)
    assert np.isnan(nan[0, :2]).all()
    np.testing.assert_array_equal(nan[0, 2], rounded(TABLE)[2])
    clip = run(passed(lambda emit, ids, table: op.take(table, ids, 0, "clip"), TABLE).module, ids)
    np.testing.assert_array_equal(clip, rounded(TABLE)[[[0, 18, 2]]])


def test_two_uses_are_one_table() -> None:
    def build(emit: Any, ids: Any, table: Any) -> Any:
        other = emit(op.take(table, emit(op.subtract(relax.const(18, "int64"), ids)), 0, "nan"))
        return op.add(emit(op.take(table, ids, 0, "nan")), other)

    result = passed(build, TABLE)
    assert len(result.tables) == 2
    np.testing.assert_allclose(run(result.module, IDS), rounded(TABLE)[IDS] + rounded(TABLE)[18 - IDS], rtol=1e-6)


def with_matmul(emit: Any, ids: Any, table: Any) -> Any:
    return op.matmul(emit(op.take(table, ids, 0, "nan")), emit(op.permute_dims(table)))


@pytest.mark.parametrize(
    ("build", "array", "reason"),
    [
        (with_matmul, TABLE, "a float table that is not read by rows alone"),
        (lambda emit, ids, table: op.take(table, ids, 1, "nan"), TABLE, "a float table that is not read by rows alone"),
        (lambda emit, ids, table: op.take(table, ids, 0), TABLE.astype(np.float16), "a table of float16"),
        (lambda emit, ids, table: op.take(table, ids, 0), TABLE[:, 0].copy(), "a table of float32"),
        (lambda emit, ids, table: op.take(table, ids, 0), TABLE[:15].copy(), "a float table of few rows"),
        (
            lambda emit, ids, table: op.take(table, ids, 0),
            TABLE[:, :1].copy(),
            "a float table whose rows are too short to gain from a scale",
        ),
        (
            lambda emit, ids, table: op.take(table, ids, 0),
            np.where(TABLE > 2, np.inf, TABLE).astype(np.float32),
            "a float table that is not finite",
        ),
    ],
)
def test_what_stays(build: Callable[..., relax.Expr], array: np.ndarray, reason: str) -> None:
    module, tables = looked_up(build, array)
    result = quantize_tables(module, tables, tables)
    assert result.kept == {"t0": reason}
    assert result.tables == tables
    tvm.ir.assert_structural_equal(result.module, module)


def test_only_what_is_named() -> None:
    def build(emit: Any, ids: Any, first: Any, second: Any) -> Any:
        return op.add(emit(op.take(first, ids, 0)), emit(op.take(second, ids, 0)))

    module, tables = looked_up(build, TABLE, TABLE + 1)
    assert list(quantize_tables(module, tables, ["t1"]).tables) == ["t0", "t1.rows", "t1.row_scale"]
