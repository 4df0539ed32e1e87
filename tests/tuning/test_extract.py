"""Which tasks a model, or a list of shapes, comes to; and that what is tuned is what compiling asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tvm_ternary.errors import ModelError, OptionError
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.quantize import quantize
from tvm_ternary.schedule.cuda import tasks as cuda
from tvm_ternary.schedule.records import Record, TuningLog, read_log, workload_hash
from tvm_ternary.schedule.tasks import MatmulTask, realize
from tvm_ternary.target import resolve
from tvm_ternary.tuning.extract import for_threads, linear_tasks, model_tasks, realize_for
from tvm_ternary.tuning.task import decided_schedule, trace_json

from ..models import FLOAT, GraphBuilder, mlp
from .logs import write_log

TARGET = resolve("x86-64-v3")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Matrices (24, 10) and (7, 24), rows left open."""
    path = tmp_path / "mlp.onnx"
    onnx.save(mlp(), path)
    return path


def names(tasks: list[MatmulTask]) -> list[str]:
    return [task.name for task in tasks]


def test_shapes_times_rows() -> None:
    tasks = linear_tasks([(64, 128), (32, 64), (64, 128)], TARGET, [1, 8, 1], scheme="t2a8g64")
    assert names(tasks) == ["t2a8g64 64x128 m1", "t2a8g64 64x128 m8", "t2a8 32x64 m1", "t2a8 32x64 m8"]
    assert all(task.tier == "avx2" for task in tasks)
    with pytest.raises(OptionError, match="scheme 'x': unknown"):
        linear_tasks([(64, 128)], TARGET, [1], scheme="x")


@pytest.mark.parametrize("scheme", ["t1a8", "t3a8g16", "t2a32pt", "t1a1g32"])
def test_a_shape_is_the_one_that_quantizing_gives(scheme: str) -> None:
    (task,) = linear_tasks([(24, 40)], TARGET, [4], scheme=scheme)
    weight = quantize(np.random.default_rng(0).standard_normal((24, 40)).astype("float32"), scheme)
    bits = Scheme.parse(scheme).activation_bits
    assert task == MatmulTask(bits, MatmulShape.of(weight), 4, TARGET.tier)


def test_a_model_gives_its_matrices(model: Path) -> None:
    tasks = model_tasks(model, TARGET, [1, 8], scheme="t1a32")
    assert names(tasks) == ["t1a32 24x10 m1", "t1a32 24x10 m8", "t1a32 7x24 m1", "t1a32 7x24 m8"]
    tasks = model_tasks(model, TARGET, [1, 8], scheme="t1a32", layers=["layers.1=t2a32"], dims={"batch": 5})
    assert names(tasks) == ["t2a32 7x24 m5"]


def test_tasks_for_a_gpu(model: Path) -> None:
    target = resolve("cuda-sm_90")
    tasks = model_tasks(model, target, [1, 8], scheme="t1abf16", dims={"batch": 5})
    assert names(tasks) == ["t1abf16 24x10 m5", "t1abf16 7x24 m5"]
    assert all(isinstance(task, cuda.CudaTask) and task.tier == "cuda-sm_90" for task in tasks)
    assert (realize_for(target), realize_for(TARGET)) == (cuda.realize, realize)
    with pytest.raises(OptionError, match=r"cuda-sm_80\+sm_90: is of 2 architectures; expected one; tune for each"):
        model_tasks(model, resolve("cuda-sm_80+sm_90"), [1], scheme="t1a8")
    with pytest.raises(OptionError, match="a32 activations: have no kernel for CUDA"):
        linear_tasks([(64, 128)], target, [1], scheme="t1a32")


def test_equal_matrices_are_one_task_and_ternary_ones_have_one_plane(tmp_path: Path) -> None:
    g = GraphBuilder("pair")
    x = g.input("x", FLOAT, [3, 64])
    trits = np.random.default_rng(0).integers(-1, 2, (64, 64)).astype("float32")
    floats = [np.random.default_rng(seed).standard_normal((64, 64)).astype("float32") for seed in (1, 2)]
    for matrix in (0.5 * trits, *floats):
        x = g.node("MatMul", x, g.constant(matrix))
    g.node("Relu", x, output="y")
    g.output("y", FLOAT, [3, 64])
    onnx.save(g.model(), tmp_path / "pair.onnx")
    tasks = model_tasks(tmp_path / "pair.onnx", TARGET, [1], scheme="t2a8")
    assert names(tasks) == ["t1a8 64x64 m3", "t2a8 64x64 m3"]


def test_a_model_without_ternary_matrices_is_refused(model: Path) -> None:
    with pytest.raises(OptionError, match="has no matrix that becomes ternary"):
        model_tasks(model, TARGET, [1], scheme="t4a32g8")
    with pytest.raises(ModelError):
        model_tasks(model.with_name("no.onnx"), TARGET, [1], scheme="t1a8")


def test_on_one_thread_what_is_spread_over_threads_stays() -> None:
    (task,) = linear_tasks([(2048, 2048)], TARGET, [8], scheme="t1a8")
    assert for_threads([task], 2) == [task]
    (pinned,) = for_threads([task], 1)
    assert len(task.space["threads"]) > 1
    assert pinned.space == {**task.space, "threads": (task.default["threads"],)}
    assert (pinned.name, pinned.default) == (task.name, task.default)
    assert workload_hash(pinned.workload()) == workload_hash(task.workload())


def test_what_was_tuned_is_found_again(tmp_path: Path) -> None:
    (task,) = linear_tasks([(64, 128)], TARGET, [2], scheme="t1a8")
    module = task.workload()
    point = tuple(values[-1] for values in task.space.values())
    schedule = decided_schedule(module, task.space, point)
    record = Record(workload_hash(module), task.name, trace_json(schedule.trace), (1e-6,))
    log: TuningLog = read_log(write_log(tmp_path, [record], target=TARGET.name))
    found = log.find(workload_hash(task.workload()), task.space)
    assert found is not None
    assert tuple(found.decisions.values()) == point
    assert list(realize(decided_schedule(module, task.space, tuple(task.default.values())).mod).functions_items())
