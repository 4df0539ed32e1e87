// What one core can do at most: read a buffer, and multiply-add in registers. Compiled by tvm_ternary/bench/roofline.py
// with the instruction set of the target under test and VECTOR_BYTES, the width of its registers.

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define CHAINS 12  // more than latency times throughput of any multiply-add here, fewer than there are registers
#define PASTE_EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)

typedef int64_t words __attribute__((vector_size(VECTOR_BYTES)));
typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t halves __attribute__((vector_size(VECTOR_BYTES)));

// Keeps a value in a register and the compiler from knowing it. x86 and AArch64 name vector registers otherwise.
#if defined(__x86_64__)
#define OPAQUE(x) __asm__ volatile("" : "+x"(x))
#if defined(__AVX512F__)
#undef OPAQUE
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#endif
#else
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#endif

// Read a buffer, aligned and a multiple of eight vectors long, `times` times.
void read_buffer(const void *buffer, int64_t bytes, int64_t times) {
  const words *p = (const words *)buffer;
  int64_t count = bytes / (int64_t)sizeof(words);
  words sum[8] = {{0}};
  for (int64_t t = 0; t < times; t++) {
    for (int64_t i = 0; i < count; i += 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) sum[j] |= p[i + j];
    }
    // Or else the second reading need not be done.
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) OPAQUE(sum[j]);
    __asm__ volatile("" ::: "memory");
  }
}

// Multiply-add float32 in CHAINS independent chains; the operations done (a multiplication and an addition are two).
int64_t multiply_floats(int64_t steps) {
  floats a = {0}, b = {0};
  OPAQUE(a);
  OPAQUE(b);
#define START(i) floats s##i = {0}; OPAQUE(s##i);
#define STEP(i) s##i = a * b + s##i; OPAQUE(s##i);
  PASTE_EACH(START)
  for (int64_t t = 0; t < steps; t++) { PASTE_EACH(STEP) }
#undef START
#undef STEP
  return steps * CHAINS * 2 * (VECTOR_BYTES / 4);
}

// Multiply int8 and add in the way that the instruction set offers; the operations done.
#if defined(__AVX512VNNI__)
int64_t multiply_bytes(int64_t steps) {
  __m512i a = _mm512_setzero_si512(), b = a;
  OPAQUE(a);
  OPAQUE(b);
#define START(i) __m512i s##i = a; OPAQUE(s##i);
#define STEP(i) s##i = _mm512_dpbusd_epi32(s##i, a, b); OPAQUE(s##i);
  PASTE_EACH(START)
  for (int64_t t = 0; t < steps; t++) { PASTE_EACH(STEP) }
#undef START
#undef STEP
  return steps * CHAINS * 2 * 64;
}
#elif defined(__AVX2__)
#if defined(__AVX512BW__)
#define PAIRS _mm512_maddubs_epi16
#define WIDEN(x) _mm512_madd_epi16(x, ones)
typedef __m512i whole;
#else
#define PAIRS _mm256_maddubs_epi16
#define WIDEN(x) _mm256_madd_epi16(x, ones)
typedef __m256i whole;
#endif
typedef int32_t totals __attribute__((vector_size(VECTOR_BYTES)));
// Four byte products to a 16-bit lane, then once to 32 bits: as far as codes of two bits allow without saturation.
int64_t multiply_bytes(int64_t steps) {
  whole a = {0}, b = {0}, ones = {0};
  OPAQUE(a);
  OPAQUE(b);
  OPAQUE(ones);
// `a` anew each time, or else all products would be computed as one.
#define PRODUCT(h) { OPAQUE(a); whole p = PAIRS(a, b); OPAQUE(p); h += (halves)p; }
#define START(i) totals s##i = {0};
#define STEP(i) { halves h = {0}; PRODUCT(h) PRODUCT(h) PRODUCT(h) PRODUCT(h) \
    whole w = WIDEN((whole)h); s##i += (totals)w; OPAQUE(s##i); }
#define KEEP(i) OPAQUE(s##i);
  PASTE_EACH(START)
  for (int64_t t = 0; t < steps; t++) {
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
  }
  PASTE_EACH(KEEP)
#undef START
#undef STEP
  return steps * 6 * 4 * 2 * VECTOR_BYTES;
}
#else
// No byte products: 16-bit ones.
int64_t multiply_bytes(int64_t steps) {
  halves a = {0}, b = {0};
  OPAQUE(a);
  OPAQUE(b);
#define START(i) halves s##i = {0};
#define STEP(i) { OPAQUE(a); halves p = a * b; OPAQUE(p); s##i += p; OPAQUE(s##i); }
  PASTE_EACH(START)
  for (int64_t t = 0; t < steps; t++) { PASTE_EACH(STEP) }
#undef START
#undef STEP
  return steps * CHAINS * 2 * (VECTOR_BYTES / 2);
}
#endif
