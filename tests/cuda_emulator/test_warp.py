"""Collectives, matrix fragments and arithmetic, each against numpy."""

import numpy as np
import pytest

from tests import cuda_emulator as emulator
from tests.cuda_emulator import Out

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4  # groupID and threadID_in_group of the PTX ISA


def launch(body: str, parameters: str, args: list, *, threads: int = 32) -> None:
    source = f'extern "C" __global__ void k({parameters}) {{\nconst int i = threadIdx.x;\n{body}\n}}\n'
    emulator.compile(source, checked=True).launch("k", 1, threads, 0, args)


def mma(name: str, a: np.ndarray, b: np.ndarray, number: str) -> np.ndarray:
    """Load fragments by the layouts of the PTX ISA, multiply, store; returns (16, 8).

    a is (16, k) row-major, b is (8, k): column-major (k, 8); both as they lie in 32-bit words.
    """
    words_a, words_b = a.view(np.uint32), b.view(np.uint32)
    fragment_a = np.stack([words_a[GROUP + 8 * (r % 2), MEMBER + 4 * (r // 2)] for r in range(4)], axis=1)
    fragment_b = np.stack([words_b[GROUP, MEMBER + 4 * r] for r in range(2)], axis=1)
    d = np.zeros((32, 4), np.int32 if number == "int" else np.float32)
    body = f"""
    {number} sum[4] = {{1, 1, 1, 1}};
    {name}(sum, a + 4 * i, b + 2 * i);
    for (int j = 0; j < 4; ++j) d[4 * i + j] = sum[j];
    """
    launch(
        body,
        f"{number}* d, const unsigned* a, const unsigned* b",
        [Out(d), np.ascontiguousarray(fragment_a), np.ascontiguousarray(fragment_b)],
    )
    result = np.zeros((16, 8), d.dtype)
    for r in range(4):
        result[GROUP + 8 * (r // 2), 2 * MEMBER + r % 2] = d[:, r]
    return result - 1


@pytest.mark.parametrize(("name", "dtype"), [("u8s8", np.uint8), ("s8s8", np.int8)])
def test_products_of_bytes(rng: np.random.Generator, name: str, dtype: type) -> None:
    a = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (16, 32), dtype, endpoint=True)
    b = rng.integers(-128, 127, (8, 32), np.int8, endpoint=True)
    result = mma(f"tt_emu_mma_m16n8k32_{name}", a, b, "int")
    np.testing.assert_array_equal(result, a.astype(np.int32) @ b.T.astype(np.int32))


def test_products_of_halves(rng: np.random.Generator) -> None:
    a, b = (rng.integers(-8, 9, (n, 16)).astype(np.float16) for n in (16, 8))
    np.testing.assert_array_equal(mma("tt_emu_mma_m16n8k16_f16", a, b, "float"), a.astype("f4") @ b.T.astype("f4"))


def test_products_of_bfloat16(rng: np.random.Generator) -> None:
    a, b = (rng.integers(-8, 9, (n, 16)).astype(np.float32) for n in (16, 8))
    halves = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
    np.testing.assert_array_equal(mma("tt_emu_mma_m16n8k16_bf16", *halves, "float"), a @ b.T)


def test_products_of_bits(rng: np.random.Generator) -> None:
    a, b = (rng.integers(0, 256, (n, 32), np.uint8) for n in (16, 8))
    bits_a, bits_b = (np.unpackbits(x, axis=1).astype(np.int32) for x in (a, b))
    np.testing.assert_array_equal(mma("tt_emu_mma_m16n8k256_b1_and_popc", a, b, "int"), bits_a @ bits_b.T)


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(rng: np.random.Generator, transposed: int) -> None:
    matrices = rng.integers(0, 65536, (4, 8, 8), np.uint16)
    d = np.zeros((32, 4), np.uint32)
    body = f"""
    __shared__ alignas(16) uint4 s[32];
    s[i] = x[i];
    __syncwarp();
    unsigned r[4];
    tt_emu_ldmatrix(r, s + i, 4, {transposed});
    for (int j = 0; j < 4; ++j) d[4 * i + j] = r[j];
    """
    launch(body, "unsigned* d, const uint4* x", [Out(d), matrices])
    shown = matrices.transpose(0, 2, 1) if transposed else matrices
    expected = np.ascontiguousarray(shown).view(np.uint32).reshape(4, 32).T
    np.testing.assert_array_equal(d, expected)


def test_shuffles() -> None:
    y = np.zeros((6, 32), np.int32)
    body = """
    y[i] = __shfl_xor_sync(0xffffffff, i, 5);
    y[32 + i] = __shfl_down_sync(0xffffffff, i, 3, 8);
    y[64 + i] = __shfl_up_sync(0xffffffff, i, 3, 8);
    y[96 + i] = __shfl_sync(0xffffffff, i, 6, 16);
    y[128 + i] = (int)__shfl_xor_sync(0xffffffff, (long long)i << 40, 1) + (int)(__shfl_xor_sync(-1u, (double)i, 1));
    y[160 + i] = (int)(float)__shfl_xor_sync(0xffffffff, half((float)i), 16);
    """
    launch(body, "int* y", [Out(y)])
    expected = [
        LANES ^ 5,
        np.where(LANES % 8 + 3 < 8, LANES + 3, LANES),
        np.where(LANES % 8 - 3 >= 0, LANES - 3, LANES),
        LANES // 16 * 16 + 6,
        LANES ^ 1,
        LANES ^ 16,
    ]
    np.testing.assert_array_equal(y, expected)


def test_masks_of_diverged_lanes() -> None:
    """Half a warp reduces alone, by the mask that __activemask gave it; votes count who is in the mask."""
    y = np.zeros((3, 32), np.uint32)
    body = """
    unsigned v = i, mask = 0;
    if (i < 16) {
      mask = __activemask();
      for (int d = 8; d; d /= 2) v += __shfl_xor_sync(mask, v, d);
    }
    __syncwarp();
    y[i] = v;
    y[32 + i] = mask;
    y[64 + i] = __ballot_sync(0xffffffff, i % 3 == 0) + __any_sync(-1u, i == 7) + 2 * __all_sync(-1u, i != 7);
    """
    launch(body, "unsigned* y", [Out(y)])
    np.testing.assert_array_equal(y[0], np.where(LANES < 16, 120, LANES))
    np.testing.assert_array_equal(y[1], np.where(LANES < 16, 0xFFFF, 0))
    np.testing.assert_array_equal(y[2], np.full(32, sum(1 << i for i in range(0, 32, 3)) + 1))


def test_a_lane_that_is_not_there_gives_poison() -> None:
    y = np.zeros(20, np.float32)
    launch("y[i] = __shfl_down_sync(0xffffffff, (float)i, 4);", "float* y", [Out(y)], threads=20)
    np.testing.assert_array_equal(y, [*range(4, 20), *[np.nan] * 4])


def test_integer_intrinsics(rng: np.random.Generator) -> None:
    a, b, c = (rng.integers(0, 2**32, 32, np.uint32) for _ in range(3))
    y = np.zeros((7, 32), np.uint32)
    body = """
    y[i] = __dp4a((int)a[i], (int)b[i], (int)c[i]);
    y[32 + i] = __dp4a(a[i], b[i], c[i]);
    y[64 + i] = tt_emu_dp4a_u8s8(a[i], b[i], c[i]);
    y[96 + i] = __byte_perm(a[i], b[i], 0x2705);
    y[128 + i] = tt_emu_lop3(a[i], b[i], c[i], 0x6a);
    y[160 + i] = __popc(a[i]) + 100 * __clz(a[i] >> i) + 10000 * __brev(1u << i);
    y[192 + i] = __funnelshift_r(a[i], b[i], i) ^ __umulhi(a[i], b[i]);
    """
    launch(body, "unsigned* y, const unsigned* a, const unsigned* b, const unsigned* c", [Out(y), a, b, c])

    def dot(left: type, right: type) -> np.ndarray:
        products = a.view(left).reshape(32, 4).astype(np.int64) * b.view(right).reshape(32, 4)
        return (products.sum(1) + c).astype(np.uint32)

    np.testing.assert_array_equal(y[0], dot(np.int8, np.int8))
    np.testing.assert_array_equal(y[1], dot(np.uint8, np.uint8))
    np.testing.assert_array_equal(y[2], dot(np.uint8, np.int8))
    eight = np.concatenate([a.view(np.uint8).reshape(32, 4), b.view(np.uint8).reshape(32, 4)], axis=1)
    np.testing.assert_array_equal(y[3], np.ascontiguousarray(eight[:, [5, 0, 7, 2]]).view(np.uint32)[:, 0])
    np.testing.assert_array_equal(y[4], (a & b) ^ c)  # 0xf0 & 0xcc ^ 0xaa
    length = np.array([int(v >> i).bit_length() for i, v in enumerate(a)])
    shifted = 100 * np.maximum(32 - length, 0)
    popc = np.bitwise_count(a).astype(np.int64) + shifted + 10000 * (1 << (31 - LANES))
    np.testing.assert_array_equal(y[5], popc.astype(np.uint32))
    wide = (b.astype(np.uint64) << np.uint64(32) | a) >> LANES.astype(np.uint64)
    high = a.astype(np.uint64) * b >> np.uint64(32)
    np.testing.assert_array_equal(y[6], (wide ^ high).astype(np.uint32))


def halves(rng: np.random.Generator, n: int) -> np.ndarray:
    """Every kind of half: zeros, subnormals, infinities and NaN among them."""
    return rng.integers(0, 65536, n, np.uint16).view(np.float16)


def test_half_arithmetic_rounds_once(rng: np.random.Generator) -> None:
    n = 1 << 14
    a, b, c = (halves(rng, n) for _ in range(3))
    y = np.zeros((5, n), np.float16)
    body = f"""
    for (int j = i; j < {n}; j += 32) {{
      y[j] = a[j] + b[j];
      y[{n} + j] = a[j] * b[j];
      y[{2 * n} + j] = a[j] / b[j];
      y[{3 * n} + j] = __hfma(a[j], b[j], c[j]);
      y[{4 * n} + j] = half(double(a[j]) * double(b[j]) + double(c[j]));
    }}
    """
    launch(body, "half* y, const half* a, const half* b, const half* c", [Out(y), a, b, c])
    with np.errstate(all="ignore"):
        # In double the product is exact, and the sum wherever it lies near the middle between two halves.
        fused = (a.astype(np.float64) * b + c).astype(np.float16)
        for got, expected in zip(y, [a + b, a * b, a / b, fused, fused], strict=True):
            np.testing.assert_array_equal(got, expected)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Of an exact longdouble, the nearest bfloat16, ties to even, as float32; no subnormals."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8).astype(np.float32)


def test_bfloat16_fma_rounds_once(rng: np.random.Generator) -> None:
    n = 1 << 12
    a, b, c = (round_to_bf16(rng.standard_normal(n).astype(np.longdouble)) for _ in range(3))
    # A product half way between two numbers, which a tiny addend pushes to one side; float and double lose it.
    a[0], b[0], c[0] = 1 + 2**-4, 1 + 2**-4, 2**-100
    a[1], b[1], c[1] = 1 + 2**-4, 1 + 2**-4, -(2**-100)
    pack = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b, c)]
    y = np.zeros(n, np.uint16)
    body = f"for (int j = i; j < {n} / 2; j += 32) y[j] = tt_emu_bfma2(a[j], b[j], c[j]);"
    launch(body, "unsigned* y, const unsigned* a, const unsigned* b, const unsigned* c", [Out(y), *pack])
    got = (y.astype(np.uint32) << 16).view(np.float32)
    expected = round_to_bf16(a.astype(np.longdouble) * b + c)
    np.testing.assert_array_equal(got[2:], expected[2:])
    assert got[0] == round_to_bf16(np.longdouble(a[0]) * b[0] + 2**-20)
    assert got[1] == round_to_bf16(np.longdouble(a[0]) * b[0] - 2**-20)


def test_float_conversions() -> None:
    x = np.array([0.5, 1.5, -2.5, 3e9, -3e9, np.nan, 1e-8, 7.99], np.float32)
    y = np.zeros((3, 8), np.int32)
    body = "y[i] = __float2int_rn(x[i]); y[8 + i] = __float2int_rz(x[i]); y[16 + i] = __float2uint_rn(x[i]);"
    launch(body, "int* y, const float* x", [Out(y), x], threads=8)
    top, low = 2**31 - 1, -(2**31)
    np.testing.assert_array_equal(y[0], [0, 2, -2, top, low, 0, 0, 8])
    np.testing.assert_array_equal(y[1], [0, 1, -2, top, low, 0, 0, 7])
    np.testing.assert_array_equal(y[2].view(np.uint32), [0, 2, 0, 3000000000, 0, 0, 0, 8])
