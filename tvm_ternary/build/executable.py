"""Compile a Relax module to an executable, the same one every time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import TensorLoad

from tvm_ternary.errors import OptionError
from tvm_ternary.schedule.lowering import TIR_PIPELINE

# TVM reads this variable when it makes the module of the kernels. The environment belongs to all threads.
_FALLBACK = "TVM_COMPILE_FORCE_FALLBACK"
_ENVIRONMENT = threading.RLock()


def build_executable(
    module: tvm.IRModule, target: Mapping[str, Any], *, cuda_graph: bool = False
) -> relax.VMExecutable:
    """Compile a module whose functions are scheduled, by TVM's own build pipeline.

    The options of the surrounding `tvm.transform.PassContext` hold.

    Parameters
    ----------
    module : tvm.IRModule
        Relax ``main`` and the TensorIR functions it calls.
    target : mapping
        What `tvm.target.Target` takes: `tvm_ternary.target.Target.tvm`.
    cuda_graph : bool
        Launch what has a static shape as a CUDA graph, recorded in the first run. For a CPU it means nothing.

    Returns
    -------
    tvm.relax.VMExecutable
        For ``cuda`` with the kernels as source (`cuda_source`), whether this host has a GPU or not. It cannot be run:
        `tvm_ternary.build.nvcc.compile_fatbin` and `tvm_ternary.build.link.link` make a library of it.

    Raises
    ------
    OptionError
        If a kernel needs more shared memory than the target's ``max_shared_memory_per_block``.
    """
    if target["kind"] == "cuda":
        return _build_cuda(module, target, cuda_graph)
    return _build(module, target, TIR_PIPELINE)


def cuda_source(executable: relax.VMExecutable) -> str | None:
    """The CUDA source of an executable's kernels, the same text in every process; None where there is none."""
    source = [str(module.inspect_source("cuda")) for module in _modules(executable.mod) if module.kind == "cuda"]
    if len(source) > 1:
        raise ValueError(f"the executable has {len(source)} CUDA modules; expected one")
    return source[0] if source else None


def _build(module: tvm.IRModule, target: Mapping[str, Any], tir_pipeline: str = "default") -> relax.VMExecutable:
    # For a GPU, too: TVM's own choice there would look for libraries to call and schedule what has no schedule yet.
    default = relax.get_pipeline("default")
    tvm_target = tvm.target.Target(dict(target))
    return relax.build(
        module,
        tvm_target,
        relax_pipeline=lambda lowered: order_shape_stores(default(lowered)),
        tir_pipeline=tir_pipeline,
    )


def _build_cuda(module: tvm.IRModule, target: Mapping[str, Any], cuda_graph: bool) -> relax.VMExecutable:
    outer = tvm.transform.PassContext.current()
    shared = _SharedMemory()
    context = tvm.transform.PassContext(
        opt_level=outer.opt_level,
        required_pass=outer.required_pass,
        disabled_pass=outer.disabled_pass,
        instruments=[*(outer.instruments or ()), shared],
        config={**outer.config, "relax.backend.use_cuda_graph": cuda_graph},
    )
    with kernels_as_source(), context:
        executable = _build(module, target)
    most = int(target["max_shared_memory_per_block"])
    for kernel, size in shared.sizes.items():
        if size > most:
            problem = f"needs {size} bytes of shared memory a block; there are {most} at most"
            raise OptionError(f"kernel {kernel}", problem, "choose smaller tiles or fewer stages")
    return executable


@contextmanager
def kernels_as_source() -> Iterator[None]:
    """Make TVM keep kernels as source, as it does where there is no driver; with one it would compile them for it."""
    with _ENVIRONMENT:
        before = os.environ.get(_FALLBACK)
        os.environ[_FALLBACK] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_FALLBACK]
            else:
                os.environ[_FALLBACK] = before


@tvm.instrument.pass_instrument
class _SharedMemory:
    """Notes the shared memory of each kernel, in bytes a block, once TVM has laid it out.

    What is asked for at launch stands in no machine code, and too much of it would be found only on the GPU.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
        if info.name != "tirx.SplitHostDevice":
            return
        for name, function in module.functions.items():
            if "tirx.kernel_launch_params" in (function.attrs or {}):
                self.sizes[name.name_hint] = _shared_bytes(function)


def _shared_bytes(kernel: tirx.PrimFunc) -> int:
    buffers: list[Any] = []
    tvm_ffi.structural_walk(kernel.body, (tirx.AllocBuffer, lambda allocation: buffers.append(allocation.buffer)))
    shared = [buffer for buffer in buffers if buffer.scope() in ("shared", "shared.dyn")]
    return sum(prod(map(int, buffer.shape)) * tvm.DataType(buffer.dtype).itemsize for buffer in shared)


def _modules(root: Any) -> list[Any]:
    return [root, *(found for child in root.imports for found in _modules(child))]


def order_shape_stores(module: tvm.IRModule) -> tvm.IRModule:
    """Put the stores of every function that computes shapes in the order of their indices.

    TVM's VMShapeLower writes them in the order of a hash of addresses, another one in every process, and with it the
    library's bytes would vary. The stores are independent, so their order is free.
    """
    updated = tvm.IRModule(module.functions, attrs=module.attrs)
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and "tirx.is_host_func" in (function.attrs or {}):
            updated.update_func(name, function.with_body(_ordered(function.body)))
    return updated


def _ordered(body: tirx.Stmt) -> tirx.Stmt:
    """Give the same stores by index, or the body itself where it is anything but independent stores to known places."""
    if not isinstance(body, tirx.SeqStmt) or not all(isinstance(part, tirx.BufferStore) for part in body.seq):
        return body
    loads: list[TensorLoad] = []
    tvm_ffi.structural_walk(body, (TensorLoad, loads.append))
    if not all(_is_constant(access) for access in (*body.seq, *loads)):
        return body
    by_index = {int(store.indices[0]): store for store in body.seq}
    if len(by_index) < len(body.seq) or by_index.keys() & {int(load.indices[0]) for load in loads}:
        return body
    return tirx.SeqStmt([by_index[index] for index in sorted(by_index)])


def _is_constant(access: tirx.BufferStore | TensorLoad) -> bool:
    return len(access.indices) == 1 and isinstance(access.indices[0], tirx.IntImm)
