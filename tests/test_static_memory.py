"""A run of static shape takes its memory from the runs before it."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import onnx

import tvm_ternary
from tests.models import mlp
from tvm_ternary.runtime.arrays import aligned

ROWS, WIDTH, RUNS = 1024, 1024, 20


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_runs_allocate_nothing_once_warm(tmp_path: Path) -> None:
    source, library = tmp_path / "mlp.onnx", tmp_path / "mlp.so"
    onnx.save(mlp((WIDTH, WIDTH, WIDTH, WIDTH)), source)
    tvm_ternary.compile(source, library, dims={"batch": ROWS}, layers=[])
    module = tvm_ternary.load(library, threads=1)
    (spec,) = module.inputs
    x = aligned(np.ones(spec.shape, np.float32))
    activations = ROWS * WIDTH * 4 // resource.getpagesize()
    for _ in range(3):
        module.run(None, {spec.name: x})
    before = page_faults()
    for _ in range(RUNS):
        module.run(None, {spec.name: x})
    # Fresh memory would be touched page by page in every run.
    assert page_faults() - before < activations
