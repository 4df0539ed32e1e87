"""Small Relax modules in the form the importer gives: ``main`` takes inputs, then matrices as named parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tests.ternary_matmul import NATIVE
from tvm_ternary.build.executable import build_executable
from tvm_ternary.formats import Scheme
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.ternarize import TernaryLayer, TernaryModule, ternarize
from tvm_ternary.quantize import quantize
from tvm_ternary.schedule.cpu import schedule_module

Array = npt.NDArray[Any]
Build = Callable[..., Sequence[relax.Expr]]


def random(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Reproducible float32 values."""
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def make_module(inputs: Mapping[str, Sequence[int | str]], params: Mapping[str, Array], build: Build) -> tvm.IRModule:
    """A module whose ``main`` returns what ``build(emit, **variables)`` does; a string is a symbolic dimension."""
    symbols: dict[str, Any] = {}

    def size(dim: int | str) -> Any:
        return symbols.setdefault(dim, tvm.tirx.Var(dim, "int64")) if isinstance(dim, str) else dim

    shapes = {name: [size(dim) for dim in shape] for name, shape in inputs.items()}
    shapes |= {name: list(array.shape) for name, array in params.items()}
    variables = {name: relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items()}
    builder = relax.BlockBuilder()
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple(list(build(builder.emit, **variables))))
        builder.emit_func_output(result)
    module = builder.get()
    module["main"] = module["main"].with_attr("num_input", len(inputs))
    return module


def quantized(params: Mapping[str, Array], schemes: Mapping[str, str]) -> dict[str, TernaryLayer]:
    """The layers of a plan: matrices (K, N) by name, each with its scheme."""
    return {
        name: TernaryLayer(quantize(params[name].T, scheme), Scheme.parse(scheme).activation_bits)
        for name, scheme in schemes.items()
    }


def make_ternary(module: tvm.IRModule, params: Mapping[str, Array], schemes: Mapping[str, str]) -> TernaryModule:
    """The pass on the module, for this host."""
    return ternarize(module, params, quantized(params, schemes), NATIVE)


def compiled(ternary: TernaryModule) -> Callable[..., list[Array]]:
    """Lower, schedule and build what the pass made; the result takes the inputs and passes the parameters along."""
    module, _ = schedule_module(lower_graph_ops(ternary.module), tvm.target.Target(NATIVE.tvm))
    main = relax.VirtualMachine(build_executable(module, NATIVE.tvm), tvm.cpu())["main"]
    params = list(map(tvm.runtime.tensor, ternary.params.values()))
    return lambda *inputs: [out.numpy() for out in main(*map(tvm.runtime.tensor, inputs), *params)]


def bindings(module: tvm.IRModule) -> Iterator[tuple[relax.Var, relax.Expr]]:
    """Every variable of ``main`` and its value."""
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def operators(module: tvm.IRModule) -> list[str]:
    """What ``main`` calls, in order: names of Relax operators, or of functions called by ``call_tir``."""
    names = []
    for _, value in bindings(module):
        if isinstance(value, relax.Call):
            tir = value.op == tvm.ir.Op.get("relax.call_tir")
            names.append(value.args[0].name_hint if tir else value.op.name.removeprefix("relax."))
    return names


def operands(module: tvm.IRModule, function: str) -> list[list[relax.Expr]]:
    """The arguments of each ``call_tir`` of functions whose names begin so."""
    return [
        list(value.args[1].fields)
        for _, value in bindings(module)
        if isinstance(value, relax.Call)
        and value.op == tvm.ir.Op.get("relax.call_tir")
        and value.args[0].name_hint.startswith(function)
    ]
