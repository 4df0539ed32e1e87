// half and bfloat16 as CUDA has them: stored in 16 bits, every operation rounded once, to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace tt {

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &value, sizeof(to));
  return to;
}

// To float with the last bit set when something was lost: rounding that again to 22 bits or fewer is exact.
inline float odd_float(double value) {
  float near = static_cast<float>(value);
  if (static_cast<double>(near) == value || std::isnan(value) || std::isinf(near)) return near;
  uint32_t b = bits<uint32_t>(near);
  if (b & 1) return near;
  const bool grew = std::fabs(static_cast<double>(near)) > std::fabs(value);
  return bits<float>(grew ? b - 1 : b + 1);
}

// a * b + c of numbers with few bits, to double with the last bit set when something was lost.
inline double odd_fma(double a, double b, double c) {
  const double p = a * b;  // exact: at most 2 * 11 bits
  double s = p + c;
  const double back = s - p;
  const double lost = (p - (s - back)) + (c - back);
  if (lost != 0 && std::isfinite(s)) {
    uint64_t u = bits<uint64_t>(s);
    if (!(u & 1)) s = bits<double>((lost > 0) == (s > 0) ? u + 1 : u - 1);
  }
  return s;
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7F800000u | mantissa << 13);
  if (exponent) return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -small : small;
#endif
}

inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t b = bits<uint32_t>(f), sign = b >> 16 & 0x8000, magnitude = b & 0x7FFFFFFF;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at bit 0 of the result
    const float shifted = bits<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits<uint32_t>(shifted) - bits<uint32_t>(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
#endif
}

inline float bf16_to_float(uint16_t h) { return bits<float>(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t b = bits<uint32_t>(f);
  if ((b & 0x7FFFFFFF) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

struct HalfFormat {
  static float widen(uint16_t h) { return half_to_float(h); }
  static uint16_t round(float f) { return float_to_half(f); }
};
struct Bf16Format {
  static float widen(uint16_t h) { return bf16_to_float(h); }
  static uint16_t round(float f) { return float_to_bf16(f); }
};

template <class Format>
struct Half {
  uint16_t __x;

  Half() = default;
  Half(float f) : __x(Format::round(f)) {}
  Half(double d) : __x(Format::round(odd_float(d))) {}
  template <class I, std::enable_if_t<std::is_integral_v<I>, int> = 0>
  Half(I i) : __x(Format::round(odd_float(static_cast<double>(i)))) {}
  // From volatile memory. A template, since a copy constructor that is not trivial would go by reference.
  template <class V, std::enable_if_t<std::is_volatile_v<V> && std::is_same_v<std::remove_cv_t<V>, Half>, int> = 0>
  Half(V& other) : __x(other.__x) {}
  template <class V, std::enable_if_t<!std::is_same_v<V, Half>, int> = 0>
  explicit Half(Half<V> other);

  static Half from_bits(uint16_t b) {
    Half h;
    h.__x = b;
    return h;
  }
  operator float() const { return Format::widen(__x); }
  operator float() const volatile { return Format::widen(__x); }
  template <class T, std::enable_if_t<std::is_arithmetic_v<T> && !std::is_same_v<T, float>, int> = 0>
  explicit operator T() const {
    return static_cast<T>(Format::widen(__x));
  }
  volatile Half& operator=(const Half& other) volatile {
    __x = other.__x;
    return *this;
  }
  Half& operator=(const Half&) = default;
  Half(const Half&) = default;
};

// float has more than twice the bits, so that rounding twice is rounding once.
#define TT_HALF_OPERATOR(op)                                                        \
  template <class F>                                                                \
  inline Half<F> operator op(Half<F> a, Half<F> b) {                                \
    return Half<F>(static_cast<float>(a) op static_cast<float>(b));                 \
  }                                                                                 \
  template <class F>                                                                \
  inline Half<F>& operator op##=(Half<F>& a, Half<F> b) {                           \
    return a = a op b;                                                              \
  }
TT_HALF_OPERATOR(+)
TT_HALF_OPERATOR(-)
TT_HALF_OPERATOR(*)
TT_HALF_OPERATOR(/)
#undef TT_HALF_OPERATOR
#define TT_HALF_COMPARE(op)                                         \
  template <class F>                                                \
  inline bool operator op(Half<F> a, Half<F> b) {                   \
    return static_cast<float>(a) op static_cast<float>(b);          \
  }
TT_HALF_COMPARE(<)
TT_HALF_COMPARE(>)
TT_HALF_COMPARE(<=)
TT_HALF_COMPARE(>=)
TT_HALF_COMPARE(==)
TT_HALF_COMPARE(!=)
#undef TT_HALF_COMPARE
template <class F>
inline Half<F> operator-(Half<F> a) {
  return Half<F>::from_bits(a.__x ^ 0x8000);
}

template <class F>
inline Half<F> fma(Half<F> a, Half<F> b, Half<F> c) {
  return Half<F>(odd_fma(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c)));
}

template <class F>
struct alignas(4) Half2 {
  Half<F> x, y;
  Half2() = default;
  Half2(Half<F> x, Half<F> y) : x(x), y(y) {}
};
template <class F>
inline Half2<F> operator+(Half2<F> a, Half2<F> b) {
  return {a.x + b.x, a.y + b.y};
}
template <class F>
inline Half2<F> operator-(Half2<F> a, Half2<F> b) {
  return {a.x - b.x, a.y - b.y};
}
template <class F>
inline Half2<F> operator*(Half2<F> a, Half2<F> b) {
  return {a.x * b.x, a.y * b.y};
}
template <class F>
inline Half2<F> operator/(Half2<F> a, Half2<F> b) {
  return {a.x / b.x, a.y / b.y};
}
template <class F>
inline Half2<F> fma(Half2<F> a, Half2<F> b, Half2<F> c) {
  return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}

}  // namespace tt
