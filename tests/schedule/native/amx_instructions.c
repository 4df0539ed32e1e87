// Each AMX int8 instruction, in each form of address that x86-64 has, against plain C. Runs on a CPU with AMX, or with
// amx_emulator.c linked in: then it is the emulator that is tested.

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint8_t configuration[64], stored[64];
static uint8_t a[16][64], b[16][64], memory[1 << 16];
static int32_t c[16][16], expected[16][16];
static int failures;

#define ASM(text, ...) __asm__ volatile(text ::__VA_ARGS__ : "memory")
#define ASM_CLOBBERS(text, m, n, ...) __asm__ volatile(text ::"r"(m), "r"(n) : "memory", __VA_ARGS__)
#define EXPECT(condition) \
  if (!(condition)) failures++, printf("line %d: %s\n", __LINE__, #condition)

// A tile of `rows` rows of `bytes` bytes holds what lies at `start` with that stride, and zeros elsewhere.
static int holds(const uint8_t *start, int64_t stride, int rows, int bytes) {
  uint8_t now[16][64];
  ASM("tilestored %%tmm4, (%0,%1,1)", "r"(now), "r"(64L));
  for (int row = 0; row < rows; row++)
    if (memcmp(now[row], start + row * stride, bytes)) return 0;
  return 1;
}

static void shape(int tile, int rows, int bytes) {
  configuration[0] = 1;
  configuration[16 + 2 * tile] = bytes;
  configuration[48 + tile] = rows;
}

static void addresses(void) {
  const uint8_t *m = memory, *stack = memory + sizeof memory - 4096;
#define CLEAR ASM("tilezero %%tmm4", "r"(0))
#define LOADED(start, stride) EXPECT(holds(start, stride, 16, 64)); CLEAR
  ASM("tileloadd (%0,%1,1), %%tmm4", "r"(m), "r"(80L));
  LOADED(m, 80);
  ASM("tileloadd 3(%0,%1,2), %%tmm4", "r"(m), "r"(40L));
  LOADED(m + 3, 80);
  ASM("tileloadd -300(%0,%1,4), %%tmm4", "r"(m + 300), "r"(17L));
  LOADED(m, 68);
  ASM("tileloaddt1 (%0,%1,8), %%tmm4", "r"(m), "r"(9L));
  LOADED(m, 72);
  ASM("tileloadd (%0), %%tmm4", "r"(m + 5));  // no index: every row is the same one
  LOADED(m + 5, 0);
  ASM("tileloadd (%0,%1,1), %%tmm4", "r"(m + 2000), "r"(-64L));
  LOADED(m + 2000, -64);
  // Bases that the encoding treats apart, and registers above the first eight.
  ASM_CLOBBERS("mov %0, %%r12; mov %1, %%r15; tileloadd (%%r12,%%r15,1), %%tmm4", m, 64L, "r12", "r15");
  LOADED(m, 64);
  ASM_CLOBBERS("mov %0, %%r13; mov %1, %%r8; tileloadd (%%r13,%%r8,2), %%tmm4", m, 32L, "r13", "r8");
  LOADED(m, 64);
  ASM("push %%rbp; mov %0, %%rbp; tileloadd (%%rbp,%1,1), %%tmm4; pop %%rbp", "r"(m), "r"(65L));
  LOADED(m, 65);
  // The signal's frame is put on the stack, far below what is read.
  ASM_CLOBBERS("mov %%rsp, %%rbx; mov %0, %%rsp; tileloadd 16(%%rsp,%1,1), %%tmm4; mov %%rbx, %%rsp", stack, 64L, "rbx");
  LOADED(stack + 16, 64);
  ASM_CLOBBERS("mov %0, %%r12; tileloadd 64(%%r12), %%tmm4", m, 0L, "r12");
  LOADED(m + 64, 0);
  // Neither base nor relative to the instruction: an absolute address, which is small as the program is not relocated.
  ASM("tileloadd memory(,%0,1), %%tmm4", "r"(64L));
  LOADED(m, 64);
}

static void product(int sa, int sb, int m, int n, int quads) {
  memcpy(expected, c, sizeof c);
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++)
      for (int k = 0; k < 4 * quads; k++) {
        int x = sa ? (int8_t)a[i][k] : a[i][k], y = sb ? (int8_t)b[k / 4][4 * j + k % 4] : b[k / 4][4 * j + k % 4];
        expected[i][j] = (int32_t)((uint32_t)expected[i][j] + (uint32_t)(x * y));
      }
}

static void products(int m, int n, int quads) {
  memset(configuration, 0, sizeof configuration);
  shape(0, m, 4 * n);
  shape(1, m, 4 * quads);
  shape(7, quads, 4 * n);
  ASM("ldtilecfg %0", "m"(configuration));
  ASM("sttilecfg %0", "m"(stored));
  EXPECT(!memcmp(configuration, stored, 64));
#define TRY(name, sa, sb)                                                         \
  memset(c, 0x7E, sizeof c);                                                      \
  product(sa, sb, m, n, quads);                                                   \
  ASM("tileloadd (%0,%1,1), %%tmm0", "r"(c), "r"(64L));                           \
  ASM("tileloadd (%0,%1,1), %%tmm1", "r"(a), "r"(64L));                           \
  ASM("tileloadd (%0,%1,1), %%tmm7", "r"(b), "r"(64L));                           \
  ASM(name " %%tmm7, %%tmm1, %%tmm0; tilestored %%tmm0, (%0,%1,1)", "r"(c), "r"(64L)); \
  EXPECT(!memcmp(c, expected, sizeof c))
  TRY("tdpbssd", 1, 1);
  TRY("tdpbsud", 1, 0);
  TRY("tdpbusd", 0, 1);
  TRY("tdpbuud", 0, 0);
}

int main(void) {
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return puts("no permission"), 1;
  uint32_t random = 1;
  for (unsigned i = 0; i < sizeof memory; i++) memory[i] = (random = random * 1664525 + 1013904223) >> 24;
  memcpy(a, memory, sizeof a);
  memcpy(b, memory + 1024, sizeof b);
  memset(a[0], 0x80, 64);  // the extremes of signed and unsigned bytes
  for (int row = 0; row < 16; row++) memset(b[row], 0xFF, 4);
  shape(4, 16, 64);
  const uint8_t *config = configuration;
  ASM("ldtilecfg configuration(%%rip)", "r"(0));  // relative to the next instruction
  ASM("ldtilecfg (%0)", "r"(config));
  addresses();
  products(16, 16, 16);
  products(3, 5, 7);
  products(1, 16, 8);
  ASM("tilerelease", "r"(0));
  ASM("sttilecfg %0", "m"(stored));
  for (int i = 0; i < 64; i++) EXPECT(!stored[i]);
  return failures != 0;
}
