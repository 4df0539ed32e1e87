"""Candidates for a GPU, built and timed on the emulated one: here, and as a server would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cuda_emulator import fake_gpu
from tvm_ternary.build.executable import cuda_source
from tvm_ternary.errors import HostError
from tvm_ternary.schedule.cuda.tasks import realize
from tvm_ternary.target import resolve
from tvm_ternary.tuning import kernels
from tvm_ternary.tuning.extract import linear_tasks
from tvm_ternary.tuning.kernels import build_kernel
from tvm_ternary.tuning.task import decided_schedule
from tvm_ternary.tuning.tuner import Options, tune
from tvm_ternary.tuning.workers import Library

TARGET = resolve("cuda-sm_90")
(TASK,) = linear_tasks([(32, 64)], TARGET, [1], scheme="t1abf16")

TIME = """
import sys
from tvm import rpc
from tvm_ternary.tuning import kernels
from tvm_ternary.tuning.batch import gpu
from tvm_ternary.tuning.workers import Effort, Library

gpu.CACHE_BYTES = 1 << 12
# TVM empties the cache by copying memory that nothing has written, which the emulator refuses.
kernels.CACHE_BYTES = 0
kernels._REPEATS = 2
# A server would write a file of the same name over one that is loaded.
libraries = [Library(path, eval(sys.argv[3])) for path in sys.argv[1:3]]

class Server:
    def session(self, seconds):
        return rpc.LocalSession()

for tracker in (None, Server()):
    times = kernels.time_kernels(tracker, libraries, "sm_90", Effort(3, 1))
    print([len(seconds) for seconds in times], all(0 < value < 10 for seconds in times for value in seconds))
kernels.check_gpu_server(Server(), "sm_90")
try:
    kernels.check_gpu_server(Server(), "sm_80")
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, str]:
    """The library of the default, and its CUDA source."""
    sources: list[str] = []

    def keep(executable: object) -> str | None:
        source = cuda_source(executable)
        sources.append(source or "")
        return source

    module = decided_schedule(TASK.workload(), TASK.space, tuple(TASK.default[name] for name in TASK.space)).mod
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "cuda_source", keep)
        path = tmp_path_factory.mktemp("kernel") / "main.so"
        return build_kernel(realize, module, TARGET, str(path)), sources[0]


def test_timing_here_and_on_a_server(built: tuple[Library, str], tmp_path: Path) -> None:
    library, source = built
    other = shutil.copyfile(library.path, tmp_path / "other.so")
    env = fake_gpu.environment(kernels=[source], compute_capability=(9, 0), checked=False)
    lines = fake_gpu.python(TIME, env, library.path, other, library.arguments).splitlines()
    assert lines == ["[3, 3] True", "[3, 3] True", "its GPU is sm_90, expected sm_80"]


def test_the_library_takes_what_the_workload_does(built: tuple[Library, str]) -> None:
    shapes = [(1, 64), (1, 2, 4, 16), (1, 32), (1, 32)]
    dtypes = ["bfloat16", "uint32", "float32", "float32"]
    assert built[0].arguments == tuple(zip(shapes, dtypes, strict=True))
    assert b"__global__" not in Path(built[0].path).read_bytes()
    assert "main_kernel" in built[1]


def test_without_a_gpu_there_are_other_ways(tmp_path: Path) -> None:
    expected = r"target cuda-sm_90: device cuda:0 .* no NVIDIA driver .*--rpc-tracker.*--export-candidates"
    with pytest.raises(HostError, match=expected):
        tune([TASK], tmp_path, TARGET, realize, Options(trials=1, cost_model="random"))
    assert list(tmp_path.iterdir()) == []
