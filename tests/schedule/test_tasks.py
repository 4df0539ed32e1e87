"""Which variants a matmul is built with, and that decisions become the code they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from tests.ternary_matmul import NATIVE, build, rows_of
from tvm_ternary.formats import PerChannel, PerGroup, TernaryTensor
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant
from tvm_ternary.kernels.table import KERNELS
from tvm_ternary.schedule import records
from tvm_ternary.schedule.records import ANNOTATION, About, Record, TuningLog, open_logs, shipped_log, workload_hash
from tvm_ternary.schedule.tasks import ROWS, MatmulTask, choose_variants, realize, spread
from tvm_ternary.schedule.tiles import load_tiles
from tvm_ternary.target import resolve, target_names

SMALL = MatmulShape(64, 64, 1, 1, 64)
LARGE = MatmulShape(4096, 4096, 1, 1, 4096)
ONE, FEW, MANY = Variant(Tile(1, 4), 1), Variant(Tile(4, 2), 8), Variant(Tile(8, 2), None)


def served(variants: tuple[Variant, ...], rows: int) -> Variant:
    return next(variant for variant in variants if variant.serves(rows))


def test_small_products_stay_on_one_thread() -> None:
    limit = (1 << 21) // (64 * 64)
    variants = spread((ONE, FEW, MANY), SMALL, None)
    assert [served(variants, m).threads for m in (1, 8, limit, limit + 1)] == ["one", "one", "one", "m"]
    assert [served(variants, m).tile for m in (1, 2, 8, 9)] == [ONE.tile, FEW.tile, FEW.tile, MANY.tile]


def test_large_products_spread_their_outputs() -> None:
    variants = spread((ONE, FEW, MANY), LARGE, None)
    assert {variant.threads for variant in variants} == {"n"}
    assert variants == (ONE, FEW, MANY)


@given(
    n=st.integers(1, 5000),
    k=st.integers(1, 5000),
    limits=st.lists(st.integers(1, 100), max_size=3, unique=True).map(sorted),
    rows=st.integers(1, 10_000),
)
def test_dividing_by_threads_changes_no_tile(n: int, k: int, limits: list[int], rows: int) -> None:
    shape = MatmulShape(n, k, 1, 1, k)
    given_ = tuple(Variant(Tile(i + 1, 1), limit) for i, limit in enumerate([*limits, None]))
    divided = spread(given_, shape, None)
    assert divided[-1].max_rows is None
    ends = [variant.max_rows for variant in divided[:-1]]
    assert all(end is not None for end in ends)
    assert ends == sorted(set(ends), key=lambda end: end or 0)
    assert served(divided, rows).tile == served(given_, rows).tile
    (known,) = spread(given_, shape, rows)
    assert (known.tile, known.threads) == (served(divided, rows).tile, served(divided, rows).threads)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("panel", [0, 1])
def test_realized_decisions_compute_the_workload(planes: int, threads: int, panel: int) -> None:
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (planes, 50, 600), dtype=np.int8)
    kind = PerGroup(100)
    weight = TernaryTensor.from_trits(trits, np.ones((planes, *kind.scale_shape(50, 600)), np.float32), kind)
    task = MatmulTask(8, MatmulShape.of(weight), 9, NATIVE.tier)
    module = task.workload()
    schedule = tvm.s_tir.Schedule(module)
    decisions = {"rows": 4, "blocks": 3, "panel": panel, "threads": threads}
    root = schedule.get_sblock(module["main"].body.block.name_hint)
    for name, value in decisions.items():
        schedule.annotate(root, ANNOTATION + name, value)
    x = rng.integers(-127, 128, (9, 600), dtype=np.int8)
    operands = [*rows_of(8, x, np.ones((9, 6), np.float32), kind), *KERNELS[8].pack(weight).values()]
    results = []
    for made in (realize(schedule.mod), module):
        y = tvm.runtime.tensor(np.full((9, 50), np.nan, np.float32))
        build({"main": made["main"]}, NATIVE)["main"](*map(tvm.runtime.tensor, operands), y)
        results.append(y.numpy())
    for result in results:
        np.testing.assert_array_equal(result, x.astype(np.int64) @ trits.astype(np.int64).sum(axis=0).T)


def record(task: MatmulTask, **decisions: int) -> Record:
    """A choice with these decisions, as the tuner writes it."""
    chosen = {**task.default, **decisions}
    instructions = []
    for index, (name, value) in enumerate(chosen.items()):
        instructions.append(["SampleCategorical", [], [[value], [1.0]], [f"v{index}"]])
        instructions.append(["Annotate", ["root", f"v{index}"], [ANNOTATION + name], []])
    trace = [instructions, [[2 * index, 0] for index in range(len(chosen))]]
    return Record(workload_hash(task.workload()), task.name, trace, (1e-3,), (2e-3,))


def log(name: str, *found: Record) -> TuningLog:
    return TuningLog(name, About("avx512-vnni", 1), found, ())


def test_records_win_over_tables_and_the_first_log_over_the_second() -> None:
    eight, many = (MatmulTask(8, LARGE, m, "avx512-vnni") for m in (8, 128))
    mine = log("mine", record(eight, rows=2, blocks=3))
    shipped = log("shipped:tuning_logs/avx512-vnni", record(eight, rows=8, blocks=1), record(many, rows=3, blocks=2))
    choice = choose_variants(8, LARGE, "avx512-vnni", (mine, shipped))
    *few, eighth, last = choice.variants
    assert [(v.tile, v.max_rows) for v in (eighth, last)] == [(Tile(2, 3), 8), (Tile(3, 2), None)]
    assert few == list(load_tiles("matmul_a8", "avx512-vnni").variants[:-1])
    records_used = f"mine#{mine.records[0].tag}, {shipped.name}#{shipped.records[1].tag}"
    assert choice.source == f"rule:avx512-vnni/matmul_a8.toml, {records_used}"


def test_a_record_of_one_row_says_nothing_of_many() -> None:
    table = load_tiles("matmul_a8", "avx512-vnni").variants
    known = log("mine", record(MatmulTask(8, LARGE, 1, "avx512-vnni"), blocks=3))
    first, *rest = choose_variants(8, LARGE, "avx512-vnni", (known,)).variants
    assert (first.tile, first.max_rows) == (Tile(1, 3), 1)
    assert rest == list(table[1:])


def test_equal_neighbours_become_one_variant() -> None:
    tasks = [MatmulTask(8, LARGE, m, "avx512-vnni") for m in (8, 16, 32)]
    known = log("mine", *(record(task, rows=2, blocks=3) for task in tasks))
    choice = choose_variants(8, LARGE, "avx512-vnni", (known,))
    limit = load_tiles("matmul_a8", "avx512-vnni").variants[-2].max_rows
    assert [(v.tile, v.max_rows) for v in choice.variants[-2:]] == [
        (choice.variants[-2].tile, limit),
        (Tile(2, 3), None),
    ]


def test_without_a_record_it_is_the_table() -> None:
    choice = choose_variants(8, SMALL, "avx512-vnni", (log("mine", record(MatmulTask(8, LARGE, 8, "avx512-vnni"))),))
    assert choice.source == "rule:avx512-vnni/matmul_a8.toml"


def test_a_known_m_takes_its_own_record_or_that_of_the_next_larger_or_the_largest() -> None:
    known = log("mine", *(record(MatmulTask(8, LARGE, m, "avx512-vnni"), rows=m // 8) for m in (8, 16)))
    for rows, expected in ((1, 1), (8, 1), (9, 2), (16, 2), (17, 2)):
        choice = choose_variants(8, LARGE, "avx512-vnni", (known,), rows=rows)
        assert served(choice.variants, rows).tile.rows == expected


def test_segments_that_no_tile_takes_stay_with_bytes() -> None:
    fitting, ragged = MatmulShape(64, 128, 1, 1, 128), MatmulShape(64, 80, 1, 1, 80)
    assert choose_variants(8, fitting, "amx").variants[-1].tiles
    assert not any(variant.tiles for variant in choose_variants(8, ragged, "amx").variants)
    assert served(choose_variants(8, ragged, "amx").variants, 10**6).max_rows is None


SHIPPED = [name for name in target_names() if name != "native" and shipped_log(name) is not None]


def test_records_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("target", SHIPPED)
def test_every_shipped_record_still_hits_its_kernel(target: str) -> None:
    """A change of a definition makes its records useless; then they must be measured again."""
    found = shipped_log(target)
    assert found is not None
    assert not found.notes
    tier = resolve(target).tier
    parsed = [parse(one.task, tier) for one in found.records]
    tasks = {workload_hash(task.workload()): task for task in parsed}
    for one in found.records:
        task = tasks.get(one.workload)
        assert task is not None, f"{one.task}: its definition has changed"
        assert one.decisions.keys() == set(task.space)
        assert one.seconds
        assert one.default_seconds


def parse(name: str, tier: str) -> MatmulTask:
    """The task of a name such as ``t1a8g128 4096x4096 m8``."""
    scheme, sizes, rows = name.split()
    n, k = map(int, sizes.split("x"))
    bits, _, group = scheme.partition("a")[2].partition("g")
    kind = PerGroup(int(group)) if group else PerChannel()
    planes = int(scheme[1])
    return MatmulTask(int(bits), MatmulShape(n, k, planes, kind.groups(k), kind.group_size(k)), int(rows[1:]), tier)


def test_names_of_tasks_tell_them_apart() -> None:
    shapes = [MatmulShape(64, 128, p, g, 128 // g) for p in (1, 2) for g in (1, 4)]
    tasks = [MatmulTask(bits, shape, m, "avx2") for bits in KERNELS for shape in shapes for m in ROWS]
    assert len({task.name for task in tasks}) == len(tasks)
    assert all(parse(task.name, "avx2") == task for task in tasks)


def test_a_log_is_where_the_package_looks_for_it() -> None:
    folder = next(folder for folder in records._FOLDERS if folder.is_dir())
    logs = {path.name for path in folder.iterdir() if (path / records.RECORDS).is_file()}
    assert logs == set(SHIPPED)
    # No GPU was at hand: the folder says so, and holds no record.
    assert {path.name for path in folder.iterdir() if path.is_dir()} - logs == {"cuda-sm_90"}
    assert open_logs("cuda-sm_90") == ()
