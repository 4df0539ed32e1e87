"""Weights that are constants become parameters, each once, and the result stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import tvm
from tvm import relax

from tests.models import gpt2
from tvm_ternary.compiler import compile
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.lift_tables import lift_tables
from tvm_ternary.runtime.module import load

DIMS = {"batch": 2, "length": 5}


def constants(module: tvm.IRModule) -> list[tuple[int, ...]]:
    """Shapes of the constants that are left in ``main``."""
    found = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            found.append(tuple(int(size) for size in expr.value.shape))

    relax.analysis.post_order_visit(module["main"], visit)
    return found


def test_tables_stand_behind_the_matrices() -> None:
    imported = import_onnx(gpt2())
    module, params = lift_tables(imported.module, imported.params, imported.tables)
    names = list(params)
    assert names[: len(imported.params)] == list(imported.params)
    # The output layer is tied to the embedding: the matrix has the name already.
    assert {"transformer.wte.weight.table", "transformer.wpe.weight"} <= set(names)
    assert [var.name for var in module["main"].params][len(imported.inputs) :] == names
    np.testing.assert_array_equal(params["transformer.wte.weight.table"], params["transformer.wte.weight"].T)
    tables = {(50, 32), (24, 32)}
    assert tables <= set(constants(imported.module))
    assert not tables & set(constants(module))


def test_a_table_used_twice_is_one_parameter_and_an_unused_one_none() -> None:
    imported = import_onnx(gpt2())
    table = next(iter(imported.tables.values()))
    _, params = lift_tables(imported.module, imported.params, {"first": table, "none": relax.const(np.ones((3, 3)))})
    assert set(params) == {*imported.params, "first"}


def test_tables_lie_beside_the_library(tmp_path: Path) -> None:
    onnx.save(gpt2(layers=1), tmp_path / "model.onnx")
    inside, beside = (
        compile(tmp_path / "model.onnx", tmp_path / f"{where}.so", scheme="t2a32", weights=where, dims=DIMS)
        for where in ("inside", "beside")
    )
    names = beside.manifest.weights.names
    rows = {"transformer.wte.weight.rows", "transformer.wte.weight.row_scale"}
    assert rows | {"transformer.wpe.weight"} <= set(names)
    assert beside.manifest.sizes == inside.manifest.sizes
    assert beside.manifest.weights.bytes == inside.manifest.weights.bytes
    given = {spec.name: np.ones(spec.shape, spec.dtype) for spec in inside.manifest.inputs}
    for one, other in zip(*(load(a.path).run(None, given) for a in (inside, beside)), strict=True):
        np.testing.assert_array_equal(one, other)
