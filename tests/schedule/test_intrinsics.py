"""Tensor intrinsics: an implementation computes what its description says, with the instructions its tier is for."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm.s_tir import TensorIntrin

from tests.ternary_matmul import TARGETS as NAMED
from tests.ternary_matmul import build, runnable
from tvm_ternary.formats import PACKINGS
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape, Variant
from tvm_ternary.kernels.table import EVERY_KERNEL, KERNELS, kernel_for
from tvm_ternary.schedule.intrinsics import BYTE_DOTS, IMPLEMENTATIONS, ONE_ROW, decode_intrinsic, matmul_intrinsic
from tvm_ternary.schedule.ternary import matmul_function
from tvm_ternary.schedule.tiles import load_tiles
from tvm_ternary.target import TIERS, Target, resolve

# One group a row: a loop over the four blocks of a small group would be unrolled away, and with it what is looked for.
SHAPE = MatmulShape(512, 1024, 2, 1, 1024)
# A CPU with nothing beyond its architecture's baseline takes the portable intrinsics; no named target does.
PORTABLE = '{"kind": "llvm"}'
TARGETS = tuple(dict.fromkeys((PORTABLE, *NAMED)))
WIDE = tuple(name for name in TARGETS if TIERS[resolve(name).tier].vector_bits == 512)
LOOP_END = re.compile(r"^\s+(?:j\w+|b\.\w+|cbn?z|tbn?z)\b.*?(\.L\w+)")
LABEL = re.compile(r"^(\.L\w+):")
# What only the loop over k does: multiply vectors, or count their bits.
PRODUCT = re.compile(r"vpdpbusd|pmadd|sdot|mul (?:nsw )?<32 x i16>|ctpop")
FLOAT_PRODUCT = re.compile(r"fmuladd")
VECTOR_STORE = re.compile(r"^\s+v?mov\w*\s+%[xyz]mm\d+.*,\s*[-\w]*\(")


@cache
def both(bits: int, target: str) -> Any:
    """The description and the implementation of a kernel's intrinsic, compiled as functions of one block."""
    resolved = runnable(target)
    intrinsic = TensorIntrin.get(matmul_intrinsic(KERNELS[bits].matmul, resolved.tier))
    return build({"description": intrinsic.desc, "implementation": intrinsic.impl}, resolved)


def run(library: Any, name: str, *operands: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The accumulators, the last operand, after the update."""
    tensors = [tvm.runtime.tensor(operand) for operand in operands]
    library[name](*tensors)
    return np.asarray(tensors[-1].numpy())


def code_words(rng: np.random.Generator, only: int | None) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Sixteen words and their codes (16 n, 16 k), 0 to 2; k = 4 s + j stands at bit 8 j + 2 s."""
    codes = rng.integers(0, 3, (16, 16)) if only is None else np.full((16, 16), only)
    k = np.arange(16)
    words = (codes << (8 * (k % 4) + 2 * (k // 4))).sum(axis=1)
    return words.astype(np.uint32), codes


seeds = st.integers(0, 2**32 - 1)
# None: any; a number: all of them that, which makes the largest sums.
codes = st.sampled_from([None, 0, 1, 2])
activations = st.sampled_from([None, -127, 127])


@pytest.mark.parametrize("target", TARGETS)
@given(seed=seeds, code=codes, activation=activations)
def test_int8_block_adds_codes_times_activations(
    target: str, seed: int, code: int | None, activation: int | None
) -> None:
    library, rng = both(8, target), np.random.default_rng(seed)
    words, values = code_words(rng, code)
    x = rng.integers(-127, 128, 16, dtype=np.int8) if activation is None else np.full(16, activation, np.int8)
    acc = rng.integers(-(2**30), 2**30, 16, dtype=np.int32)
    expected = acc + values @ x.astype(np.int64)
    for name in ("description", "implementation"):
        np.testing.assert_array_equal(run(library, name, words, x, acc), expected)


@cache
def dense_blocks(target: str, ahead: bool) -> Any:
    """As `both`, for five trits a byte; with ``ahead`` the block of a tile of one row."""
    resolved = runnable(target)
    intrinsic = TensorIntrin.get(matmul_intrinsic(kernel_for(8, "dense").matmul, resolved.tier, ahead=ahead))
    return build({"description": intrinsic.desc, "implementation": intrinsic.impl}, resolved)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@given(seed=seeds, code=codes, activation=activations)
def test_dense_block_adds_digits_times_activations_times_minus_256(
    target: str, ahead: bool, seed: int, code: int | None, activation: int | None
) -> None:
    library, rng = dense_blocks(target, ahead), np.random.default_rng(seed)
    values = rng.integers(0, 3, (16, 5, 4)) if code is None else np.full((16, 5, 4), code)
    numbers = (values * 3 ** np.arange(4, -1, -1)[:, None]).sum(axis=1)
    words = (-(-256 * numbers // 243)).astype(np.uint8).view("<u4")[:, 0]
    x = rng.integers(-127, 128, 20, dtype=np.int8) if activation is None else np.full(20, activation, np.int8)
    acc = rng.integers(-(2**30), 2**30, 16, dtype=np.int32)
    expected = acc - 256 * (values.reshape(16, 20) @ x.astype(np.int64))
    for name in ("description", "implementation"):
        np.testing.assert_array_equal(run(library, name, words, x, acc), expected)


@pytest.mark.parametrize("target", TARGETS)
@given(seed=seeds, code=codes)
def test_float_block_adds_minus_two_trits_times_activations(target: str, seed: int, code: int | None) -> None:
    """With whole numbers no addition rounds; with others, sixteen of them err by less than 17 u of all terms."""
    library, rng = both(32, target), np.random.default_rng(seed)
    words, values = code_words(rng, code)
    doubled = -2 * (values - 1)
    whole = rng.integers(-1000, 1000, 16).astype(np.float32)
    acc = rng.integers(-1000, 1000, 16).astype(np.float32)
    for name in ("description", "implementation"):
        np.testing.assert_array_equal(run(library, name, words, whole, acc), acc + doubled @ whole)
    x = rng.standard_normal(16).astype(np.float32)
    exact = acc + doubled @ x.astype(np.float64)
    terms = np.abs(acc) + np.abs(doubled) @ np.abs(x)
    for name in ("description", "implementation"):
        assert (np.abs(run(library, name, words, x, acc) - exact) <= 17 * 2.0**-24 * terms).all()


@pytest.mark.parametrize("target", TARGETS)
@given(seed=seeds, full=st.booleans())
def test_ternary_block_adds_the_dot_product_of_trits(target: str, seed: int, full: bool) -> None:
    library, rng = both(1, target), np.random.default_rng(seed)
    weight, x = rng.integers(-1, 2, (16, 32)), rng.integers(-1, 2, 32)
    if full:
        weight[:], x[:] = rng.choice([-1, 1], (16, 1)), rng.choice([-1, 1])
    bits = 2 ** np.arange(32, dtype=np.uint64)
    planes = np.stack([(weight != 0) @ bits, (weight < 0) @ bits]).astype(np.uint32)
    words = np.array([(x != 0) @ bits, (x < 0) @ bits], np.uint32)
    acc = rng.integers(-(2**30), 2**30, 16, dtype=np.int32)
    for name in ("description", "implementation"):
        np.testing.assert_array_equal(run(library, name, planes, words, acc), acc + weight @ x)


@cache
def panel_blocks(target: str) -> Any:
    """As `both`, for the multiplication by a decoded block."""
    resolved, panel = runnable(target), KERNELS[8].matmul.panel
    assert panel is not None
    intrinsic = TensorIntrin.get(matmul_intrinsic(panel.matmul(SHAPE), resolved.tier))
    return build({"description": intrinsic.desc, "implementation": intrinsic.impl}, resolved)


@pytest.mark.parametrize("target", TARGETS)
@given(seed=seeds, byte=st.sampled_from([None, 0, 127]), activation=st.sampled_from([None, -128, 127]))
def test_panel_block_adds_bytes_times_activations(
    target: str, seed: int, byte: int | None, activation: int | None
) -> None:
    """With the largest bytes that a dot product takes, and any activation that a byte holds."""
    library, rng = panel_blocks(target), np.random.default_rng(seed)
    panel = rng.integers(0, 128, (4, 16, 4)) if byte is None else np.full((4, 16, 4), byte)
    x = rng.integers(-128, 128, 16) if activation is None else np.full(16, activation)
    acc = rng.integers(-(2**30), 2**30, 16, dtype=np.int32)
    expected = acc + np.einsum("snj,sj->n", panel, x.reshape(4, 4))
    for name in ("description", "implementation"):
        got = run(library, name, panel.astype(np.uint8), x.astype(np.int8), acc)
        np.testing.assert_array_equal(got, expected)


@cache
def decoding(planes: int, target: str) -> Any:
    """As `both`, for the decoding of one block of so many planes."""
    intrinsic = TensorIntrin.get(decode_intrinsic(KERNELS[8].matmul, planes))
    return build({"description": intrinsic.desc, "implementation": intrinsic.impl}, runnable(target))


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("target", TARGETS)
@given(seed=seeds, code=codes)
def test_decoded_block_holds_the_codes_or_the_sum_of_planes(
    target: str, planes: int, seed: int, code: int | None
) -> None:
    """The k's of a word stand four by four: byte (s, n, j) is k = 4 s + j of output n."""
    library, rng = decoding(planes, target), np.random.default_rng(seed)
    drawn = [code_words(rng, code) for _ in range(planes)]
    words = np.stack([words for words, _ in drawn]).reshape(planes, 1, 1, 16)
    values = np.stack([values for _, values in drawn])
    # Planes share 63 steps on either side of the middle.
    factor = rng.integers(-(63 // planes), 63 // planes + 1, (planes, 1, 16))
    expected = values[0] if planes == 1 else 64 + (factor.transpose(0, 2, 1) * (values - 1)).sum(axis=0)
    operands = [words, *([factor.astype(np.int8)] if planes > 1 else []), np.zeros((1, 1, 1, 4, 16, 4), np.uint8)]
    for name in ("description", "implementation"):
        panel = run(library, name, *operands).reshape(4, 16, 4)
        np.testing.assert_array_equal(panel, expected.reshape(16, 4, 4).transpose(1, 0, 2))


def test_every_kernel_has_an_implementation_for_every_tier() -> None:
    kernels = {kernel_for(*key).matmul.name for key in EVERY_KERNEL}
    panels = {row.matmul.panel.matmul(SHAPE).name for row in KERNELS.values() if row.matmul.panel}
    assert set(IMPLEMENTATIONS) == kernels | panels
    assert set(ONE_ROW) <= kernels
    for rows in (BYTE_DOTS, *IMPLEMENTATIONS.values()):
        assert rows.keys() == TIERS.keys()


def test_targets_are_of_all_tiers_of_this_architecture() -> None:
    every = frozenset().union(*(resolve(name).features for name in NAMED))
    assert {resolve(name).tier for name in TARGETS} == {name for name, tier in TIERS.items() if tier.features <= every}


def test_the_name_says_kernel_and_tier() -> None:
    assert matmul_intrinsic(KERNELS[8].matmul, "avx512") == "ternary.matmul_a8.avx512"


@cache
def listing(bits: int, target: str, kind: str, packing: str = "fast") -> str:
    """The ``asm`` or ``ll`` of a kernel, with every variant in it. Needs no CPU of that kind."""
    resolved = resolve(target)
    return str(compiled(kernel_for(bits, packing).matmul, resolved).mod.inspect_source(kind))


def tiles_of(kernel: MatmulKernel, tier: str) -> tuple[Variant, ...]:
    return load_tiles(kernel.name, tier).of(SHAPE.planes)


@cache
def compiled(kernel: MatmulKernel, target: Target) -> Any:
    function = matmul_function(kernel, SHAPE, tiles_of(kernel, target.tier), target.tier)
    return build({"matmul": function}, target)


@pytest.mark.parametrize(
    ("bits", "target", "instruction"),
    [
        (8, "amx", "vpdpbusd"),
        (8, "avx512-vnni", "vpdpbusd"),
        (8, "avx2-vnni", r"{vex}\s+vpdpbusd"),
        (8, "x86-64-v4", "vpmaddubsw"),
        (8, "x86-64-v3", "vpmaddubsw"),
        (8, "x86-64-v2", "pmaddubsw"),
        (8, '{"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu"}', "pmullw"),
        (8, "aarch64", "sdot"),
        (8, "avx512-vnni", "prefetcht0"),
        (32, "aarch64", "prfm"),
        (1, "avx512-vnni", "vpopcntb"),
        (1, "avx512-vnni", "vpdpbusd"),
        (32, "avx512-vnni", "vfmadd"),
        (32, "x86-64-v3", "vfmadd"),
        (32, "aarch64", "fmla"),
        (1, "aarch64", "cnt"),
        (1, "aarch64", "sdot"),
        (1, "x86-64-v3", "vpshufb"),
        (1, "avx2-vnni", r"{vex}\s+vpdpbusd"),
    ],
)
def test_the_instruction_that_a_tier_is_for_does_the_work(bits: int, target: str, instruction: str) -> None:
    assert any(re.search(rf"^\s+{instruction}", line) for loop in inner_loops(bits, target) for line in loop)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("avx512-vnni", "vpavgb"),
        ("avx2-vnni", "vpavgb"),
        ("x86-64-v4", "vpavgb"),
        ("x86-64-v3", "vpavgb"),
        ("x86-64-v2", "pavgb"),
        ("aarch64", "urhadd"),
    ],
)
def test_digits_are_made_by_averages_of_bytes_alone(target: str, instruction: str) -> None:
    """No byte is widened for one, and none is multiplied on x86."""
    loops = [loop for loop in inner_loops(8, target, "dense") if any(instruction in line for line in loop)]
    assert loops
    for loop in loops:
        assert not [line for line in loop if re.match(r"^\s+(?:v?pmull|v?pmovzx|v?packus|vpmovwb|u?xtl|uaddl)", line)]


@pytest.mark.parametrize("target", TARGETS)
def test_float_kernel_makes_floats_of_codes_by_their_bits(target: str) -> None:
    """No table is looked up and no integer is converted."""
    conversions = r"^\s+(?:\w*gather\w*|v?cvt\w*2ps\w*|v?cvtsi2ss\w*|[su]cvtf)\b"
    assert not re.findall(conversions, listing(32, target, "asm"), re.M)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
def test_accumulators_are_no_memory_to_the_inner_loop(bits: int, packing: str, target: str) -> None:
    """LLVM has made values of them all: the loop over k stores nothing."""
    # Floats are multiplied by scales, too, after the loop over k.
    product = FLOAT_PRODUCT if bits == 32 else PRODUCT
    loops = [block for block in self_loops(listing(bits, target, "ll", packing)) if product.search(block)]
    variants = tiles_of(kernel_for(bits, packing).matmul, resolve(target).tier)
    assert len(loops) >= sum(not variant.tiles for variant in variants)
    for loop in loops:
        assert " store " not in loop


@pytest.mark.parametrize("target", WIDE)
@pytest.mark.parametrize("packing", PACKINGS)
def test_one_row_needs_no_memory_but_what_it_reads(packing: str, target: str) -> None:
    """With 32 registers of 16 lanes. Tiles of several rows, with 16 accumulators, spill some of the decoded weights,
    and are the fastest that were measured."""
    resolved, kernel = resolve(target), kernel_for(8, packing).matmul
    variants = (replace(tiles_of(kernel, resolved.tier)[0], max_rows=None),)
    library = build({"matmul": matmul_function(kernel, SHAPE, variants, resolved.tier)}, resolved)
    loops = loops_in(str(library.mod.inspect_source("asm")))
    assert loops
    for loop in loops:
        assert not [line for line in loop if VECTOR_STORE.match(line)]


def inner_loops(bits: int, target: str, packing: str = "fast") -> list[list[str]]:
    """Those of a kernel, as `loops_in` finds them."""
    return loops_in(listing(bits, target, "asm", packing))


def loops_in(assembly: str) -> list[list[str]]:
    """Loops of the assembly with no label inside, without the scalar ones that copy or count."""
    lines = assembly.splitlines()
    places = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
    loops = []
    for i, line in enumerate(lines):
        match = LOOP_END.match(line)
        start = places.get(match[1], i) if match else i
        body = lines[start + 1 : i]
        if start < i and not any(LABEL.match(other) for other in body) and len(body) > 60:
            loops.append(body)
    return loops


def self_loops(text: str) -> list[str]:
    """Basic blocks of LLVM IR that branch to themselves."""
    blocks = re.split(r"\n(?=[\w.]+:)", text)
    return [block for block in blocks if re.search(rf"br i1 .*label %{re.escape(block.partition(':')[0])}\b", block)]


@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
def test_every_kernel_compiles_for_another_architecture(bits: int, packing: str, tmp_path: Path) -> None:
    """An object file for aarch64, which ELF numbers 183."""
    target, kernel = resolve("aarch64"), kernel_for(bits, packing)
    for library in (compiled(kernel.matmul, target), build({"rows": kernel.rows(SHAPE)}, target)):
        path = tmp_path / "kernel.o"
        library.mod.write_to_file(str(path), "o")
        header = path.read_bytes()[:20]
        assert header[:4] == b"\x7fELF"
        assert int.from_bytes(header[18:], "little") == 183
