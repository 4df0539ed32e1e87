"""CUDA kernels on the CPU: generated CUDA C++ compiled by g++ against a shim, its threads run and watched one by one.

There need be no GPU, no driver and no nvcc. What runs is the source that TVM generates; device helpers have a branch
``#if defined(TVM_TERNARY_EMULATED)`` with their meaning in C++, in which they may call what `native/emulator.h` and
`native/cuda_shim.h` declare (matrix products of a warp, asynchronous copies, packed halves).

>>> kernels = compile(module.inspect_source(), checked=True)
>>> y = np.empty((m, n), np.float32)
>>> kernels.launch("matmul_kernel", grid=(n // 64, m // 16), block=128, dynamic_shared_bytes=0, args=[Out(y), x, w, m])

Threads of a block take turns: a warp runs until all its lanes wait or have ended, then the next one does. Found always:
accesses outside of an array (guard pages), writes to an input, an output that is not written wholly, lanes that miss
at a collective or threads at a barrier, a launch beyond the device's limits. Shared memory is poison (NaN) when a block
starts, and so is the target of an asynchronous copy until it is waited for. With ``checked=True`` every access is
watched, and also found: races in shared memory (two threads, one byte, no barrier between), two threads that write one
byte of global memory, reads of what nothing wrote, misaligned vectors.

What differs from a GPU: floats are not contracted to fused multiply-adds, approximate intrinsics (``__expf``) are
exact, ``(int)x`` of a float beyond the integers is undefined (``__float2int_rn`` saturates), and matrix products add in
order of k.

Whole modules run in a `Worker`, a process with a fake driver, whose GPU is the emulator. Host code, TVM's CUDA runtime,
launches, copies, CUDA graphs are the real ones there:

>>> with Worker(compute_capability=(9, 0)) as gpu:
...     gpu.run(prim_func, x, w, Out(y))
...     [y] = gpu.run(relax_module, x)
...     gpu.counters["launches"]

A compiled artifact runs in a process of the test's own, with `fake_gpu.environment`: the driver looks at the artifact's
fatbin only for code that the GPU could run, and takes the kernels from the CUDA sources given.

>>> env = fake_gpu.environment(kernels=[cuda_source], compute_capability=(9, 0), memory=1 << 30)
>>> print(fake_gpu.python("import tvm_ternary; ...", env))
"""

from . import fake_gpu
from .errors import EmulatorError
from .kernels import InOut, Kernels, Out, compile
from .worker import Worker

__all__ = ["EmulatorError", "InOut", "Kernels", "Out", "Worker", "compile", "fake_gpu"]
