"""The few lines of CUDA C++ that attention has beside those of `schedule.cuda.device`."""

from __future__ import annotations

from functools import cache

from tvm_ternary.schedule.cuda.device import Device, HalfFormat, and_or

MOST = 127 * 256 + 127
"""The largest number of 16 bits both of whose bytes are whole numbers with a sign."""

decode_pairs = Device(
    "tt_decode_pairs",
    "unsigned* quads, unsigned first, unsigned second",
    """
  quads[0] = first & 0x0f0f0f0fu;
  quads[1] = (first >> 4) & 0x0f0f0f0fu;
  quads[2] = second & 0x0f0f0f0fu;
  quads[3] = (second >> 4) & 0x0f0f0f0fu;
""",
)

# 9 times a digit of one plane and the number of two others stay within a byte.
decode_threes = Device(
    "tt_decode_threes",
    "unsigned* quads, unsigned one, unsigned first, unsigned second",
    """
  tt_decode_pairs(quads, first, second);
#pragma unroll
  for (int s = 0; s < 4; ++s) quads[s] += 9u * ((one >> (2 * s)) & 0x03030303u);
""",
    needs=(decode_pairs,),
)

# The number v nearest to a float is 256 high + low. Added to 1.5 * 2^23 + 128 it leaves high in the second byte of the
# float's bits, and low + 128 in the first one.
round_four = Device(
    "tt_round_four",
    "const float* x, float inverse, int low",
    """
  unsigned bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fmaf_rn(x[i], inverse, 12583040.0f));
  unsigned chosen = low ? 0x40u : 0x51u;
  unsigned bytes =
      __byte_perm(__byte_perm(bits[0], bits[1], chosen), __byte_perm(bits[2], bits[3], chosen), 0x5410u);
  return (int)(low ? bytes ^ 0x80808080u : bytes);
""",
    result="int32",
)

sum_bytes = Device("tt_sum_bytes", "int four, int total", "  return __dp4a(four, 0x01010101, total);", result="int32")

magnitude_bits = Device("tt_magnitude_bits", "float x", "  return __float_as_int(x) & 0x7fffffff;", result="int32")

# Off by 2^-22 of the result at most; what is below the normal numbers is 0.
exp2 = Device(
    "tt_exp2",
    "float x",
    r"""
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
""",
    "  return exp2f(x);",
    "float32",
)

from_lane_int = Device(
    "tt_from_lane_int", "int value, int lane", "  return __shfl_sync(0xffffffffu, value, lane);", result="int32"
)
from_lane_float = Device(
    "tt_from_lane_float", "float value, int lane", "  return __shfl_sync(0xffffffffu, value, lane);", result="float32"
)

sync_warp = Device("tt_sync_warp", "", "  __syncwarp();")

# Where numbers are to be a CPU's to the bit, what is rounded is said.
multiply = Device("tt_multiply", "float a, float b", "  return __fmul_rn(a, b);", result="float32")
multiply_add = Device("tt_multiply_add", "float a, float b, float c", "  return __fmaf_rn(a, b, c);", result="float32")
nearest = Device("tt_nearest", "float x", "  return (int)rintf(x);", result="int32")


def _pack(kind: str, short: str) -> Device:
    """Two floats rounded to 16 bits, the first one in the low half."""
    return Device(
        f"tt_pack_{kind}",
        "float low, float high",
        f"""
  unsigned both;
  asm("cvt.rn.{short}x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
""",
        f"  return tt::float_to_{'half' if short == 'f16' else short}(low) | "
        f"(unsigned)tt::float_to_{'half' if short == 'f16' else short}(high) << 16;",
        "uint32",
    )


pack_float16, pack_bfloat16 = _pack("float16", "f16"), _pack("bfloat16", "bf16")

store_two = Device("tt_store_two", "void* to, float a, float b", "  *(float2*)to = make_float2(a, b);")

put_words = Device(
    "tt_put_words",
    "void* shared, int offset, unsigned a, unsigned b, unsigned c, unsigned d",
    "  *(uint4*)((char*)shared + offset) = make_uint4(a, b, c, d);",
)

put_byte = Device(
    "tt_put_byte", "void* shared, int offset, int value", "  ((unsigned char*)shared)[offset] = (unsigned char)value;"
)

_QUADS = {
    1: "one & 0x03030303u, (one >> 2) & 0x03030303u",
    2: "pair & 0x0f0f0f0fu, (pair >> 4) & 0x0f0f0f0fu",
    3: "(pair & 0x0f0f0f0fu) + 9u * (one & 0x03030303u), ((pair >> 4) & 0x0f0f0f0fu) + 9u * ((one >> 2) & 0x03030303u)",
}


@cache
def decode_eight(planes: int, half: HalfFormat) -> Device:
    """Eight numbers of so many planes, times their scales: terms 0 and 2, 1 and 3, 4 and 6, 5 and 7.

    A number as the lowest bits of a float whose unit in the last place is 1 becomes itself by subtraction. Then it is
    multiplied, with one rounding.
    """
    offset = (3**planes - 1) // 2
    words = {1: "unsigned one", 2: "unsigned pair", 3: "unsigned one, unsigned pair"}[planes]
    base = half.splat(-half.base - offset)
    return Device(
        f"tt_decode_eight_{planes}_{half.name}",
        f"unsigned* to, const unsigned* scales, {words}",
        f"""
  unsigned quads[2] = {{{_QUADS[planes]}}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    unsigned number = tt_and_or(quads[i / 2] >> (8 * (i % 2)), 0x00ff00ffu, {half.splat(half.base)});
    to[i] = {half.fma.name}({half.fma.name}(number, {half.splat(1.0)}, {base}), scales[i], 0u);
  }}
""",
        needs=(and_or, half.fma),
    )
