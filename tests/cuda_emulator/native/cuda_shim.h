// CUDA C++ as a dialect of C++: included before a kernel source, whose own CUDA headers are then empty files.
#pragma once
#include <math.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "emulator.h"
#include "half.h"

#define __host__
#define __device__
#define __constant__ static
#define __global__ __attribute__((noinline, visibility("default")))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#undef __noinline__
#define __forceinline__ inline __attribute__((always_inline))
#define TT_UNTRACED __attribute__((no_sanitize("thread")))

#define threadIdx (tt_emu_thread_idx())
#define blockIdx (tt_emu_block_idx())
#define blockDim (tt_emu_block_dim())
#define gridDim (tt_emu_grid_dim())
static const int warpSize = 32;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- vector types ----
#define TT_VECTORS(T, name, a2, a4)                                                                \
  struct name##1 {                                                                                 \
    T x;                                                                                           \
  };                                                                                               \
  struct alignas(a2) name##2 {                                                                     \
    T x, y;                                                                                        \
  };                                                                                               \
  struct name##3 {                                                                                 \
    T x, y, z;                                                                                     \
  };                                                                                               \
  struct alignas(a4) name##4 {                                                                     \
    T x, y, z, w;                                                                                  \
  };                                                                                               \
  static inline name##1 make_##name##1(T x) { return {x}; }                                        \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                        \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
TT_VECTORS(signed char, char, 2, 4)
TT_VECTORS(unsigned char, uchar, 2, 4)
TT_VECTORS(short, short, 4, 8)
TT_VECTORS(unsigned short, ushort, 4, 8)
TT_VECTORS(int, int, 8, 16)
TT_VECTORS(unsigned, uint, 8, 16)
TT_VECTORS(long, long, 16, 16)
TT_VECTORS(unsigned long, ulong, 16, 16)
TT_VECTORS(long long, longlong, 16, 16)
TT_VECTORS(unsigned long long, ulonglong, 16, 16)
TT_VECTORS(float, float, 8, 16)
TT_VECTORS(double, double, 16, 16)
#undef TT_VECTORS

// ---- barriers and warps: a call is known by its line ----
static inline void tt_sync(int line = __builtin_LINE()) { tt_emu_syncthreads(line); }
#define __syncthreads tt_sync
static inline int __syncthreads_count(int p, int line = __builtin_LINE()) { return tt_emu_syncthreads_reduce(0, p, line); }
static inline int __syncthreads_and(int p, int line = __builtin_LINE()) { return tt_emu_syncthreads_reduce(1, p, line); }
static inline int __syncthreads_or(int p, int line = __builtin_LINE()) { return tt_emu_syncthreads_reduce(2, p, line); }
static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, int line = __builtin_LINE()) { tt_emu_syncwarp(mask, line); }
static inline unsigned __activemask(int line = __builtin_LINE()) { return tt_emu_activemask(line); }
static inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return tt_emu_ballot(mask, p, line);
}
static inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return tt_emu_ballot(mask, p, line) != 0;
}
static inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return tt_emu_ballot(mask, !p, line) == 0;
}
#define TT_SHUFFLE(name, kind, Lane)                                                                      \
  template <class T>                                                                                      \
  TT_UNTRACED inline T name(unsigned mask, T value, Lane lane, int width = 32, int line = __builtin_LINE()) { \
    tt_emu_shuffle(kind, mask, &value, sizeof(T), static_cast<int>(lane), width, line);                   \
    return value;                                                                                         \
  }
TT_SHUFFLE(__shfl_sync, 0, int)
TT_SHUFFLE(__shfl_up_sync, 1, unsigned)
TT_SHUFFLE(__shfl_down_sync, 2, unsigned)
TT_SHUFFLE(__shfl_xor_sync, 3, int)
#undef TT_SHUFFLE
#define TT_REDUCE(name, kind)                                                                     \
  static inline unsigned name(unsigned mask, unsigned v, int line = __builtin_LINE()) {           \
    return tt_emu_reduce(kind, 0, mask, v, line);                                                 \
  }                                                                                               \
  static inline int name(unsigned mask, int v, int line = __builtin_LINE()) {                     \
    return static_cast<int>(tt_emu_reduce(kind, 1, mask, static_cast<unsigned>(v), line));        \
  }
TT_REDUCE(__reduce_add_sync, 0)
TT_REDUCE(__reduce_min_sync, 1)
TT_REDUCE(__reduce_max_sync, 2)
TT_REDUCE(__reduce_and_sync, 3)
TT_REDUCE(__reduce_or_sync, 4)
TT_REDUCE(__reduce_xor_sync, 5)
#undef TT_REDUCE
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}

// ---- atomics: threads of the emulator take turns, so plain code is atomic; the access is told apart for checks ----
#define TT_ATOMIC(name, T, expression)                                 \
  TT_UNTRACED static inline T name(T* address, T value) {              \
    tt_emu_atomic_access(address, sizeof(T));                          \
    const T old = *address;                                            \
    *address = (expression);                                           \
    return old;                                                        \
  }
#define TT_ATOMICS(T)                                        \
  TT_ATOMIC(atomicMin, T, value < old ? value : old)         \
  TT_ATOMIC(atomicMax, T, value > old ? value : old)         \
  TT_ATOMIC(atomicAnd, T, old & value)                       \
  TT_ATOMIC(atomicOr, T, old | value)                        \
  TT_ATOMIC(atomicXor, T, old ^ value)                       \
  TT_ATOMIC(atomicAdd, T, old + value)                       \
  TT_ATOMIC(atomicExch, T, value)                            \
  TT_UNTRACED static inline T atomicCAS(T* address, T compare, T value) { \
    tt_emu_atomic_access(address, sizeof(T));                \
    const T old = *address;                                  \
    if (old == compare) *address = value;                    \
    return old;                                              \
  }
TT_ATOMICS(int)
TT_ATOMICS(unsigned)
TT_ATOMICS(unsigned long long)
TT_ATOMIC(atomicAdd, float, old + value)
TT_ATOMIC(atomicAdd, double, old + value)
TT_ATOMIC(atomicExch, float, value)
#undef TT_ATOMICS
#undef TT_ATOMIC

// ---- memory ----
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
#define __ldca __ldg
#define __ldcg __ldg
#define __ldcs __ldg
#define __ldlu __ldg
#define __ldcv __ldg
template <class T>
inline void __stcg(T* p, T value) {
  *p = value;
}
#define __stwb __stcg
#define __stcs __stcg
#define __stwt __stcg

// ---- integers ----
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<unsigned>(both >> (s >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return r;
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>(((static_cast<uint64_t>(hi) << 32 | lo) << (n & 31)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (n & 31));
}
static inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
template <class A, class B, class C>
static inline C tt_dp4a(unsigned a, unsigned b, C c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 4; ++i)
    sum += static_cast<unsigned>(static_cast<A>(a >> 8 * i) * static_cast<B>(b >> 8 * i));
  return static_cast<C>(sum);
}
static inline int __dp4a(int a, int b, int c) { return tt_dp4a<int8_t, int8_t>(a, b, c); }
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return tt_dp4a<uint8_t, uint8_t>(a, b, c); }
static inline int __dp4a(char4 a, char4 b, int c) {
  return __dp4a(tt::bits<int>(a), tt::bits<int>(b), c);
}
static inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
  return __dp4a(tt::bits<unsigned>(a), tt::bits<unsigned>(b), c);
}
// dp4a.u32.s32: unsigned bytes times signed bytes
static inline int tt_emu_dp4a_u8s8(unsigned a, unsigned b, int c) { return tt_dp4a<uint8_t, int8_t>(a, b, c); }
static inline unsigned tt_emu_lop3(unsigned a, unsigned b, unsigned c, unsigned lut) {
  unsigned r = 0;
  for (unsigned i = 0; i < 8; ++i)
    if (lut >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

#define TT_MIN_MAX(T)                                      \
  static inline T min(T a, T b) { return b < a ? b : a; }  \
  static inline T max(T a, T b) { return a < b ? b : a; }
TT_MIN_MAX(int)
TT_MIN_MAX(unsigned)
TT_MIN_MAX(long)
TT_MIN_MAX(unsigned long)
TT_MIN_MAX(long long)
TT_MIN_MAX(unsigned long long)
#undef TT_MIN_MAX
// Of a number and NaN, the number.
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

// ---- floats: the approximate intrinsics are given their exact values, rounded ----
#define CUDART_INF_F (std::numeric_limits<float>::infinity())
#define CUDART_NAN_F (std::numeric_limits<float>::quiet_NaN())
#define CUDART_INF (std::numeric_limits<double>::infinity())
#define CUDART_NAN (std::numeric_limits<double>::quiet_NaN())
static inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
static inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
static inline float tt_exp10f(float x) { return static_cast<float>(std::pow(10.0, static_cast<double>(x))); }
#define exp10f tt_exp10f
#define __exp10f tt_exp10f
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
#define __powf powf
#define __tanhf tanhf
#define __frsqrt_rn rsqrtf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
// Conversions saturate, and NaN is 0.
template <class I>
static inline I tt_to_integer(double whole) {
  if (std::isnan(whole)) return 0;
  if (whole <= static_cast<double>(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  if (whole >= static_cast<double>(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
  return static_cast<I>(whole);
}
#define TT_CONVERT(suffix, rounding)                                                                      \
  static inline int __float2int_##suffix(float a) { return tt_to_integer<int>(rounding(a)); }             \
  static inline unsigned __float2uint_##suffix(float a) { return tt_to_integer<unsigned>(rounding(a)); }  \
  static inline long long __float2ll_##suffix(float a) { return tt_to_integer<long long>(rounding(a)); }
TT_CONVERT(rn, nearbyintf)
TT_CONVERT(rz, truncf)
TT_CONVERT(rd, floorf)
TT_CONVERT(ru, ceilf)
#undef TT_CONVERT
static inline float __int2float_rn(int a) { return static_cast<float>(a); }
static inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
static inline int __float_as_int(float a) { return tt::bits<int>(a); }
static inline unsigned __float_as_uint(float a) { return tt::bits<unsigned>(a); }
static inline float __int_as_float(int a) { return tt::bits<float>(a); }
static inline float __uint_as_float(unsigned a) { return tt::bits<float>(a); }

#include "half_functions.h"

// ---- the table of kernels ----
namespace tt {
template <class T>
struct Code {
  static constexpr char kind = std::is_pointer_v<T>
                                   ? (std::is_const_v<std::remove_pointer_t<T>> ? 'C' : 'P')
                                   : (std::is_floating_point_v<T> ? 'f' : (std::is_unsigned_v<T> ? 'u' : 'i'));
  static_assert(std::is_pointer_v<T> || std::is_arithmetic_v<T>, "a kernel takes pointers and numbers");
};
template <auto kernel>
struct Call;
template <class... A, void (*kernel)(A...)>
struct Call<kernel> {
  template <size_t... I>
  TT_UNTRACED static void spread(void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(args[I])...);
  }
  TT_UNTRACED static void invoke(void** args) { spread(args, std::index_sequence_for<A...>{}); }
  struct Signature {
    char text[2 * sizeof...(A) + 1];
    constexpr Signature() : text() {
      const char kinds[] = {Code<A>::kind..., 0};
      const char sizes[] = {static_cast<char>('0' + sizeof(A))..., 0};
      for (size_t i = 0; i < sizeof...(A); ++i) {
        text[2 * i] = kinds[i];
        text[2 * i + 1] = sizes[i];
      }
      text[2 * sizeof...(A)] = 0;
    }
  };
  static constexpr Signature described{};
};
}  // namespace tt
#if defined(__SANITIZE_THREAD__)
#define TT_CHECKED 1
// The C library's would not be traced.
#define memcpy tt_emu_memcpy
#define memset tt_emu_memset
#else
#define TT_CHECKED 0
#endif
#define TT_SECTION_BOUNDS(n)                                                            \
  extern "C" char __start_tt_shared_##n[] __attribute__((weak, visibility("hidden"))); \
  extern "C" char __stop_tt_shared_##n[] __attribute__((weak, visibility("hidden")));
#define TT_KERNEL(name, n, threads, parameters) \
  {#name, &tt::Call<&name>::invoke, tt::Call<&name>::described.text, parameters, __start_tt_shared_##n, __stop_tt_shared_##n, threads, TT_CHECKED}
