"""CUDA tuning tasks: workloads, spaces that hold the default, the code of decisions, the choice by records."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tuning.logs import write_log
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.schedule.cuda.tasks import CudaTask, choose_cuda_variants, realize
from tvm_ternary.schedule.cuda.tiles import REPRESENTATIVES
from tvm_ternary.schedule.records import Record, read_log, workload_hash
from tvm_ternary.tuning.task import decided_schedule, fits, space_points, space_size, trace_json

SHAPE = MatmulShape(64, 256, 2, 4, 64)
TIER = "cuda-sm_90"


def recorded(task: CudaTask, point: tuple[int, ...], seconds: float = 1e-6) -> Record:
    schedule = decided_schedule(task.workload(), task.space, point)
    return Record(workload_hash(task.workload()), task.name, trace_json(schedule.trace), (seconds,))


@pytest.mark.parametrize("rows", [1, 16, 128])
@pytest.mark.parametrize(("bits", "bfloat"), [(8, False), (16, False), (16, True), (1, False)])
def test_the_default_fits_and_is_in_the_space(bits: int, bfloat: bool, rows: int) -> None:
    shape = SHAPE if bits > 1 else MatmulShape(64, 256, 1, 1, 256)
    task = CudaTask(bits, shape, rows, TIER, bfloat)
    assert all(task.default[name] in values for name, values in task.space.items())
    assert task.fits(task.default)
    points = list(space_points(task))
    assert len(points) == space_size(task) == len(set(points))
    assert all(fits(task, point) for point in points)


def test_tasks_have_workloads_of_their_own() -> None:
    tasks = [
        CudaTask(16, SHAPE, 1, TIER),
        CudaTask(16, SHAPE, 1, TIER, bfloat=True),
        CudaTask(16, SHAPE, 2, TIER),
        CudaTask(8, SHAPE, 1, TIER),
    ]
    assert len({workload_hash(task.workload()) for task in tasks}) == len({task.name for task in tasks}) == 4
    assert workload_hash(tasks[0].workload()) == workload_hash(CudaTask(16, SHAPE, 1, TIER).workload())


def test_decisions_become_code_or_are_refused() -> None:
    task = CudaTask(8, SHAPE, 128, TIER)
    point = next(space_points(task))
    made = realize(decided_schedule(task.workload(), task.space, point).mod)["main"]
    assert [str(p.name) for p in made.params] == [str(p.name) for p in task.workload()["main"].params]
    wrong = {**task.space, "rows": (128,), "columns": (64,), "warps_n": (8,), "warps_k": (16,), "stages": (8,)}
    point = tuple(values[-1] for values in wrong.values())
    assert not fits(task, point)
    with pytest.raises(ValueError, match="do not fit cuda-sm_90"):
        realize(decided_schedule(task.workload(), wrong, point).mod)


def test_a_record_is_chosen_where_rows_are_known(tmp_path: Path) -> None:
    task = CudaTask(8, SHAPE, 2, TIER)
    point = next(p for p in space_points(task) if dict(zip(task.space, p, strict=True)) != dict(task.default))
    record = recorded(task, point)
    log = read_log(write_log(tmp_path, [record], target=TIER), name="mine")
    choice = choose_cuda_variants(8, SHAPE, TIER, (log,), rows=2)
    assert choice.source == f"mine#{record.tag}"
    assert choice.variants == (task.variant(record.decisions),)
    assert choose_cuda_variants(8, SHAPE, TIER, (log,), rows=3).source.startswith("rule:")


def test_a_record_serves_the_rows_around_its_own(tmp_path: Path) -> None:
    least, most = REPRESENTATIVES[1], REPRESENTATIVES[0]
    task = CudaTask(8, SHAPE, least, TIER)
    point = tuple(task.default[name] for name in task.space)
    record = recorded(task, (*point[:-2], 3, point[-1]))
    log = read_log(write_log(tmp_path, [record], target=TIER), name="mine")
    choice = choose_cuda_variants(8, SHAPE, TIER, (log,))
    serving = next(v for v in choice.variants if v.serves(least))
    assert serving.stages == 3
    assert not serving.serves(least + 1)
    assert next(v for v in choice.variants if v.serves(most)).stages != 3
    assert choice.variants[-1].max_rows is None
    assert f"mine#{record.tag}" in choice.source
    assert "rule:" in choice.source
