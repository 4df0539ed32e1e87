"""What runs inside a worker: TVM with its CUDA runtime, on the fake driver."""

import ctypes
import functools
import json
import os
import sys
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from . import fake_gpu, toolchain
from .worker import COUNTERS, main_loop

CHECKED, ARCHITECTURE = sys.argv[1] == "1", int(sys.argv[2])


@tvm_ffi.register_global_func("tvm_callback_cuda_compile", override=True)
def _compile_kernels(source: str) -> bytes:
    """Stands where nvcc would: the "image" names a library of emulated kernels."""
    library = toolchain.kernel_library(source, checked=CHECKED, architecture=ARCHITECTURE)
    return f"TT_EMULATED:{library}\0".encode()


@functools.lru_cache(maxsize=64)
def _compiled(module: str, target: str, config: str) -> Any:
    """Arguments are JSON, which can be hashed."""
    aimed = tvm.target.Target(json.loads(target))
    with aimed, tvm.transform.PassContext(config=json.loads(config)):
        return tvm.compile(tvm.ir.load_json(module), target=aimed)


def _is_relax(executable: Any) -> bool:
    return isinstance(executable, relax.VMExecutable)


def _flat(value: Any) -> list[np.ndarray]:
    if value is None:
        return []
    if isinstance(value, tvm.runtime.Tensor):
        return [value.numpy()]
    return [array for element in value for array in _flat(element)]


def _on_device(kind: str, value: Any, device: Any) -> Any:
    if kind == "number":
        return value
    if kind == "out":
        return tvm.runtime.empty(value.shape, str(value.dtype), device)
    return tvm.runtime.tensor(value, device)


def run(module: str, target: str, config: str, entry: str, args: list[tuple[str, Any]], seed: int) -> Any:
    """Outputs, arrays to copy back (None for inputs), counters."""
    executable = _compiled(module, target, config)
    device = tvm.cuda(0)
    _emulator().tt_emu_set_seed(ctypes.c_uint64(seed))
    placed = [_on_device(kind, value, device) for kind, value in args]
    fake_gpu.reset_counters()
    if _is_relax(executable):
        # Each storage is a buffer of its own, of its own size: what lies behind it is no memory.
        outputs = relax.VirtualMachine(executable, device, memory_cfg="naive")[entry](*placed)
    else:
        outputs = executable[entry](*placed)
    device.sync()
    counted = fake_gpu.counters(COUNTERS)
    written = [a.numpy() if kind in ("out", "in_out") else None for (kind, _), a in zip(args, placed, strict=True)]
    return _flat(outputs), written, counted


def source(module: str, target: str, config: str) -> str:
    """The CUDA sources of a module."""
    executable = _compiled(module, target, config)
    found: list[str] = []

    def visit(node: Any) -> None:
        if node.kind == "cuda":
            found.append(node.inspect_source())
        for imported in node.imports:
            visit(imported)

    visit(executable.mod)
    return "\n".join(found)


@functools.cache
def _emulator() -> ctypes.CDLL:
    return ctypes.CDLL(str(toolchain.emulator_library()))


def main() -> None:
    """Answer on what was standard output, and let everything that prints go to standard error."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    main_loop({"run": run, "source": source}, (sys.stdin.buffer, sink))


if __name__ == "__main__":
    main()
