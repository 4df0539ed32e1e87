"""Small relax graphs, lowered and scheduled as the compiler does it, and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.schedule.cpu import schedule_module
from tvm_ternary.target import host_features, resolve

# One target for every width of vectors, by the name under which a test reports it.
TIERS: dict[str, str | dict[str, Any]] = {
    "avx512": "x86-64-v4",
    "avx2": "x86-64-v3",
    "portable": {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "x86-64"},
}
Array = NDArray[Any]
Build = Callable[..., Any]
EPSILON = float(np.finfo(np.float32).eps)


def runs_here(tier: str) -> bool:
    """Whether this host has what a tier's code needs."""
    return resolve(TIERS[tier]).features <= host_features()


def tensor(shape: Sequence[int | str], dtype: str = "float32") -> tuple[tuple[int | str, ...], str]:
    """One input of a graph; a string is a dimension known only at run time."""
    return tuple(shape), dtype


def make_graph(build: Build, *inputs: tuple[tuple[int | str, ...], str]) -> tvm.IRModule:
    """A module whose ``main`` returns what ``build(emit, *inputs)`` does."""
    symbols: dict[str, tirx.Var] = {}
    variables = []
    for number, (shape, dtype) in enumerate(inputs):
        sizes = [symbols.setdefault(d, tirx.Var(d, "int64")) if isinstance(d, str) else d for d in shape]
        variables.append(relax.Var(f"x{number}", relax.TensorType(sizes, dtype)))
    builder = relax.BlockBuilder()
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(build(builder.emit, *variables))
        builder.emit_func_output(result)
    return builder.get()


@dataclass(frozen=True)
class Compiled:
    """A graph that runs.

    Parameters
    ----------
    sources : dict of str to str
        Who scheduled each function.
    main : callable
    """

    sources: dict[str, str]
    main: Callable[..., Any]

    def __call__(self, *arrays: Array) -> Any:
        result = self.main(*(tvm.runtime.tensor(np.asarray(array, order="C")) for array in arrays))
        return result.numpy() if hasattr(result, "numpy") else [item.numpy() for item in result]

    @property
    def rules(self) -> set[str]:
        """The rules that answered."""
        return set(self.sources.values())


def compile_module(module: tvm.IRModule, tier: str) -> Compiled:
    """Lower, schedule and build a module for one tier."""
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    scheduled, sources = schedule_module(lower_graph_ops(module), target)
    machine = relax.VirtualMachine(tvm.compile(scheduled, target=target), tvm.cpu())
    return Compiled(sources, machine["main"])


def compile_graph(tier: str, build: Build, *inputs: tuple[tuple[int | str, ...], str]) -> Compiled:
    """`make_graph`, then `compile_module`."""
    return compile_module(make_graph(build, *inputs), tier)


def normal(seed: int, *shape: int) -> Array:
    """Reproducible float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
