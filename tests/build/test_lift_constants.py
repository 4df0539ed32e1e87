"""Large constants become parameters; the model computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import relax as R

from tvm_ternary.build.artifact import build_artifact
from tvm_ternary.build.lift_constants import LARGE, lift_constants
from tvm_ternary.runtime.artifact import read_artifact
from tvm_ternary.runtime.manifest import TensorSpec
from tvm_ternary.runtime.module import load
from tvm_ternary.target import resolve

from . import small_model

TARGET = resolve("native")
LONG: np.ndarray[Any, Any] = np.arange(LARGE // 4, dtype=np.float32)
SHORT = LONG[:-1].copy()


def module_of(*values: np.ndarray[Any, Any]) -> tvm.IRModule:
    """``x + value`` for each value, every constant used twice."""
    x = relax.Var("x", R.Tensor((1,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            constants = [relax.const(value, str(value.dtype)) for value in values]
            sums = [builder.emit(R.add(R.add(x, one), one)) for one in constants]
            result = builder.emit_output(relax.Tuple(sums))
        builder.emit_func_output(result)
    return relax.transform.LegalizeOps()(builder.get())


def test_only_large_constants_are_taken_out_and_once_each() -> None:
    module, constants = lift_constants(module_of(LONG, SHORT, LONG + 1))
    assert [array.tolist() for array in constants.values()] == [LONG.tolist(), (LONG + 1).tolist()]
    main = module["main"]
    assert [var.name for var in main.params] == ["x", *constants]
    assert int(main.attrs["num_input"]) == 1
    kept: list[int] = []
    relax.analysis.post_order_visit(
        main, lambda part: kept.append(int(part.value.shape[0])) if isinstance(part, tvm.ir.GenericConst) else None
    )
    assert set(kept) == {SHORT.size}


def test_the_arrays_are_the_constants_themselves_and_the_module_is_left_as_it_was() -> None:
    before = module_of(LONG)
    text = before.script()
    _, constants = lift_constants(before)
    assert before.script() == text
    found: list[int] = []
    relax.analysis.post_order_visit(
        before["main"],
        lambda part: found.append(part.value.data_ptr()) if isinstance(part, tvm.ir.GenericConst) else None,
    )
    assert {array.ctypes.data for array in constants.values()} == set(found)


def test_nothing_to_take_out() -> None:
    before = module_of(SHORT)
    module, constants = lift_constants(before)
    assert not constants
    tvm.ir.assert_structural_equal(module, before)


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_runs_with_its_constants_behind_its_code(tmp_path: Path, count: int) -> None:
    values = [LONG + number for number in range(count)]
    module, constants = lift_constants(module_of(*values))
    specs = tuple(TensorSpec(f"y{number}", "float32", LONG.shape) for number in range(count))
    manifest = small_model.manifest(TARGET, (TensorSpec("x", "float32", (1,)),), specs)
    path = build_artifact(
        small_model.compiled(module, TARGET), manifest, tmp_path / "model.so", constants, beside=False
    )
    artifact = read_artifact(path)
    assert artifact.elf_bytes < LONG.nbytes < artifact.weights_bytes
    for got, value in zip(load(path).run(None, {"x": np.ones(1, np.float32)}), values, strict=True):
        np.testing.assert_array_equal(got, 1 + value + value)
