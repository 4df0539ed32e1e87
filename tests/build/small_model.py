"""Small Relax models and their manifests; as a program, builds them all into a folder, in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_ternary.build.artifact import build_artifact
from tvm_ternary.build.executable import build_executable
from tvm_ternary.build.weights import describe_weights
from tvm_ternary.runtime.manifest import (
    FunctionInfo,
    LayerInfo,
    Manifest,
    ModelInfo,
    SizesInfo,
    TargetInfo,
    TensorSpec,
    WeightsInfo,
)
from tvm_ternary.target import Target, resolve

TABLE: npt.NDArray[np.float32] = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
WEIGHTS = {"table": TABLE, "flag": np.array([True, False])}
IDS = TensorSpec("ids", "int64", ("batch", "n"))
X = TensorSpec("x", "float32", ("batch", 4))
OUTPUTS = (
    TensorSpec("y", "float32", ("batch", 3)),
    TensorSpec("same", "int64", ("batch", "n")),
    TensorSpec("table", "float32", (4, 3)),
)
PROBE_LENGTH = 64


def dynamic(beside: bool = False) -> tvm.IRModule:
    """``y = (x + sum(ids)) @ table``, ``ids`` and ``table`` as they are; the table a constant or a parameter."""
    batch, n = tvm.tirx.Var("batch", "int64"), tvm.tirx.Var("n", "int64")
    ids = relax.Var("ids", R.Tensor((batch, n), "int64"))
    x = relax.Var("x", R.Tensor((batch, 4), "float32"))
    table = relax.Var("table", R.Tensor((4, 3), "float32")) if beside else relax.const(TABLE)
    flag = relax.Var("flag", R.Tensor((2,), "bool"))
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, x, table, flag] if beside else [ids, x]):
        with builder.dataflow():
            total = builder.emit(R.sum(R.astype(ids, "float32"), axis=1, keepdims=True))
            product = builder.emit(R.matmul(R.add(x, total), table))
            result = builder.emit_output(relax.Tuple([product, ids, table]))
        builder.emit_func_output(result)
    return builder.get()


def reference(ids: npt.NDArray[np.int64], x: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
    """What `dynamic` computes, in numpy."""
    return [(x + ids.sum(axis=1, keepdims=True).astype(np.float32)) @ TABLE, ids, TABLE]


def probe() -> tvm.IRModule:
    """A parallel loop that notes, for each iteration, the number of the thread that ran it."""

    @T.prim_func(s_tir=True)
    def thread_numbers(out: T.Buffer((PROBE_LENGTH,), "int32")) -> None:
        for i in T.parallel(PROBE_LENGTH):
            out[i] = T.call_extern("int32", "gettid")

    builder = relax.BlockBuilder()
    with builder.function("main", []):
        kernel = builder.add_func(thread_numbers, "thread_numbers")
        with builder.dataflow():
            call = relax.call_tir(kernel, relax.Tuple([]), R.Tensor((PROBE_LENGTH,), "int32"))
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    return builder.get()


def addresses() -> tvm.IRModule:
    """A model that tells where an input and a weight lie in memory; llabs takes a pointer as the number it is."""

    @T.prim_func(s_tir=True)
    def tell(x: T.Buffer((3,), "float32"), w: T.Buffer((3,), "float32"), out: T.Buffer((2,), "int64")) -> None:
        out[0] = T.call_extern("int64", "llabs", x.data)
        out[1] = T.call_extern("int64", "llabs", w.data)

    x, w = relax.Var("x", R.Tensor((3,), "float32")), relax.Var("w", R.Tensor((3,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        kernel = builder.add_func(tell, "tell")
        with builder.dataflow():
            result = builder.emit_output(relax.call_tir(kernel, relax.Tuple([x, w]), R.Tensor((2,), "int64")))
        builder.emit_func_output(result)
    return builder.get()


def picky() -> tvm.IRModule:
    """A model that takes any length by its signature and refuses all but 3 when it runs."""
    batch, n = tvm.tirx.Var("batch", "int64"), tvm.tirx.Var("n", "int64")
    ids = relax.Var("ids", R.Tensor((batch, n), "int64"))
    builder = relax.BlockBuilder()
    with builder.function("main", [ids]):
        with builder.dataflow():
            cast = builder.match_cast(ids, R.Tensor((batch, 3), "int64"))
            result = builder.emit_output(R.add(cast, cast))
        builder.emit_func_output(result)
    return builder.get()


def manifest(target: Target, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Manifest:
    """A manifest in which every field holds something."""
    described: WeightsInfo = describe_weights({"table": TABLE})
    return Manifest(
        model=ModelInfo("small", "small.onnx", "ab" * 32),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        bounds={},
        scheme="t2a8g128",
        layers=(LayerInfo("table", (3, 4), "float32", None, 32.0, None, None, "rule", None, "too small"),),
        functions=(FunctionInfo("matmul", None, "rule", ("table",)),),
        target=TargetInfo(target.name, target.tvm, tuple(sorted(target.features))),
        versions={"tvm_ternary": "0.1.0", "apache-tvm": tvm.__version__},
        weights=described,
        sizes=SizesInfo(48, 48),
    )


def compiled(module: tvm.IRModule, target: Target) -> Any:
    """The executable of a module."""
    return build_executable(module, target.tvm)


def build_all(folder: Path, target: Target) -> None:
    """Build every model above.

    The weights of inside.so are in its code, those of mapped.so and far.so behind it, and those of beside.so and
    addresses.so in files of their own.
    """
    signature = manifest(target, (IDS, X), OUTPUTS)
    build_artifact(compiled(dynamic(), target), signature, folder / "inside.so")
    build_artifact(compiled(dynamic(beside=True), target), signature, folder / "beside.so", WEIGHTS)
    build_artifact(compiled(dynamic(beside=True), target), signature, folder / "mapped.so", WEIGHTS, beside=False)
    numbers = TensorSpec("numbers", "int32", (PROBE_LENGTH,))
    build_artifact(compiled(probe(), target), manifest(target, (), (numbers,)), folder / "probe.so")
    places = manifest(target, (TensorSpec("x", "float32", (3,)),), (TensorSpec("places", "int64", (2,)),))
    weights = {"w": np.zeros(3, np.float32)}
    build_artifact(compiled(addresses(), target), places, folder / "addresses.so", weights)
    build_artifact(compiled(addresses(), target), places, folder / "far.so", weights, beside=False)
    doubled = TensorSpec("doubled", "int64", ("batch", 3))
    build_artifact(compiled(picky(), target), manifest(target, (IDS,), (doubled,)), folder / "picky.so")


if __name__ == "__main__":
    build_all(Path(sys.argv[1]), resolve(sys.argv[2]))
