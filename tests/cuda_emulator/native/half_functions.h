// The functions of cuda_fp16.h and cuda_bf16.h over the types of half.h.
#pragma once

using __half = tt::Half<tt::HalfFormat>;
using half = __half;
using __half2 = tt::Half2<tt::HalfFormat>;
using half2 = __half2;
using __nv_bfloat16 = tt::Half<tt::Bf16Format>;
using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = tt::Half2<tt::Bf16Format>;
using nv_bfloat162 = __nv_bfloat162;

namespace tt {
template <class F>
template <class V, std::enable_if_t<!std::is_same_v<V, Half<F>>, int>>
inline Half<F>::Half(Half<V> other) : __x(F::round(static_cast<float>(other))) {}
}  // namespace tt

static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline nv_bfloat162 make_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }

// ---- conversions ----
static inline float __half2float(half a) { return a; }
static inline half __float2half(float a) { return half(a); }
static inline half __float2half_rn(float a) { return half(a); }
static inline half __double2half(double a) { return half(a); }
static inline half __int2half_rn(int a) { return half(a); }
static inline half __uint2half_rn(unsigned a) { return half(a); }
static inline int __half2int_rn(half a) { return __float2int_rn(a); }
static inline int __half2int_rz(half a) { return __float2int_rz(a); }
static inline half __ushort_as_half(unsigned short a) { return half::from_bits(a); }
static inline unsigned short __half_as_ushort(half a) { return a.__x; }
static inline half __short_as_half(short a) { return half::from_bits(static_cast<uint16_t>(a)); }
static inline short __half_as_short(half a) { return static_cast<short>(a.__x); }
static inline half2 __floats2half2_rn(float a, float b) { return {half(a), half(b)}; }
static inline half2 __float22half2_rn(float2 a) { return {half(a.x), half(a.y)}; }
static inline half2 __float2half2_rn(float a) { return {half(a), half(a)}; }
static inline float2 __half22float2(half2 a) { return {float(a.x), float(a.y)}; }
static inline half2 __half2half2(half a) { return {a, a}; }
static inline half2 __halves2half2(half a, half b) { return {a, b}; }
static inline half __low2half(half2 a) { return a.x; }
static inline half __high2half(half2 a) { return a.y; }
static inline float __low2float(half2 a) { return a.x; }
static inline float __high2float(half2 a) { return a.y; }

static inline float __bfloat162float(nv_bfloat16 a) { return a; }
static inline nv_bfloat16 __float2bfloat16(float a) { return nv_bfloat16(a); }
static inline nv_bfloat16 __float2bfloat16_rn(float a) { return nv_bfloat16(a); }
static inline nv_bfloat16 __double2bfloat16(double a) { return nv_bfloat16(a); }
static inline nv_bfloat16 __int2bfloat16_rn(int a) { return nv_bfloat16(a); }
static inline int __bfloat162int_rn(nv_bfloat16 a) { return __float2int_rn(a); }
static inline nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return nv_bfloat16::from_bits(a); }
static inline unsigned short __bfloat16_as_ushort(nv_bfloat16 a) { return a.__x; }
static inline nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {nv_bfloat16(a), nv_bfloat16(b)}; }
static inline nv_bfloat162 __float22bfloat162_rn(float2 a) { return {nv_bfloat16(a.x), nv_bfloat16(a.y)}; }
static inline float2 __bfloat1622float2(nv_bfloat162 a) { return {float(a.x), float(a.y)}; }
static inline nv_bfloat162 __bfloat162bfloat162(nv_bfloat16 a) { return {a, a}; }
static inline nv_bfloat162 __halves2bfloat162(nv_bfloat16 a, nv_bfloat16 b) { return {a, b}; }

// ---- functions that both types have ----
#define TT_BOTH(T, T2)                                                                       \
  static inline T __hadd(T a, T b) { return a + b; }                                         \
  static inline T __hsub(T a, T b) { return a - b; }                                         \
  static inline T __hmul(T a, T b) { return a * b; }                                         \
  static inline T __hdiv(T a, T b) { return a / b; }                                         \
  static inline T __hfma(T a, T b, T c) { return tt::fma(a, b, c); }                         \
  static inline T __hneg(T a) { return -a; }                                                 \
  static inline T __habs(T a) { return T::from_bits(a.__x & 0x7FFF); }                       \
  static inline T __hmax(T a, T b) { return T(fmaxf(a, b)); }                                \
  static inline T __hmin(T a, T b) { return T(fminf(a, b)); }                                \
  static inline bool __hgt(T a, T b) { return a > b; }                                       \
  static inline bool __hge(T a, T b) { return a >= b; }                                      \
  static inline bool __hlt(T a, T b) { return a < b; }                                       \
  static inline bool __hle(T a, T b) { return a <= b; }                                      \
  static inline bool __heq(T a, T b) { return a == b; }                                      \
  static inline bool __hne(T a, T b) { return a != b; }                                      \
  static inline bool __hisnan(T a) { return std::isnan(float(a)); }                          \
  static inline int __hisinf(T a) { return std::isinf(float(a)); }                           \
  static inline T2 __hadd2(T2 a, T2 b) { return a + b; }                                     \
  static inline T2 __hsub2(T2 a, T2 b) { return a - b; }                                     \
  static inline T2 __hmul2(T2 a, T2 b) { return a * b; }                                     \
  static inline T2 __hfma2(T2 a, T2 b, T2 c) { return tt::fma(a, b, c); }                    \
  static inline T2 __hneg2(T2 a) { return {-a.x, -a.y}; }                                    \
  static inline T2 __habs2(T2 a) { return {__habs(a.x), __habs(a.y)}; }                      \
  static inline T2 __hmax2(T2 a, T2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }      \
  static inline T2 __hmin2(T2 a, T2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
TT_BOTH(half, half2)
TT_BOTH(nv_bfloat16, nv_bfloat162)
#undef TT_BOTH

#define TT_HALF_MATH(name, function)                                                        \
  static inline half name(half a) { return half(static_cast<float>(function(float(a)))); }  \
  static inline nv_bfloat16 name(nv_bfloat16 a) { return nv_bfloat16(static_cast<float>(function(float(a)))); }
TT_HALF_MATH(hexp, expf)
TT_HALF_MATH(hexp2, exp2f)
TT_HALF_MATH(hexp10, exp10f)
TT_HALF_MATH(hlog, logf)
TT_HALF_MATH(hlog2, log2f)
TT_HALF_MATH(hlog10, log10f)
TT_HALF_MATH(hsqrt, sqrtf)
TT_HALF_MATH(hrsqrt, rsqrtf)
TT_HALF_MATH(hrcp, __frcp_rn)
TT_HALF_MATH(hsin, sinf)
TT_HALF_MATH(hcos, cosf)
TT_HALF_MATH(htanh, tanhf)
TT_HALF_MATH(hfloor, floorf)
TT_HALF_MATH(hceil, ceilf)
TT_HALF_MATH(htrunc, truncf)
TT_HALF_MATH(hrint, nearbyintf)
#undef TT_HALF_MATH

// ---- for device helpers: packed pairs as the 32-bit registers of PTX ----
static inline unsigned tt_emu_hfma2(unsigned a, unsigned b, unsigned c) {
  return tt::bits<unsigned>(tt::fma(tt::bits<half2>(a), tt::bits<half2>(b), tt::bits<half2>(c)));
}
static inline unsigned tt_emu_hadd2(unsigned a, unsigned b) {
  return tt::bits<unsigned>(tt::bits<half2>(a) + tt::bits<half2>(b));
}
static inline unsigned tt_emu_hsub2(unsigned a, unsigned b) {
  return tt::bits<unsigned>(tt::bits<half2>(a) - tt::bits<half2>(b));
}
static inline unsigned tt_emu_hmul2(unsigned a, unsigned b) {
  return tt::bits<unsigned>(tt::bits<half2>(a) * tt::bits<half2>(b));
}
static inline unsigned tt_emu_bfma2(unsigned a, unsigned b, unsigned c) {
  return tt::bits<unsigned>(
      tt::fma(tt::bits<nv_bfloat162>(a), tt::bits<nv_bfloat162>(b), tt::bits<nv_bfloat162>(c)));
}
