"""CUDA matmuls as generated code in the emulator, against references that share nothing with them.

The emulator also finds races, reads of what nothing wrote, accesses outside of an array and results that are missing or
written twice, in every case here.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tvm

from tests.cuda_emulator import Out, Worker
from tests.cuda_matmul import Layer
from tests.ternary_matmul import gamma, rows_of
from tvm_ternary.formats import PerChannel, PerGroup, TernaryTensor, pack_planes
from tvm_ternary.kernels.activations import reference_int8_rows, reference_ternary_rows
from tvm_ternary.kernels.float32 import reference_a32
from tvm_ternary.kernels.half import packed_half, reference_half_rows
from tvm_ternary.kernels.int8 import reference_a8_accumulators
from tvm_ternary.kernels.matmul import Epilogue, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.quantize import quantize
from tvm_ternary.schedule import dispatch
from tvm_ternary.schedule.cuda.matmul import matmul_function
from tvm_ternary.schedule.cuda.variant import CudaVariant
from tvm_ternary.target import resolve

FEW = CudaVariant(8, 32, 1, 4, 3)
MANY = CudaVariant(32, 32, 2, 2, 3, shared=True)
WIDE = CudaVariant(16, 64, 2, 1, 4, shared=True)
KINDS = {"a8": (8, False), "a16": (16, False), "abf16": (16, True), "a1": (1, False)}


def activations(
    kind: str, x: npt.NDArray[np.float32], weight: TernaryTensor
) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.float64]]:
    """What a kernel reads, packed by numpy, and the numbers that it stands for."""
    (bits, bfloat), shape, k = KINDS[kind], MatmulShape.of(weight), x.shape[1]
    if bits == 8:
        q, scale = reference_int8_rows(x, shape)
        packed = rows_of(8, q, scale, weight.granularity)
        spread = np.repeat(scale, shape.group_size, axis=1)[:, :k]
        return dict(zip(("x_q", "x_sum", "x_scale"), packed, strict=True)), q.astype(np.float64) * spread
    if bits == 16:
        rounded = reference_half_rows(x, "bfloat16" if bfloat else "float16")
        padded = packed_half(rounded, shape)
        half = (padded.view(np.uint32) >> 16).astype(np.uint16) if bfloat else padded.astype(np.float16)
        return {"x_half": half}, rounded.astype(np.float64)
    trits, scale = np.sign(np.round(x)).astype(np.int8), np.abs(x).mean(axis=1)
    packed = rows_of(1, trits, scale, weight.granularity)
    return dict(zip(("x_bits", "x_scale"), packed, strict=True)), trits * scale[:, None].astype(np.float64)


def bound(x: npt.NDArray[np.float64], weight: TernaryTensor) -> npt.NDArray[np.float64]:
    """What rounding to float32 may change: each of K products once in its scaling and once in each sum it is part of.

    Planes are rounded by themselves where they are multiplied by themselves, so their sizes count, not their sum.
    """
    k = weight.shape[1]
    scale = np.repeat(np.abs(weight.scale.astype(np.float64)), weight.granularity.group_size(k), axis=2)[:, :, :k]
    sizes = (np.abs(weight.trits()) * scale).sum(axis=0)
    return gamma(k + 8) * (np.abs(x) @ sizes.T) + 1e-30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("variant", "m", "n", "k", "suffix"),
    [
        (FEW, 1, 64, 256, "1"),
        (FEW, 7, 70, 1000, "3"),
        (FEW, 8, 33, 300, "2g32"),
        (CudaVariant(16, 32, 2, 2, 2), 11, 70, 333, "1g128"),
        (MANY, 33, 100, 512, "1"),
        (MANY, 40, 100, 516, "3g64"),
        (WIDE, 17, 129, 100, "2g24"),
        (WIDE, 16, 128, 1100, "1g600"),
        (CudaVariant(64, 32, 1, 4, 2, shared=True), 65, 20, 260, "1pt"),
    ],
)
def test_equals_its_reference(kind: str, variant: CudaVariant, m: int, n: int, k: int, suffix: str) -> None:
    rng = np.random.default_rng(n * k)
    weight = quantize(rng.standard_normal((n, k)).astype(np.float32), f"t{suffix[0]}{kind}{suffix[1:]}")
    packed, x = activations(kind, rng.standard_normal((m, k)).astype(np.float32), weight)
    bits, bfloat = KINDS[kind]
    got = Layer(weight, bits, m, variant, bfloat=bfloat).multiply(packed, seed=k)
    assert (np.abs(got - reference_a32(x, weight)) <= bound(x, weight)).all()


@pytest.mark.parametrize("variant", [FEW, MANY])
@pytest.mark.parametrize("group", [None, 96])
def test_int8_sums_are_exact(variant: CudaVariant, group: int | None) -> None:
    """With scales of one the results are the integers themselves."""
    rng = np.random.default_rng(1)
    m, n, k = 8, 48, 700
    trits = rng.integers(-1, 2, (n, k))
    granularity = PerChannel() if group is None else PerGroup(group)
    planes = pack_planes(trits > 0, trits < 0)[None]
    weight = TernaryTensor(planes, np.ones((1, n, granularity.groups(k)), np.float32), (n, k), granularity)
    q = rng.integers(-127, 128, (m, k)).astype(np.int8)
    packed = rows_of(8, q, np.ones((m, granularity.groups(k)), np.float32), granularity)
    got = Layer(weight, 8, m, variant).multiply(dict(zip(("x_q", "x_sum", "x_scale"), packed, strict=True)))
    want = reference_a8_accumulators(q, weight).sum(axis=(2, 3))
    np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("scheme", ["t1a8", "t4a8", "t2a8g512"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(scheme: str, sign: int) -> None:
    """All weights alike and all activations at their limit, K beyond what a row may sum up at once."""
    n, k = 16, 70_003
    weight = quantize(np.full((n, k), 0.5 * sign, np.float32), scheme)
    x = np.full((1, k), 3.0, np.float32)
    packed, exact = activations("a8", x, weight)
    got = Layer(weight, 8, 1, CudaVariant(8, 32, 1, 8, 2), checked=False).multiply(packed)
    np.testing.assert_allclose(got, reference_a32(exact, weight), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", [Epilogue(True, "gelu", True), Epilogue(True), Epilogue(False, "relu", True)])
def test_the_epilogue(kind: str, epilogue: Epilogue) -> None:
    rng = np.random.default_rng(2)
    m, n, k = 9, 36, 128
    weight = quantize(rng.standard_normal((n, k)).astype(np.float32), f"t1{kind}")
    packed, x = activations(kind, rng.standard_normal((m, k)).astype(np.float32), weight)
    bias, residual = (rng.standard_normal(size).astype(np.float32) for size in ((n,), (m, n)))
    others = {"bias": bias} if epilogue.bias else {}
    others |= {"residual": residual} if epilogue.residual else {}
    bits, bfloat = KINDS[kind]
    got = Layer(weight, bits, m, WIDE, bfloat=bfloat, epilogue=epilogue).multiply(packed, **others)
    want = reference_a32(x, weight) + (bias if epilogue.bias else 0)
    if epilogue.activation == "gelu":
        want = want * 0.5 * (1 + np.vectorize(math.erf)(want / math.sqrt(2)))
    if epilogue.activation == "relu":
        want = np.maximum(want, 0)
    want = want + (residual if epilogue.residual else 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["1", "3g24"])
def test_the_definition_on_a_cpu_gives_the_same(kind: str, suffix: str) -> None:
    """The plain definition, lowered to LLVM: the mathematics without the schedule."""
    rng = np.random.default_rng(3)
    m, n, k = 5, 37, 100
    weight = quantize(rng.standard_normal((n, k)).astype(np.float32), f"t{suffix[0]}{kind}{suffix[1:]}")
    packed, x = activations(kind, rng.standard_normal((m, k)).astype(np.float32), weight)
    bits, bfloat = KINDS[kind]
    row, shape = kernel_for(bits, bfloat=bfloat), MatmulShape.of(weight)
    plain = define_matmul(row.matmul, shape, (Variant(Tile(1, 1), None, threads="one"),))
    library = tvm.compile(tvm.IRModule({"main": plain.with_attr("global_symbol", "main")}), "llvm")
    operands = [tvm.runtime.tensor(packed[o.name]) for o in row.matmul.activations]
    if bfloat:
        operands = [_bfloat16(packed["x_half"])]
    y = tvm.runtime.empty((m, n), "float32")
    library["main"](*operands, *map(tvm.runtime.tensor, row.pack(weight).values()), y)
    assert (np.abs(y.numpy() - reference_a32(x, weight)) <= bound(x, weight)).all()


def _bfloat16(bits: npt.NDArray[np.uint16]) -> Any:
    return tvm.runtime.tensor(bits.view(ml_dtypes.bfloat16))


def test_one_function_serves_any_number_of_rows() -> None:
    """With symbolic M it holds a kernel for each variant, and launches none for no rows."""
    variants = [CudaVariant(8, 32, 1, 4, 3, max_rows=8), MANY]
    function = matmul_function(kernel_for(8).matmul, MatmulShape(64, 128, 1, 1, 128), variants)
    text = function.script()
    assert text.count('T.launch_thread("threadIdx.x", 128)') == 2
    assert "M <= T.int64(8)" in text
    assert "M > T.int64(0)" in text or "T.int64(0) < M" in text
    assert function.attrs["tirx.is_scheduled"] == 1


def test_only_the_variant_for_a_known_number_of_rows_is_built() -> None:
    variants = [CudaVariant(8, 32, 1, 4, 3, max_rows=8), MANY]
    for rows, threads in ((8, 128), (9, 128)):
        function = matmul_function(kernel_for(8).matmul, MatmulShape(64, 128, 1, 1, 128), variants, rows=rows)
        assert function.script().count(f'T.launch_thread("threadIdx.x", {threads})') == 1


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows_through_the_host_code(gpu: Worker, kind: str) -> None:
    """Rows prepared and multiplied as TVM's host code launches them: none, few, many; the variants of the files."""
    rng = np.random.default_rng(4)
    n, k = 70, 300
    weight = quantize(rng.standard_normal((n, k)).astype(np.float32), f"t2{kind}g128")
    layer = dispatch.Layer(MatmulShape.of(weight), *KINDS[kind][:1], bfloat=KINDS[kind][1])
    target = resolve("cuda-sm_90")
    matmul, source = dispatch.matmul_of(layer, target, epilogue=Epilogue(bias=True))
    assert source == f"rule:cuda-sm_90/matmul_{kind}.toml"
    rows, kernel, bias = dispatch.rows_of(layer, target), layer.kernel.matmul, rng.standard_normal(n).astype(np.float32)
    for m in (0, 1, 9, 40):
        x = rng.standard_normal((m, k)).astype(np.float32)
        made = [np.zeros(o.shape(layer.shape, m), getattr(ml_dtypes, o.dtype, o.dtype)) for o in kernel.activations]
        y = np.full((m, n), np.nan, np.float32)
        gpu.run(rows, x, *map(Out, made), target=target.tvm)
        gpu.run(matmul, *made, *layer.kernel.pack(weight).values(), bias, Out(y), target=target.tvm)
        assert gpu.counters["launches"] == (1 if m else 0)
        _, exact = activations(kind, x, weight) if kind != "a1" else (None, _of_trits(x))
        np.testing.assert_allclose(y, reference_a32(exact, weight) + bias, rtol=1e-5, atol=1e-4)


def _of_trits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    trits, scale = reference_ternary_rows(x) if len(x) else (x, np.zeros(0))
    return trits * scale[:, None]
