"""AArch64 code, run by an emulator on another host: every kernel against its slow reference."""

from __future__ import annotations

import platform
import shutil
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.schedule.native.program import Program, ProgramError
from tests.ternary_matmul import gamma, rows_of, segment_sums
from tvm_ternary.formats import Granularity, PerChannel, PerGroup, TernaryTensor, pad_groups, with_shared_scales
from tvm_ternary.kernels.activations import int8_rows, reference_int8_rows
from tvm_ternary.kernels.matmul import Epilogue
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import EVERY_KERNEL, kernel_for
from tvm_ternary.schedule.ternary import matmul_function
from tvm_ternary.schedule.tiles import load_tiles
from tvm_ternary.target import Target, resolve

pytestmark = pytest.mark.slow

# N and K on both sides of a block, ragged groups, several planes and segments; M below and above what a tile holds.
CASES: dict[str, tuple[int, int, int, Granularity]] = {
    "17x33": (17, 33, 1, PerChannel()),
    "50x130g64": (50, 130, 2, PerGroup(64)),
    "64x200g40": (64, 200, 3, PerGroup(40)),
    "20x1111": (20, 1111, 1, PerChannel()),
}
ROWS = (0, 1, 2, 5, 11)
LARGEST = {8: 127, 1: 1}
"""Largest integer activation that a kernel takes."""
# With the oldest CPU that has what the target asks for, so that code which needs more fails. One without the dot
# product takes the portable intrinsics.
TARGETS = {
    "cortex-a76": resolve("aarch64"),
    "cortex-a53": resolve({"kind": "llvm", "mtriple": "aarch64-unknown-linux-gnu", "mcpu": "generic"}),
}


def tools(cpu: str) -> tuple[str, tuple[str, ...]]:
    """A C compiler for AArch64 and what runs its programs here as on that CPU; skips the test where one is missing."""
    if platform.machine() == "aarch64":
        return "cc", ()
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    for tool, package in ((compiler, "gcc-aarch64-linux-gnu"), (emulator, "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing; it is in Debian's package {package}")
    return compiler, (emulator, "-cpu", cpu)


def weight_of(case: str) -> TernaryTensor:
    """Its planes have scales that every kernel represents."""
    n, k, planes, kind = CASES[case]
    rng = np.random.default_rng(n)
    trits = rng.integers(-1, 2, (planes, n, k), dtype=np.int8)
    scale = rng.random((planes, *kind.scale_shape(n, k))) + 0.1
    return with_shared_scales(TernaryTensor.from_trits(trits, scale.astype(np.float32), kind))


@pytest.fixture(scope="module", params=TARGETS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """All kernels for all cases in one program."""
    compiler, runner = tools(request.param)
    target: Target = TARGETS[request.param]
    functions = {}
    for case in CASES:
        shape = MatmulShape.of(weight_of(case))
        functions[f"rows_{case}"] = int8_rows(shape)
        for bits, packing in EVERY_KERNEL:
            row = kernel_for(bits, packing)
            variants = load_tiles(row.matmul.name, target.tier).of(shape.planes)
            functions[f"a{bits}_{packing}_{case}"] = matmul_function(
                row.matmul, shape, variants, target.tier, epilogue=Epilogue(bias=True)
            )
    folder = tmp_path_factory.mktemp(request.param)
    return Program(functions, target, folder, compiler=compiler, runner=runner)


def multiply(
    program: Program, bits: int, packing: str, case: str, x: npt.NDArray[np.generic], x_scale: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The kernel's result with the case's weight and a bias of 0, 1, 2, ..."""
    weight = weight_of(case)
    n = weight.shape[0]
    row = kernel_for(bits, packing)
    activations = rows_of(bits, x, x_scale, weight.granularity, row.matmul.block)
    y = np.full((len(x), n), np.nan, np.float32)
    constants = row.pack(weight).values()
    result = program(f"a{bits}_{packing}_{case}", *activations, *constants, np.arange(n, dtype=np.float32), y)[-1]
    assert not np.isnan(result).any()
    return result


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_int8_rows_equal_their_reference(program: Program, case: str, rows: int) -> None:
    shape, kind = MatmulShape.of(weight_of(case)), CASES[case][3]
    x = np.random.default_rng(rows).standard_normal((rows, shape.k)).astype(np.float32)
    outputs = [np.full((rows, width), 99, dtype) for width, dtype in _rows_outputs(shape)]
    _, x_q, x_sum, x_scale = program(f"rows_{case}", x, *outputs)
    expected, scale = reference_int8_rows(x, shape)
    padded = pad_groups(expected, kind, 16)
    np.testing.assert_array_equal(x_q, padded)
    np.testing.assert_array_equal(x_scale, scale)
    np.testing.assert_array_equal(x_sum, segment_sums(padded, kind, shape.k))


def _rows_outputs(shape: MatmulShape) -> list[tuple[int, type[np.generic]]]:
    return [(shape.padded_k(16), np.int8), (shape.segments(16), np.int32), (shape.groups, np.float32)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
def test_kernels_are_within_their_bound(program: Program, bits: int, packing: str, case: str, rows: int) -> None:
    """|y - exact| <= gamma_n * (sum of the magnitudes of all products).

    n is counted in tests/kernels/test_equivalence.py: with PS planes and segments PS + 4, as the sum of a segment is an
    exact integer; for floats the k's of a segment + PS + 1.
    """
    weight, rng = weight_of(case), np.random.default_rng(rows)
    shape, block = MatmulShape.of(weight), kernel_for(bits, packing).matmul.block
    terms = shape.planes * shape.segments(block)
    x: npt.NDArray[Any]
    if bits == 32:
        x, x_scale = rng.standard_normal((rows, shape.k)).astype(np.float32), np.ones((rows, 1))
        roundings = shape.segment_blocks(block) * block + terms + 1
    else:
        x = rng.integers(-LARGEST[bits], LARGEST[bits] + 1, (rows, shape.k), dtype=np.int8)
        x_scale = rng.random((rows, shape.groups if bits == 8 else 1)) + 0.1
        roundings = terms + 4
    x_scale = x_scale.astype(np.float32)
    per_value = np.repeat(x_scale.astype(np.float64), shape.group_size if bits == 8 else shape.k, axis=1)
    values = x * per_value[:, : shape.k]
    spread = np.repeat(weight.scale.astype(np.float64), shape.group_size, axis=2)[:, :, : shape.k]
    dense, bias = weight.trits() * spread, np.arange(shape.n)
    exact = values @ dense.sum(axis=0).T + bias
    magnitude = np.abs(values) @ np.abs(dense).sum(axis=0).T + bias
    got = multiply(program, bits, packing, case, x, x_scale if bits == 8 else x_scale[:, 0])
    assert (np.abs(got - exact) <= gamma(roundings) * magnitude).all()


def test_the_tiers_are_those_with_and_without_the_dot_product() -> None:
    assert [target.tier for target in TARGETS.values()] == ["neon-dot", "portable"]


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
def test_whole_numbers_are_equal_to_the_bit(
    program: Program, bits: int, packing: str, case: str, extreme: bool
) -> None:
    """With scales 1 and whole activations no operation rounds, not even where all have one sign and their limit."""
    n, k, planes, kind = CASES[case]
    rng, limit = np.random.default_rng(n), LARGEST.get(bits, 127)
    trits = rng.integers(-1, 2, (planes, n, k), dtype=np.int8)
    x = rng.integers(-limit, limit + 1, (7, k), dtype=np.int8)
    if extreme:
        trits[:], x[:] = rng.choice([-1, 1], (1, n, 1)), rng.choice([-limit, limit], (7, 1))
    weight = TernaryTensor.from_trits(trits, np.ones((planes, *kind.scale_shape(n, k)), np.float32), kind)
    ones = np.ones((7, kind.groups(k)) if bits == 8 else 7, np.float32)
    row = kernel_for(bits, packing)
    activations = rows_of(bits, x.astype(np.float32) if bits == 32 else x, ones, kind, row.matmul.block)
    operands = [*activations, *row.pack(weight).values(), np.zeros(n, np.float32)]
    exact = x.astype(np.int64) @ trits.sum(axis=0, dtype=np.int64).T
    assert np.abs(exact).max() < 2**24
    got = program(f"a{bits}_{packing}_{case}", *operands, np.full((7, n), np.nan, np.float32))[-1]
    np.testing.assert_array_equal(got, exact)


def test_an_error_of_the_compiled_code_is_passed_on(program: Program) -> None:
    with pytest.raises(ProgramError, match=r"(?s)status 1: \w+Error: "):
        program("rows_17x33", np.zeros((1, 32), np.float32))
