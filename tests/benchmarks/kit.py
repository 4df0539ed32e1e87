"""A small kit of the GPU benchmark, and a machine whose GPU is the emulator."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.gpu import build, run
from benchmarks.gpu.cases import Cases, cpu_name, model_name
from tests.cuda_emulator import fake_gpu, toolchain
from tests.models import llama
from tvm_ternary import compiler

CASES = Cases(
    checked=((70, 300, "t2a8g32"), (33, 100, "t1abf16"), (40, 100, "t1a1")),
    checked_rows=(1, 18),
    timed=(),
    timed_rows=(),
    # One alone: the emulator tells kernels apart by their names, which those of two models share.
    models=((2, 8, "t2a8g16"),),
    free_sizes=((1, 5),),
    words=50,
    caches=((4, 2, 20, 2, 140),),
    prompts=((2, 1, 20, 130, "bits", 2),),
    chunks=((4, 2, 20, 2, 140, 9),),
)
_VISIT = """
import sys
import benchmarks.gpu.run as run
run.sanitize = lambda *arguments: iter(())
sys.argv = ["run", sys.argv[1], sys.argv[2], "--checks-only"]
print("status", run.main())
"""


def _fake_cudart() -> Path:
    return toolchain.fake_driver_folder() / "libcudart.so.13"


def make(folder: Path, cases: Cases = CASES) -> list[str]:
    """Build a kit of small kernels and models; give the CUDA sources that the emulator needs."""
    sources = list[str]()

    def keeping(compile_fatbin: Any) -> Any:
        def keep(source: str, *arguments: Any) -> Any:
            sources.append(source)
            return compile_fatbin(source, *arguments)

        return keep

    with pytest.MonkeyPatch.context() as patch:
        for module in (build, compiler):
            patch.setattr(module, "compile_fatbin", keeping(module.compile_fatbin))
        build.kernels(folder, build.TARGET, cases)
        path = folder / "llama.onnx"
        onnx.save(llama(vocabulary=cases.words), path)
        for batch, length, scheme in cases.models:
            dims = {"batch": batch, "length": length} if batch else None
            output = folder / f"{model_name(batch, length, scheme)}.so"
            compiler.compile(path, output, target=build.TARGET.name, scheme=scheme, dims=dims)
            compiler.compile(path, folder / f"{cpu_name(scheme)}.so", scheme=scheme)
    if cases.models:
        build.deployed(folder, model_name(*cases.models[0]))
    else:
        for name in run.LIBRARIES:
            (folder / name).touch()
    # The C++ program takes what lies beside it.
    shutil.copy(_fake_cudart(), folder)
    build.facts(folder, cases)
    return sources


def visit(folder: Path, sources: list[str], out: Path) -> str:
    """What a visit to an emulated GPU prints."""
    env = fake_gpu.environment(kernels=sources, compute_capability=(9, 0), checked=False, name="Emulated H100")
    env["TVM_TERNARY_CUDART"] = str(_fake_cudart())
    runtime = Path(__import__("tvm").__file__).parent / "lib"
    env["TVM_TERNARY_RUNTIME"] = str(runtime / "libtvm_runtime.so")
    env["TVM_TERNARY_RUNTIME_CUDA"] = str(runtime / "libtvm_runtime_cuda.so")
    return fake_gpu.python(_VISIT, env, folder, out)
