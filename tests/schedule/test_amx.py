"""AMX tiles: the compiled machine code against numpy, on this CPU's tiles or on an emulator of their instructions."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tests.schedule.native.program import SOURCES, Program, ProgramError, compile_sources, run_program
from tests.ternary_matmul import build, rows_of, unrunnable
from tvm_ternary.formats import Granularity, PerChannel, PerGroup, TernaryTensor
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import KERNELS
from tvm_ternary.schedule.intrinsics.amx import AmxTile, amx_intrinsics, configuration, with_tiles
from tvm_ternary.schedule.tasks import choose_variants
from tvm_ternary.schedule.ternary import matmul_function
from tvm_ternary.target import host_features, resolve

TARGET = resolve("amx")
HAS_TILES = TARGET.features <= host_features()
SOURCES_HERE = ("amx_refusal.c",) if HAS_TILES else ("amx_emulator.c",)
INSTRUCTIONS = ("ldtilecfg", "tilezero", "tileloadd", "tdpbsud", "tilestored", "tilerelease")


@pytest.fixture(autouse=True)
def a_host_for_the_other_instructions() -> None:
    """Code for AMX uses AVX-512 beside it, which is not emulated."""
    reason = unrunnable(resolve("avx512-vnni"))
    if reason is not None:
        pytest.skip(reason)


def gemm(tile: AmxTile, segments: int, rows: int, columns: int) -> tirx.PrimFunc:
    """x (rows, K) int8 times a panel (columns, segments, blocks, 4, 16, 4) uint8, each segment by itself.

    The last tile of rows starts where it ends with the last row. acc is (row tiles, rows of one, columns, 1, segments,
    16), the layout that the panel kernel gives its accumulators.
    """
    tiles, blocks = -(-rows // tile.rows), tile.blocks
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gemm")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows, segments * blocks * 16), "int8"))
        panel = T.arg("panel", T.buffer((columns, segments, blocks, 4, 16, 4), "uint8"))
        acc = T.arg("acc", T.buffer((tiles, tile.rows, columns, 1, segments, 16), "int32"))
        with T.grid(tiles, tile.rows, columns, 1, segments, 16, blocks, 4, 4) as loops, T.sblock("acc"):
            mo, mi, c, p, sg, n, kb, s, j = T.axis.remap("SSSSSSRRR", list(loops))
            row = T.min(mo * tile.rows, rows - tile.rows) + mi
            with T.init():
                T.buffer_store(acc, T.int32(0), [mo, mi, c, p, sg, n])
            product = T.Cast("int32", panel[c, sg, kb, s, n, j]) * T.Cast(
                "int32", x[row, (sg * blocks + kb) * 16 + s * 4 + j]
            )
            T.buffer_store(acc, acc[mo, mi, c, p, sg, n] + product, [mo, mi, c, p, sg, n])
    return builder.get()


def scheduled(tile: AmxTile, function: tirx.PrimFunc, parallel: bool = True) -> tirx.PrimFunc:
    """Tiles of columns, in parallel; for each, segments and tiles of rows, without the tiles' configuration."""
    sch = Schedule(function)
    acc = sch.get_sblock("acc")
    mo, mi, c, p, sg, n, *k = sch.get_loops(acc)
    outer, inner = sch.split(c, [None, tile.column_tiles])
    sch.reorder(outer, p, sg, mo, mi, inner, n, *k)
    if parallel:
        sch.parallel(outer)
    names = amx_intrinsics(tile)
    init = sch.decompose_reduction(acc, mi)
    sch.tensorize(sch.get_loops(init)[4], names.zero)
    sch.tensorize(mi, names.update)
    return sch.mod["main"]


def as_panel(tile: AmxTile, weights: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Weights (N, K) as a panel."""
    n, k = weights.shape
    quads = weights.reshape(n // 16, 16, k // (16 * tile.blocks), tile.blocks, 4, 4)
    return np.ascontiguousarray(quads.transpose(0, 2, 3, 4, 1, 5))


def products(tile: AmxTile, x: npt.NDArray[np.int8], weights: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """What `gemm` computes."""
    starts = np.minimum(np.arange(0, len(x), tile.rows), len(x) - tile.rows)
    rows = starts[:, None] + np.arange(tile.rows)
    depth = 16 * tile.blocks
    out = []
    for start in range(0, x.shape[1], depth):
        part = slice(start, start + depth)
        y = x[:, part].astype(np.int64) @ weights[:, part].T.astype(np.int64)
        out.append(y.reshape(len(x), -1, 16)[rows])
    return np.stack(out, axis=-2)[:, :, :, None]


# Segments below, at and above a step; one and several; M that fills tiles or does not.
CASES: Mapping[str, tuple[AmxTile, int, int, int]] = {
    "k16": (AmxTile(1), 3, 32, 4),
    "k32": (AmxTile(2), 5, 50, 6),
    "k48": (AmxTile(3, 1, 2), 2, 33, 4),
    "k64": (AmxTile(4, 2, 1), 2, 40, 3),
    "k128": (AmxTile(8), 3, 65, 4),
    "k320": (AmxTile(20, 1, 1), 1, 17, 3),
    "k512": (AmxTile(32), 2, 64, 2),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    functions = {name: with_tiles(scheduled(case[0], gemm(*case)), case[0]) for name, case in CASES.items()}
    return Program(functions, TARGET, tmp_path_factory.mktemp("amx"), sources=SOURCES_HERE)


def operands(
    name: str, rng: np.random.Generator, extreme: bool
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    tile, segments, rows, columns = CASES[name]
    k, n = segments * tile.blocks * 16, 16 * columns
    if extreme:
        x, weights = (
            rng.choice([-128, 127], (rows, 1)) * np.ones((1, k)),
            rng.choice([0, 255], (n, 1)) * np.ones((1, k)),
        )
    else:
        x, weights = rng.integers(-128, 128, (rows, k)), rng.integers(0, 256, (n, k))
    acc = np.full((-(-rows // tile.rows), tile.rows, columns, 1, segments, 16), 99, np.int32)
    return x.astype(np.int8), weights.astype(np.uint8), acc


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_products_are_equal_to_the_bit(program: Program, name: str, extreme: bool) -> None:
    tile = CASES[name][0]
    x, weights, acc = operands(name, np.random.default_rng(len(name)), extreme)
    got = program(name, x, as_panel(tile, weights), acc)[-1]
    np.testing.assert_array_equal(got, products(tile, x, weights))


def test_cases_cross_the_boundaries() -> None:
    tiles = [case[0] for case in CASES.values()]
    assert {(tile.row_tiles, tile.column_tiles) for tile in tiles} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert {tile.blocks for tile in tiles} >= {1, 2, 3, 4, 8}
    assert {bool(rows % tile.rows) for tile, _, rows, _ in CASES.values()} == {True, False}


def test_two_by_two_tiles_take_as_many_loads_as_products() -> None:
    """And nothing but the result leaves them: tiles are zeroed, filled and stored once a group."""
    tile = AmxTile(16)
    function = with_tiles(scheduled(tile, gemm(tile, 1, 32, 4)), tile)
    text = build({"gemm": function}, TARGET).mod.inspect_source("asm")
    counts = {name: len(re.findall(rf"^\s+{name}\b", text, re.M)) for name in INSTRUCTIONS}
    assert counts["tileloadd"] == counts["tdpbsud"] > 0
    assert counts["tilestored"] == counts["tilezero"] == 4
    assert counts["ldtilecfg"] == counts["tilerelease"] == 1


def test_without_threads_the_outermost_loop_holds_the_configuration(tmp_path: Path) -> None:
    tile = CASES["k128"][0]
    function = with_tiles(scheduled(tile, gemm(*CASES["k128"]), parallel=False), tile)
    text = str(function)
    assert text.index("ldtilecfg") < text.index("tilezero") < text.index("tdpbsud") < text.index("tilerelease")
    assert text.count("ldtilecfg") == text.count("syscall") == 1
    x, weights, acc = operands("k128", np.random.default_rng(0), extreme=False)
    program = Program({"gemm": function}, TARGET, tmp_path, sources=SOURCES_HERE)
    got = program("gemm", x, as_panel(tile, weights), acc)[-1]
    np.testing.assert_array_equal(got, products(tile, x, weights))


def test_tiles_that_nobody_configured_are_refused(tmp_path: Path) -> None:
    """The emulator starts each thread without a configuration, as a CPU does; there the instruction is illegal."""
    tile = CASES["k128"][0]
    function = scheduled(tile, gemm(*CASES["k128"]))
    x, weights, acc = operands("k128", np.random.default_rng(0), extreme=False)
    program = Program({"gemm": function}, TARGET, tmp_path, sources=SOURCES_HERE)
    refused = f"status -{signal.SIGILL:d}" if HAS_TILES else "AMX emulator: tiles of this thread are not configured"
    with pytest.raises(ProgramError, match=refused):
        program("gemm", x, as_panel(tile, weights), acc)


def test_a_refused_permission_is_an_error_of_the_function(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMX_REFUSED", "1")
    tile = CASES["k128"][0]
    x, weights, acc = operands("k128", np.random.default_rng(0), extreme=False)
    with pytest.raises(ProgramError, match="status 1: RuntimeError: the operating system refuses AMX tiles"):
        program("k128", x, as_panel(tile, weights), acc)


def test_every_instruction_in_every_form_of_address(tmp_path: Path) -> None:
    """Against plain C: on a CPU without tiles it is the emulator that is tested."""
    path = tmp_path / "instructions"
    compile_sources("cc", [SOURCES / name for name in ("amx_instructions.c", *SOURCES_HERE)], path)
    run_program([str(path)])


@pytest.mark.parametrize("tile", [AmxTile(16), AmxTile(2, 1, 2), AmxTile(1, 2, 1)])
def test_configuration_gives_each_register_its_shape(tile: AmxTile) -> None:
    data = configuration(tile)
    assert len(data) == 64
    assert data[0] == 1
    widths, rows = np.frombuffer(data[16:48], "<u2"), np.frombuffer(data[48:], np.uint8)
    count, quads = tile.row_tiles * tile.column_tiles, 4 * min(tile.blocks, 4)
    used = [(64, 16)] * count + [(4 * quads, 16)] * tile.row_tiles + [(64, quads)] * tile.column_tiles
    assert list(zip(widths, rows, strict=True)) == used + [(0, 0)] * (16 - len(used))
    assert not any(data[1:16])


def test_segments_fit_where_all_steps_have_one_shape() -> None:
    assert [blocks for blocks in range(14) if AmxTile.fits(blocks)] == [1, 2, 3, 4, 8, 12]


def test_functions_without_tiles_stay_as_they_are() -> None:
    tile = AmxTile(4)
    plain = gemm(tile, 1, 32, 2)
    tvm.ir.assert_structural_equal(with_tiles(plain, tile), plain)


@pytest.mark.parametrize(
    ("n", "k", "planes", "kind", "rows"),
    [(70, 200, 1, PerGroup(16), 32), (100, 1000, 2, PerChannel(), 77), (33, 515, 3, PerGroup(128), 300)],
    ids=str,
)
def test_the_whole_matmul_equals_its_reference(
    tmp_path: Path, n: int, k: int, planes: int, kind: Granularity, rows: int
) -> None:
    """As it is compiled for the target: tiles from 32 rows on, ragged in every dimension, and no row twice."""
    rng = np.random.default_rng(n)
    trits = rng.integers(-1, 2, (planes, n, k), dtype=np.int8)
    # Whole scales, so that no float operation rounds.
    scale = np.broadcast_to(np.float32([9, 3, 1][:planes])[:, None, None], (planes, *kind.scale_shape(n, k)))
    weight = TernaryTensor.from_trits(trits, np.ascontiguousarray(scale), kind)
    shape, kernel = MatmulShape.of(weight), KERNELS[8]
    variants = choose_variants(8, shape, "amx").variants
    assert variants[-1].tiles
    function = matmul_function(kernel.matmul, shape, variants, "amx")
    program = Program({"matmul": function}, TARGET, tmp_path, sources=SOURCES_HERE)
    x = rng.integers(-127, 128, (rows, k), dtype=np.int8)
    operands = [*rows_of(8, x, np.ones((rows, shape.groups), np.float32), kind), *kernel.pack(weight).values()]
    got = program("matmul", *operands, np.full((rows, n), np.nan, np.float32))[-1]
    dense = (trits.astype(np.int64) * scale[:, :1, :1].astype(np.int64)).sum(axis=0)
    np.testing.assert_array_equal(got, x.astype(np.int64) @ dense.T)
