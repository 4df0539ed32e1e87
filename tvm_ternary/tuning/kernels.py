"""What runs in worker processes for a GPU: building candidates, and timing them here or on an RPC server."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from tvm.s_tir.meta_schedule.arg_info import ArgInfo

from tvm_ternary.build.executable import cuda_source, kernels_as_source
from tvm_ternary.build.link import link
from tvm_ternary.build.nvcc import compile_fatbin
from tvm_ternary.target import Target
from tvm_ternary.tuning.batch.gpu import CACHE_BYTES, Gpu, random_sets, random_values, time_in_turns
from tvm_ternary.tuning.rpc import Tracker
from tvm_ternary.tuning.task import Realize
from tvm_ternary.tuning.workers import RUN_SECONDS, Argument, Effort, Library, load_library

_ENTRY = "main"
# A launch and the clearing of the cache before it take a tenth of a millisecond.
_REPEATS = 4


def build_kernel(realize: Realize, module: tvm.IRModule, target: Target, path: str) -> Library:
    """Schedule a workload by its annotations, and make a library of it."""
    return Library(path, build_kernels(realize, [module], [_ENTRY], target, path))


def build_kernels(
    realize: Realize, modules: Sequence[tvm.IRModule], names: Sequence[str], target: Target, path: str
) -> tuple[Argument, ...]:
    """Make one library of several candidates of a task.

    Parameters
    ----------
    realize : callable
    modules : sequence of IRModule
        The annotated workloads.
    names : sequence of str
        What the candidates' functions are to be called.
    target : Target
        Of one GPU architecture. Neither the GPU nor a driver is needed.
    path : str
        The library to write.

    Returns
    -------
    tuple of Argument
        What each of the functions takes.
    """
    scheduled = [realize(module)["main"] for module in modules]
    named = {name: func.with_attr("global_symbol", name) for name, func in zip(names, scheduled, strict=True)}
    with kernels_as_source():
        executable = tvm.compile(tvm.IRModule(named), tvm.target.Target(target.tvm))
    source = cuda_source(executable)
    assert source is not None, "a scheduled matmul has a kernel"
    link(executable, target.tvm, Path(path), compile_fatbin(source, target.archs).fatbin)
    arrays = ArgInfo.from_prim_func(scheduled[0])
    return tuple((tuple(int(extent) for extent in array.shape), str(array.dtype)) for array in arrays)


def time_kernels(tracker: Tracker | None, libraries: Sequence[Library], arch: str, effort: Effort) -> list[list[float]]:
    """Time candidates of one task in turns on a GPU; see `tvm_ternary.tuning.workers.time_libraries`.

    The cache holds nothing of the inputs at first, since a layer finds there what the others have left. On a server
    that takes a pause before each launch, so that times there contain some microseconds of the launch itself.
    """
    if tracker is not None:
        return _time_remotely(tracker, libraries, arch, effort)
    gpu = Gpu(Path(libraries[0].path).parent)
    inputs = [{"shape": shape, "dtype": dtype} for shape, dtype in libraries[0].arguments]
    functions = [gpu.function(Path(library.path), _ENTRY) for library in libraries]
    return time_in_turns(gpu, functions, random_sets(gpu, inputs), effort.rounds, effort.milliseconds)


def _time_remotely(tracker: Tracker, libraries: Sequence[Library], arch: str, effort: Effort) -> list[list[float]]:
    session = tracker.session(RUN_SECONDS)
    device = _device(session, arch)
    loaded = [load_library(session, library.path) for library in libraries]
    arguments = [_array(*argument, device) for argument in libraries[0].arguments]
    repeats = _REPEATS * effort.milliseconds
    timers = [
        module.time_evaluator(_ENTRY, device, number=1, repeat=repeats, cache_flush_bytes=CACHE_BYTES)
        for module in loaded
    ]
    times: list[list[float]] = [[] for _ in libraries]
    for _ in range(effort.rounds):
        for timer, seconds in zip(timers, times, strict=True):
            seconds.append(statistics.median(map(float, timer(*arguments).results)))
    return times


def _array(shape: tuple[int, ...], dtype: str, device: Any) -> tvm.runtime.Tensor:
    values = random_values({"shape": shape, "dtype": dtype}, np.random.default_rng(0))
    if dtype == "bfloat16":
        values = values.view(np.dtype(ml_dtypes.bfloat16))
    return tvm.runtime.tensor(values, device=device)


def check_gpu_server(tracker: Tracker, arch: str) -> None:
    """Connect to a server and see that it has a GPU of an architecture."""
    _device(tracker.session(RUN_SECONDS), arch)


def _device(session: Any, arch: str) -> Any:
    device = session.cuda()
    if not device.exist:
        raise RuntimeError("no GPU, or a TVM that cannot use it")
    found = "sm_" + str(device.compute_version).replace(".", "")
    if found != arch:
        raise RuntimeError(f"its GPU is {found}, expected {arch}")
    return device
