"""A small artifact for GPUs; as a program, builds it in a process of its own and writes its CUDA source beside."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import tvm
from tvm import relax
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.build.small_model import manifest
from tvm_ternary.build.artifact import append_manifest
from tvm_ternary.build.executable import build_executable, cuda_source
from tvm_ternary.build.link import link
from tvm_ternary.build.nvcc import compile_fatbin
from tvm_ternary.build.weights import write_weights
from tvm_ternary.runtime.manifest import TargetInfo, TensorSpec
from tvm_ternary.target import resolve

LENGTH = 256
OFFSET = np.arange(LENGTH, dtype=np.float32)
FACTOR = np.float32(3) + np.arange(LENGTH, dtype=np.float32) % 5


@T.prim_func(s_tir=True)
def scaled(
    x: T.Buffer((LENGTH,), "float32"), f: T.Buffer((LENGTH,), "float32"), o: T.Buffer((LENGTH,), "float32"),
    y: T.Buffer((LENGTH,), "float32"),
) -> None:  # fmt: skip
    """``y = x * f + o``, a thread an element."""
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
    for block in T.thread_binding(LENGTH // 64, thread="blockIdx.x"):
        for thread in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("y"):
                i = T.axis.spatial(LENGTH, block * 64 + thread)
                y[i] = x[i] * f[i] + o[i]


def model() -> tvm.IRModule:
    """``y = x * factor + offset``; the factor is a parameter (it lies beside), the offset a constant (it lies inside).

    Gives y, x as it is and the factor.
    """
    x, factor = (relax.Var(name, R.Tensor((LENGTH,), "float32")) for name in ("x", "factor"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, factor]):
        kernel = builder.add_func(scaled, "scaled")
        with builder.dataflow():
            call = relax.call_tir(kernel, relax.Tuple([x, factor, relax.const(OFFSET)]), R.Tensor((LENGTH,), "float32"))
            result = builder.emit_output(relax.Tuple([builder.emit(call), x, factor]))
        builder.emit_func_output(result)
    return builder.get()


def build(folder: Path, target_name: str) -> None:
    """Write model.so, model.safetensors and model.cu."""
    target = resolve(target_name)
    executable = build_executable(model(), target.tvm)
    source = cuda_source(executable)
    assert source is not None
    code = compile_fatbin(source, target.archs)
    link(executable, target.tvm, folder / "model.so", code.fatbin)
    (folder / "model.cu").write_text(source)
    info = write_weights(folder / "model.safetensors", {"factor": FACTOR})
    specs = [TensorSpec(name, "float32", (LENGTH,)) for name in ("y", "same", "factor")]
    made = TargetInfo(target.name, target.tvm, (), "cuda", target.archs, target.archs[-1], "13.0")
    plain = manifest(resolve("x86-64-v2"), [TensorSpec("x", "float32", (LENGTH,))], specs)
    append_manifest(folder / "model.so", replace(plain, target=made, weights=replace(info, file="model.safetensors")))


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2])
