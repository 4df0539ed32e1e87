"""Run an imported model and its file side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx.reference import ReferenceEvaluator
from tvm import relax

from tvm_ternary.graph.importer import ImportedModel, import_onnx


class Compiled:
    """An imported model compiled for this machine without any schedule: slow, but right.

    ``level`` is LLVM's optimization level: with 0 a small model is compiled in half the time.
    """

    def __init__(self, imported: ImportedModel, level: int = 0) -> None:
        self.imported = imported
        executable = tvm.compile(imported.module, tvm.target.Target({"kind": "llvm", "opt-level": level}))
        self.main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        self.weights = [tvm.runtime.tensor(array) for array in imported.params.values()]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run on inputs by name; outputs in order."""
        inputs = [tvm.runtime.tensor(np.require(feeds[spec.name], requirements="C")) for spec in self.imported.inputs]
        return [output.numpy() for output in self.main(*inputs, *self.weights)]


def run_onnxruntime(source: Path | onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The same by onnxruntime, without its optimizations; feeds that are no inputs are left out."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    model = str(source) if isinstance(source, Path) else source.SerializeToString()
    session = onnxruntime.InferenceSession(model, options)
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


def run_reference(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The same by the onnx package's reference implementation, which knows the newest operators."""
    return ReferenceEvaluator(model).run(None, {value.name: feeds[value.name] for value in model.graph.input})


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The norm of the difference over the norm of what is wanted; infinite and NaN elements have to be the same."""
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return float("inf")
    got, want = got[finite], want[finite]
    difference = np.linalg.norm(got.astype(np.float64).ravel() - want.astype(np.float64).ravel())
    return float(difference / max(np.linalg.norm(want.astype(np.float64).ravel()), np.finfo(np.float64).tiny))


def assert_matches(
    source: Path | onnx.ModelProto,
    cases: Sequence[Mapping[str, np.ndarray]],
    tolerance: float = 1e-5,
    run: Callable[..., list[np.ndarray]] = run_onnxruntime,
    **options: Any,
) -> ImportedModel:
    """Import once, run on every case, compare with another: dtypes, shapes, integers exactly, floats by norm."""
    imported = import_onnx(source, **options)
    compiled = Compiled(imported)
    for feeds in cases:
        expected = run(source, feeds)
        got = compiled(feeds)
        assert len(got) == len(expected) == len(imported.outputs)
        for spec, ours, theirs in zip(imported.outputs, got, expected, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), spec.name
            if theirs.dtype.kind == "f":
                assert relative_error(ours, theirs) <= tolerance, spec.name
            else:
                np.testing.assert_array_equal(ours, theirs, err_msg=spec.name)
    return imported


def weight_products(imported: ImportedModel) -> dict[str, int]:
    """How often every matrix stands on the right of a ``matmul``; fails where one is used in any other way."""
    counts: dict[str, int] = {}
    names = set(imported.params)

    def visit(call: relax.Expr) -> None:
        if not isinstance(call, relax.Call):
            return
        used = [arg.name for arg in call.args if isinstance(arg, relax.Var) and arg.name in names]
        for name in used:
            assert call.op.name == "relax.matmul", f"{name} is used by {call.op}"
            assert call.args[1].name == name, f"{name} is not the right factor"
            counts[name] = counts.get(name, 0) + 1

    relax.analysis.post_order_visit(imported.module["main"], visit)
    return counts
