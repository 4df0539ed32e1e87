"""A small model for GPUs; as a program, builds its library in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_ternary.build.executable import build_executable, cuda_source
from tvm_ternary.build.link import link
from tvm_ternary.build.nvcc import compile_fatbin
from tvm_ternary.target import resolve

KERNELS = ("reverse", *(f"reverse_{i}" for i in range(1, 6)))
WEIGHTS = np.arange(1000, dtype=np.float32)


@T.prim_func(s_tir=True)
def reverse(x: T.Buffer((1024,), "float32"), y: T.Buffer((1024,), "float32")) -> None:
    """Turn each run of 128 numbers round, through static shared memory, and double them."""
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
    staged = T.sblock_alloc_buffer((1024,), "float32", scope="shared")
    for block in T.thread_binding(8, thread="blockIdx.x"):
        for thread in T.thread_binding(128, thread="threadIdx.x"):
            with T.sblock("stage"):
                i = T.axis.spatial(1024, block * 128 + thread)
                staged[i] = x[i]
        for thread in T.thread_binding(128, thread="threadIdx.x"):
            with T.sblock("reverse"):
                b, t = T.axis.remap("SS", [block, thread])
                y[b * 128 + t] = staged[b * 128 + 127 - t] * T.float32(2)


def static(kernels: tuple[str, ...] = KERNELS) -> tvm.IRModule:
    """The kernels one after another, and constants; every shape is known."""
    x = relax.Var("x", R.Tensor((1024,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        names = [builder.add_func(reverse.with_attr("global_symbol", name), name) for name in kernels]
        with builder.dataflow():
            y = x
            for name in names:
                y = builder.emit(relax.call_tir(name, relax.Tuple([y]), R.Tensor((1024,), "float32")))
            result = builder.emit_output(relax.Tuple([y, relax.const(WEIGHTS)]))
        builder.emit_func_output(result)
    return builder.get()


def staged(size: int) -> tvm.IRModule:
    """A kernel that asks for ``size`` floats of shared memory at launch, beside 1 KiB of static one."""

    @T.prim_func(s_tir=True)
    def turn(x: T.Buffer((size,), "float32"), y: T.Buffer((size,), "float32")) -> None:
        T.func_attr({"tirx.is_scheduled": True})
        dynamic = T.sblock_alloc_buffer((size,), "float32", scope="shared.dyn")
        fixed = T.sblock_alloc_buffer((256,), "float32", scope="shared")
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(256, thread="threadIdx.x"):
                with T.sblock("fix"):
                    t = T.axis.spatial(256, thread)
                    fixed[t] = x[t]
            for thread in T.thread_binding(256, thread="threadIdx.x"):
                for step in range(size // 256):
                    with T.sblock("stage"):
                        i = T.axis.spatial(size, step * 256 + thread)
                        dynamic[i] = x[i]
            for thread in T.thread_binding(256, thread="threadIdx.x"):
                for step in range(size // 256):
                    with T.sblock("turn"):
                        i = T.axis.spatial(size, step * 256 + thread)
                        y[i] = dynamic[size - 1 - i] + fixed[255 - i % 256]

    x = relax.Var("x", R.Tensor((size,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        name = builder.add_func(turn, "turn")
        with builder.dataflow():
            call = relax.call_tir(name, relax.Tuple([x]), R.Tensor((size,), "float32"))
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    return builder.get()


def build(target: str, output: Path) -> Any:
    """Write the library of `static` and give what nvcc made."""
    resolved = resolve(target)
    executable = build_executable(static(), resolved.tvm, cuda_graph=True)
    source = cuda_source(executable)
    assert source is not None
    code = compile_fatbin(source, resolved.archs)
    link(executable, resolved.tvm, output, code.fatbin)
    return code


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
