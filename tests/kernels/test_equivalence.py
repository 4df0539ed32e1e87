"""Every kernel, on every target this host can run, against its slow reference.

With integer activations and scales that are powers of two, no float operation of a kernel rounds: what comes out are
the accumulators themselves, and they must be equal. With other scales, the roundings are counted and the error bound
follows from their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from tests.ternary_matmul import NATIVE, TARGETS, Matmul, gamma, rows_of, runnable, unrunnable
from tvm_ternary.formats import Granularity, PerChannel, PerGroup, PerTensor, TernaryTensor, with_shared_scales
from tvm_ternary.kernels.bits import reference_a1_dot
from tvm_ternary.kernels.int8 import reference_a8_accumulators
from tvm_ternary.kernels.matmul import Epilogue
from tvm_ternary.kernels.shape import MatmulShape, Variant
from tvm_ternary.kernels.table import EVERY_KERNEL, kernel_for
from tvm_ternary.target import Target, resolve

Ints = npt.NDArray[np.int64]
LARGEST = {32: 127, 8: 127, 1: 1}
"""Largest integer activation that a kernel takes; for floats, one whose sums stay exact."""
WORST_RELATIVE = 1e-5


@dataclass(frozen=True)
class Case:
    """Sizes of one weight, and M where it is known when compiling."""

    n: int
    k: int
    planes: int
    kind: Granularity
    bias: bool = False
    rows: int | None = None

    def __str__(self) -> str:
        suffix = self.kind.suffix or "pc"
        return f"{self.n}x{self.k}-t{self.planes}{suffix}{'-bias' * self.bias}{f'-m{self.rows}' * bool(self.rows)}"


# Each value of a column stands beside many of the others'; N and K lie on both sides of 16, 32 and 64, groups are
# narrower than, equal to and no multiple of a block, and the last one is whole, ragged or of one weight.
CASES = (
    Case(1, 1, 1, PerChannel(), rows=1),
    Case(1, 1, 2, PerTensor(), bias=True),
    Case(2, 3, 4, PerTensor()),
    Case(15, 31, 2, PerGroup(1), bias=True),
    Case(16, 16, 1, PerGroup(16), rows=2),
    Case(17, 33, 3, PerGroup(5), bias=True),
    Case(31, 64, 4, PerChannel()),
    Case(33, 100, 2, PerGroup(20), bias=True, rows=7),
    Case(50, 130, 1, PerGroup(64), bias=True),
    Case(64, 200, 3, PerGroup(40), rows=5),
    Case(100, 257, 1, PerTensor(), bias=True, rows=3),
    Case(130, 515, 4, PerGroup(100)),
)
LARGE = Case(1000, 4099, 1, PerGroup(128), bias=True, rows=257)


@dataclass(frozen=True)
class Problem:
    """A weight and a compiled matmul for it."""

    bits: int
    packing: str
    case: Case
    weight: TernaryTensor
    matmul: Matmul

    @classmethod
    def make(cls, bits: int, packing: str, case: Case, target: Target, rng: np.random.Generator) -> Problem:
        trits = rng.integers(-1, 2, (case.planes, case.n, case.k), dtype=np.int8)
        # Between 0.1 and 1.1, either sign: a refit can make a scale negative.
        sizes = (case.planes, *case.kind.scale_shape(case.n, case.k))
        scale = (rng.random(sizes) + 0.1) * rng.choice([-1, 1], sizes)
        weight = TernaryTensor.from_trits(trits, scale.astype(np.float32), case.kind)
        weight = with_shared_scales(weight) if bits == 8 else weight
        shape = MatmulShape.of(weight)
        matmul = Matmul(bits, shape, target, rows=case.rows, epilogue=Epilogue(case.bias), packing=packing)
        return cls(bits, packing, case, weight, matmul)

    @cached_property
    def constants(self) -> dict[str, npt.NDArray[np.generic]]:
        """The weight, packed."""
        return dict(kernel_for(self.bits, self.packing).pack(self.weight))

    def run(
        self,
        x: npt.NDArray[np.float32] | npt.NDArray[np.int8],
        x_scale: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        **scales: npt.NDArray[np.generic],
    ) -> npt.NDArray[np.float32]:
        """The kernel's result; ``scales`` take the place of the weight's own, packed."""
        kernel = kernel_for(self.bits, self.packing)
        activations = rows_of(self.bits, x, x_scale, self.case.kind, kernel.matmul.block)
        constants = self.constants | scales
        return self.matmul(len(x), *activations, *constants.values(), *([bias] if self.case.bias else []))

    def scales(self, values: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.generic]]:
        """The operands that make the scale of each plane, group and output ``values`` (P, G, 16 * blocks), integers."""
        if self.bits != 8:
            return {"scale": values}
        if self.case.planes == 1:
            return {"scale": values[0]}
        return {"factor": values.astype(np.int8), "scale": np.ones(values.shape[1:], np.float32)}


def row_counts(variants: tuple[Variant, ...]) -> list[int]:
    """No row, one, both sides of every variant's limit, and rows that fill tiles or do not."""
    limits = [variant.max_rows for variant in variants if variant.max_rows is not None]
    tiles = [variant.tile.rows for variant in variants]
    return sorted({0, 1, 2, *limits, *(limit + 1 for limit in limits), *tiles, *(2 * rows + 1 for rows in tiles)})


def integer_rows(bits: int, rows: int, k: int, rng: np.random.Generator) -> npt.NDArray[np.int8]:
    return rng.integers(-LARGEST[bits], LARGEST[bits] + 1, (rows, k), dtype=np.int8)


def accumulators(bits: int, x: npt.NDArray[np.int8], weight: TernaryTensor) -> Ints:
    """(M, N, P, G), by the references of the integer kernels: the same integers as float32 have the same products."""
    return reference_a1_dot(x, weight) if bits == 1 else reference_a8_accumulators(x, weight)


def no_scale(bits: int, rows: int, groups: int) -> npt.NDArray[np.float32]:
    return np.ones((rows, groups) if bits == 8 else rows, np.float32)


def as_activations(bits: int, x: npt.NDArray[np.int8]) -> npt.NDArray[np.float32] | npt.NDArray[np.int8]:
    return x.astype(np.float32) if bits == 32 else x


def assert_accumulators_equal(problem: Problem, rows: int, rng: np.random.Generator) -> None:
    """Each output shows one accumulator, by a scale that is 1 there and 0 elsewhere; then the sum of all times 2^p."""
    bits, case, shape = problem.bits, problem.case, problem.matmul.shape
    x = integer_rows(bits, rows, case.k, rng)
    dots = accumulators(bits, x, problem.weight)
    ones, bias = no_scale(bits, rows, shape.groups), np.arange(case.n, dtype=np.float32)
    pairs = shape.planes * shape.groups
    columns = np.arange(case.n)
    # Enough rounds that every plane and group is shown somewhere, few where they are many.
    for shift in range(0, pairs, max(case.n, pairs // 4)):
        p, g = np.divmod((columns + shift) % pairs, shape.groups)
        scale = np.zeros((shape.planes, shape.groups, shape.blocks * 16), np.float32)
        scale[p, g, columns] = 1
        expected = dots[:, columns, p, g] + case.bias * columns
        np.testing.assert_array_equal(
            problem.run(as_activations(bits, x), ones, bias, **problem.scales(scale)), expected
        )
    powers = np.float32(2) ** np.arange(shape.planes, dtype=np.float32)
    scale = np.broadcast_to(powers[:, None, None], (shape.planes, shape.groups, shape.blocks * 16))
    expected = (dots.sum(axis=3) * powers.astype(np.int64)).sum(axis=2) + case.bias * columns
    assert np.abs(dots).sum(axis=3).max(initial=0) * 2**shape.planes < 2**24
    scales = problem.scales(np.ascontiguousarray(scale))
    np.testing.assert_array_equal(problem.run(as_activations(bits, x), ones, bias, **scales), expected)


def assert_within_bound(problem: Problem, rows: int, rng: np.random.Generator) -> None:
    """|y - exact| <= gamma_n * (sum of the magnitudes of all terms), n the roundings that a term passes through.

    With PS planes and segments, a term of ``a8`` is multiplied by two scales, added up to PS times, and the bias is
    added: n = PS + 3; where planes share a scale, that scale times a factor differs from the plane's own, which is
    rounded, by one rounding more: n = PS + 4. So it is for ``a1``, whose row scale comes after the sum. A term t x of
    ``a32`` is exact, is added up within its segment of k's, multiplied by a scale, added up over PS, and the bias is
    added: n = k's + PS + 1.
    Fusing a multiplication and an addition leaves a rounding out, and the order of additions makes no difference.
    """
    bits, case, shape = problem.bits, problem.case, problem.matmul.shape
    bias = rng.standard_normal(case.n).astype(np.float32) if case.bias else np.zeros(case.n, np.float32)
    scale = problem.weight.scale.astype(np.float64).transpose(1, 0, 2)
    block = kernel_for(bits, problem.packing).matmul.block
    terms = shape.planes * shape.segments(block)
    if bits == 32:
        x = rng.standard_normal((rows, case.k)).astype(np.float32)
        x_scale = no_scale(bits, rows, shape.groups)
        spread = np.repeat(problem.weight.scale.astype(np.float64), shape.group_size, axis=2)[:, :, : case.k]
        dense = problem.weight.trits() * spread
        exact = x.astype(np.float64) @ dense.sum(axis=0).T
        magnitude = np.abs(x).astype(np.float64) @ np.abs(dense).sum(axis=0).T
        roundings = shape.segment_blocks(block) * block + terms + 1
    else:
        x = integer_rows(bits, rows, case.k, rng)
        x_scale = (rng.random((rows, shape.groups) if bits == 8 else rows) + 0.1).astype(np.float32)
        each = x_scale.astype(np.float64)[:, None, None]
        products = accumulators(bits, x, problem.weight) * scale * (each if bits == 8 else each[..., None])
        exact = products.sum(axis=(2, 3))
        # Not of the groups' sums: those of a group's segments may cancel.
        per_group = x_scale if bits == 8 else np.repeat(x_scale[:, None], shape.groups, axis=1)
        steps = np.repeat(per_group.astype(np.float64), shape.group_size, axis=1)[:, : case.k]
        spread = np.repeat(problem.weight.scale.astype(np.float64), shape.group_size, axis=2)[:, :, : case.k]
        magnitude = (np.abs(x) * steps) @ np.abs(problem.weight.trits() * spread).sum(axis=0).T
        roundings = terms + 4
    exact, magnitude = exact + bias, magnitude + np.abs(bias)
    got = problem.run(x, x_scale, bias).astype(np.float64)
    assert (np.abs(got - exact) <= gamma(roundings) * magnitude).all()
    assert np.linalg.norm(got - exact) <= WORST_RELATIVE * np.linalg.norm(exact)


def cells() -> list[tuple[int, str, str, Case]]:
    """Kernel, target and case: all cases on this host's best target, on the others a quarter of them each.

    Which quarter changes with target and kernel, so that every case meets every kernel on some of the other targets.
    """
    return [
        (*kernel, target, case)
        for i, kernel in enumerate(EVERY_KERNEL)
        for j, target in enumerate(TARGETS)
        for k, case in enumerate(CASES)
        if target == NATIVE.name or (i + j + k) % 4 == 0
    ]


@pytest.mark.parametrize(("bits", "packing", "target", "case"), cells(), ids=str)
def test_kernel_equals_its_reference(bits: int, packing: str, target: str, case: Case) -> None:
    rng = np.random.default_rng(CASES.index(case))
    problem = Problem.make(bits, packing, case, runnable(target), rng)
    for rows in [case.rows] if case.rows else row_counts(problem.matmul.variants):
        assert_accumulators_equal(problem, rows, rng)
        assert_within_bound(problem, rows, rng)


@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
def test_kernel_equals_its_reference_on_a_large_matrix(bits: int, packing: str) -> None:
    rng = np.random.default_rng(0)
    problem = Problem.make(bits, packing, LARGE, NATIVE, rng)
    assert LARGE.rows is not None
    assert_accumulators_equal(problem, LARGE.rows, rng)
    assert_within_bound(problem, LARGE.rows, rng)


LONG_GROUPS, LONG_ROWS = (4099, PerGroup(64)), (100_003, PerChannel())


@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
@pytest.mark.parametrize(
    ("target", "k", "kind"), [*((target, *LONG_ROWS) for target in TARGETS), (NATIVE.name, *LONG_GROUPS)], ids=str
)
def test_largest_sums_do_not_overflow(bits: int, packing: str, target: str, k: int, kind: Granularity) -> None:
    """All weights of a row +1 or -1, all activations of a row 127 or -127: |dot| = 127 K, still below 2^24."""
    signs = np.array([1, -1, 1], np.int8)
    trits = np.broadcast_to(signs[None, :, None], (1, 3, k))
    weight = TernaryTensor.from_trits(trits, np.ones((1, *kind.scale_shape(3, k)), np.float32), kind)
    shape = MatmulShape.of(weight)
    kernel, matmul = kernel_for(bits, packing), Matmul(bits, shape, runnable(target), packing=packing)
    x_signs = np.array([1, -1, -1, 1, 1, -1], np.int8)
    x = np.broadcast_to((x_signs * LARGEST[bits]).astype(np.int8)[:, None], (6, k))
    expected = np.outer(x_signs, signs).astype(np.int64) * LARGEST[bits] * k
    for rows in (1, len(x)):
        values, scales = as_activations(bits, x[:rows]), no_scale(bits, rows, shape.groups)
        activations = rows_of(bits, values, scales, kind, kernel.matmul.block)
        got = matmul(rows, *activations, *kernel.pack(weight).values())
        np.testing.assert_array_equal(got, expected[:rows])


def test_this_host_runs_some_target() -> None:
    assert any(unrunnable(resolve(name)) is None for name in TARGETS), "every equivalence test was skipped"


def test_cases_cross_the_boundaries() -> None:
    assert {case.planes for case in CASES} == {1, 2, 3, 4}
    assert {type(case.kind) for case in CASES} == {PerTensor, PerChannel, PerGroup}
    assert {case.bias for case in CASES} == {case.rows is None for case in CASES} == {False, True}
    groups = [case for case in CASES if isinstance(case.kind, PerGroup)]
    assert any(case.kind.group_size(case.k) % 16 and case.k % case.kind.group_size(case.k) for case in groups)
    assert any(not case.k % case.kind.group_size(case.k) for case in groups)
    for low, high in pairwise((1, 16, 32, 64, 128)):
        assert any(low <= case.n < high for case in CASES)
        assert any(low <= case.k < high for case in CASES)
