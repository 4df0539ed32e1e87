"""Run a model in float on this machine, segment by segment, compiled in process by the rules that libraries are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import relax
from tvm_ffi import structural_equal, structural_hash

from tvm_ternary.build.executable import build_executable
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.cut import Segment
from tvm_ternary.runtime.threads import ComputeThread, thread_count
from tvm_ternary.schedule.cpu import schedule_module
from tvm_ternary.target import resolve


class SegmentRunner:
    """Compiles segments and runs them; equal ones, as the blocks of a transformer are, compile once.

    Parameters
    ----------
    threads : int, optional
        None: one for every core.

    Attributes
    ----------
    compiled, runs : int
        How many segments were compiled, and how often one ran.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.compiled = self.runs = 0
        self._thread = ComputeThread(tvm_ffi, thread_count(threads))
        self._target = resolve("native")
        self._cache: dict[int, list[tuple[tvm.IRModule, Any]]] = {}

    def run(
        self, segment: Segment, dimensions: Sequence[int], values: Sequence[Any], weights: Sequence[Any]
    ) -> list[Any]:
        """Run a segment.

        Parameters
        ----------
        segment : Segment
        dimensions : sequence of int
            Values of the model's symbolic dimensions.
        values, weights : sequence of tvm.runtime.Tensor
            What lives before it, and its matrices (K, N); both in the segment's order.

        Returns
        -------
        list
            Its outputs; a tensor, or for a tuple a sequence of tensors.
        """
        function = self._function(segment.module)
        self.runs += 1
        shape = tvm_ffi.Shape(tuple(dimensions))
        return list(self._thread.call(function, shape, *values, *weights, *segment.constants))

    def _function(self, module: tvm.IRModule) -> Any:
        # The hash is of the structure: names of variables are not in it.
        same_hash = self._cache.setdefault(structural_hash(module), [])
        for known, function in same_hash:
            if structural_equal(known, module):
                return function
        same_hash.append((module, self._thread.call(self._compile, module)))
        return same_hash[-1][1]

    def _compile(self, module: tvm.IRModule) -> Any:
        self.compiled += 1
        lowered, _ = schedule_module(lower_graph_ops(module), tvm.target.Target(self._target.tvm))
        executable = build_executable(lowered, self._target.tvm)
        # TVM's pool would keep a buffer of every size that any segment ever asked for.
        return relax.VirtualMachine(executable, tvm.cpu(), memory_cfg="naive")["main"]


def to_tensors(arrays: Mapping[str, npt.NDArray[Any]], names: Sequence[str]) -> list[Any]:
    """Copy arrays to where the runner wants them."""
    return [tvm.runtime.tensor(np.ascontiguousarray(arrays[name])) for name in names]
