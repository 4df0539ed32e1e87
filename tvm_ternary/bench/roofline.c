// What one core can do at most: read a buffer, and multiply-add in registers or in tiles. Compiled by tvm_ternary/bench/roofline.py
// with the instruction set of the target under test and VECTOR_BYTES, the width of its registers.

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
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
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#if defined(__AVX512VNNI__)
#define DOT _mm512_dpbusd_epi32
typedef __m512i whole;
#elif defined(__AVXVNNI__)
#define DOT _mm256_dpbusd_avx_epi32
typedef __m256i whole;
#else
#define DOT(s, a, b) vdotq_s32(s, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))
typedef int32x4_t whole;
#endif
int64_t multiply_bytes(int64_t steps) {
  whole a = {0}, b = {0};
  OPAQUE(a);
  OPAQUE(b);
#define START(i) whole s##i = {0}; OPAQUE(s##i);
#define STEP(i) s##i = DOT(s##i, a, b); OPAQUE(s##i);
  PASTE_EACH(START)
  for (int64_t t = 0; t < steps; t++) { PASTE_EACH(STEP) }
#undef START
#undef STEP
  return steps * CHAINS * 2 * VECTOR_BYTES;
}
#elif defined(__SSSE3__)
#if defined(__AVX512BW__)
#define PAIRS _mm512_maddubs_epi16
#define WIDEN(x) _mm512_madd_epi16(x, ones)
typedef __m512i whole;
#elif defined(__AVX2__)
#define PAIRS _mm256_maddubs_epi16
#define WIDEN(x) _mm256_madd_epi16(x, ones)
typedef __m256i whole;
#else
#define PAIRS _mm_maddubs_epi16
#define WIDEN(x) _mm_madd_epi16(x, ones)
typedef __m128i whole;
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

// Multiply trits, as pairs of bits (nonzero, minus), and add: ones(nz) - 2 ones(nz & minus), where nz is set if both are
// not zero; the operations done. The two counts are kept apart.
#define FACTORS(n, m) words n = nz_a & nz_b; words m = n & (minus_a ^ minus_b);
#if defined(__AVX512VPOPCNTDQ__)
int64_t multiply_trits(int64_t steps) {
  words nz_a = {0}, nz_b = {0}, minus_a = {0}, minus_b = {0};
  OPAQUE(nz_b);
  OPAQUE(minus_b);
#define START(i) words s##i = {0}, t##i = {0};
// `nz_a` anew each time, or else all products would be computed as one.
#define STEP(i) { OPAQUE(nz_a); OPAQUE(minus_a); FACTORS(n, m) \
    s##i += (words)_mm512_popcnt_epi64((__m512i)n); t##i += (words)_mm512_popcnt_epi64((__m512i)m); \
    OPAQUE(s##i); OPAQUE(t##i); }
  START(0) START(1) START(2) START(3) START(4) START(5)
  for (int64_t t = 0; t < steps; t++) { STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) }
#undef START
#undef STEP
  return steps * 6 * 2 * 8 * VECTOR_BYTES;
}
#else
typedef uint8_t bytes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t pairs __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t longs __attribute__((vector_size(VECTOR_BYTES)));

// The ones of each byte: a table of 16 where bytes can be looked up in a register, else sums of ever wider fields.
static inline __attribute__((always_inline)) bytes count_ones(words x) {
#if defined(__SSSE3__)
  const bytes low = (bytes){0} + 15;
  const __m128i ones = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
#if defined(__AVX512BW__)
#define LOOK_UP(nibbles) ((bytes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(ones), (__m512i)(nibbles)))
#elif defined(__AVX2__)
#define LOOK_UP(nibbles) ((bytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(ones), (__m256i)(nibbles)))
#else
#define LOOK_UP(nibbles) ((bytes)_mm_shuffle_epi8(ones, (__m128i)(nibbles)))
#endif
  return LOOK_UP((bytes)x & low) + LOOK_UP((bytes)((pairs)x >> 4) & low);
#elif defined(__ARM_NEON)
  return (bytes)vcntq_u8((uint8x16_t)x);
#else
  longs v = (longs)x;
  v -= (v >> 1) & 0x5555555555555555u;
  v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
  return (bytes)((v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu);
#endif
}

int64_t multiply_trits(int64_t steps) {
  words nz_a = {0}, nz_b = {0}, minus_a = {0}, minus_b = {0};
  OPAQUE(nz_b);
  OPAQUE(minus_b);
  pairs totals[2] = {{0}};
  for (int64_t t = 0; t < steps; t++) {
    // As many counts of at most 8 as a byte can add, less some to stay a whole loop.
    bytes sums[2] = {{0}};
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
      OPAQUE(nz_a);
      OPAQUE(minus_a);
      FACTORS(n, m)
      sums[0] += count_ones(n);
      sums[1] += count_ones(m);
    }
    for (int j = 0; j < 2; j++) totals[j] += ((pairs)sums[j] & 255) + ((pairs)sums[j] >> 8);
    OPAQUE(totals[0]);
    OPAQUE(totals[1]);
  }
  return steps * 16 * 2 * 8 * VECTOR_BYTES;
}
#endif

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>

// Ask the kernel for the tile registers, and make all eight 16 rows of 64 bytes; 0 where it refuses. Of a thread.
int open_tiles(void) {
  const int request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 0;
  uint8_t config[64] __attribute__((aligned(64))) = {1};
  for (int tile = 0; tile < 8; tile++) {
    ((uint16_t *)(config + 16))[tile] = 64;
    config[48 + tile] = 16;
  }
  // GCC's _tile_loadconfig says that it reads eight of the 64 bytes, which leaves the stores to the others out.
  __asm__ volatile("" ::"r"(config) : "memory");
  _tile_loadconfig(config);
  return 1;
}

// Multiply int8 tiles into four accumulators: 16 x 16 results of 64 products each.
int64_t multiply_tiles(int64_t steps) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (int64_t t = 0; t < steps; t++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  return steps * 4 * 2 * 16 * 16 * 64;
}
#endif
