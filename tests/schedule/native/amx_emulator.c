// Runs AMX int8 instructions on an x86-64 CPU that has none: linked into a program, it decodes and does what raises
// SIGILL. It keeps each thread's tiles apart, refuses what the manual says raises #UD, and ends the program with a line
// on stderr. An instruction that is none of AMX's ends the program as without it.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: 2.1.5 (ModRM, SIB), 2.3 (VEX), the
// instructions' own pages, and volume 1, chapter 18.

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define TILES 8
#define MOST_ROWS 16
#define MOST_BYTES 64
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

typedef struct {
  int configured;
  uint8_t configuration[64];
  uint8_t data[TILES][MOST_ROWS][MOST_BYTES];
} State;

static __thread State state;
static int permitted;

// Only asks for what a message needs, so that it is safe in a signal handler.
static void refuse(const char *why) {
  static const char prefix[] = "AMX emulator: ";
  if (write(2, prefix, sizeof prefix - 1) < 0 || write(2, why, strlen(why)) < 0 || write(2, "\n", 1) < 0) _exit(4);
  _exit(3);
}

// Linux refuses this on a CPU without AMX; all other calls go through.
long syscall(long number, ...) {
  __builtin_va_list list;
  long a[6];
  __builtin_va_start(list, number);
  for (int i = 0; i < 6; i++) a[i] = __builtin_va_arg(list, long);
  __builtin_va_end(list);
  if (number == SYS_arch_prctl && a[0] == ARCH_REQ_XCOMP_PERM && a[1] == XFEATURE_XTILEDATA) {
    permitted = getenv("AMX_REFUSED") == NULL;
    if (permitted) return 0;
    errno = EOPNOTSUPP;
    return -1;
  }
  register long r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  if (result < 0 && result > -4096) {
    errno = -(int)result;
    return -1;
  }
  return result;
}

// ModRM numbers registers otherwise than the context does.
static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

typedef struct {
  int prefix;  // VEX.pp: 0 none, 1 66, 2 F3, 3 F2
  int opcode;
  int mod, reg, rm, vvvv;
  int64_t address, index;  // index scaled; 0 where there is none
  int length;
} Instruction;

static int64_t displacement(const uint8_t *at, int bytes) {
  if (bytes == 1) return (int8_t)at[0];
  int32_t value;
  memcpy(&value, at, 4);
  return value;
}

static void decode_memory(Instruction *in, const uint8_t *code, const greg_t *gregs, int x, int b) {
  const uint8_t *at = code + 5;  // behind VEX, opcode and ModRM
  int base = in->rm, bytes = in->mod == 1 ? 1 : in->mod == 2 ? 4 : 0, relative = 0, no_base = 0;
  if (in->rm == 4) {
    int sib = *at++, index = (sib >> 3 & 7) | x << 3;
    base = sib & 7;
    no_base = base == 5 && in->mod == 0;
    if (index != 4) in->index = (int64_t)((uint64_t)gregs[registers[index]] << (sib >> 6));
  } else {
    relative = in->rm == 5 && in->mod == 0;
  }
  if (relative || no_base) bytes = 4;
  in->address = bytes ? displacement(at, bytes) : 0;
  at += bytes;
  in->length = (int)(at - code);
  if (relative)
    in->address += gregs[REG_RIP] + in->length;
  else if (!no_base)
    in->address += gregs[registers[base | b << 3]];
}

// False where it is no VEX instruction of AMX's opcodes.
static int decode(Instruction *in, const uint8_t *code, const greg_t *gregs) {
  memset(in, 0, sizeof *in);
  if (code[0] != 0xC4) return 0;
  int r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20), map = code[1] & 31;
  int wide = code[2] >> 7, length = code[2] >> 2 & 1;
  in->opcode = code[3];
  if (map != 2 || wide || length || (in->opcode != 0x49 && in->opcode != 0x4B && in->opcode != 0x5E)) return 0;
  in->prefix = code[2] & 3;
  in->vvvv = ~(code[2] >> 3) & 15;
  in->mod = code[4] >> 6;
  in->reg = (code[4] >> 3 & 7) | r << 3;
  in->rm = code[4] & 7;
  in->length = 5;
  if (in->mod != 3)
    decode_memory(in, code, gregs, x, b);
  else
    in->rm |= b << 3;
  return 1;
}

static int row_bytes(int tile) { return state.configuration[16 + 2 * tile] | state.configuration[17 + 2 * tile] << 8; }

static int rows(int tile) { return state.configuration[48 + tile]; }

static void check_tile(int tile) {
  if (!state.configured) refuse("tiles of this thread are not configured");
  if (tile >= TILES || !rows(tile) || !row_bytes(tile)) refuse("a tile has no shape");
}

static void load_configuration(const uint8_t *from) {
  if (!permitted) refuse("tiles are used without permission");
  memset(&state, 0, sizeof state);
  if (from[0] == 0) return;
  if (from[0] != 1) refuse("unknown palette");
  if (from[1]) refuse("start_row is not 0");
  for (int i = 2; i < 64; i++)
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && from[i]) refuse("a reserved byte of the configuration is not 0");
  memcpy(state.configuration, from, 64);
  for (int tile = 0; tile < TILES; tile++) {
    if (row_bytes(tile) > MOST_BYTES || rows(tile) > MOST_ROWS) refuse("a tile is too large");
    if (!row_bytes(tile) != !rows(tile)) refuse("a tile has rows or bytes but not both");
  }
  state.configured = 1;
}

static void configure(const Instruction *in) {
  if (in->vvvv) refuse("VEX.vvvv is used");
  if (in->mod == 3 && in->prefix == 0 && in->reg == 0 && in->rm == 0) {
    memset(&state, 0, sizeof state);  // tilerelease
  } else if (in->mod == 3 && in->prefix == 3 && in->rm == 0) {
    check_tile(in->reg);
    memset(state.data[in->reg], 0, sizeof state.data[in->reg]);  // tilezero
  } else if (in->mod != 3 && in->prefix == 0 && in->reg == 0) {
    load_configuration((const uint8_t *)(in->address + in->index));
  } else if (in->mod != 3 && in->prefix == 1 && in->reg == 0) {
    memcpy((void *)(in->address + in->index), state.configuration, 64);
  } else {
    refuse("unknown instruction of opcode 49");
  }
}

static void move(const Instruction *in) {
  if (in->vvvv || in->mod == 3 || in->rm != 4) refuse("a tile moves without a SIB byte");
  check_tile(in->reg);
  uint8_t(*tile)[MOST_BYTES] = state.data[in->reg];
  if (in->prefix == 1 || in->prefix == 3)  // tileloaddt1, tileloadd
    memset(tile, 0, sizeof state.data[in->reg]);
  else if (in->prefix != 2)
    refuse("unknown instruction of opcode 4B");
  for (int row = 0; row < rows(in->reg); row++) {
    void *memory = (void *)(in->address + row * in->index);
    if (in->prefix == 2)  // tilestored
      memcpy(memory, tile[row], row_bytes(in->reg));
    else
      memcpy(tile[row], memory, row_bytes(in->reg));
  }
}

static void multiply(const Instruction *in) {
  int acc = in->reg, a = in->rm, b = in->vvvv;
  if (in->mod != 3) refuse("a product has an operand in memory");
  check_tile(acc);
  check_tile(a);
  check_tile(b);
  if (acc == a || acc == b || a == b) refuse("a product names a tile twice");
  if (rows(acc) != rows(a) || row_bytes(acc) != row_bytes(b) || row_bytes(a) != 4 * rows(b) || row_bytes(acc) % 4)
    refuse("shapes of a product do not fit");
  int a_signed = in->prefix & 2, b_signed = in->prefix == 3 || in->prefix == 1;  // uud, usd, sud, ssd
  uint8_t sums[MOST_ROWS][MOST_BYTES] = {{0}};
  for (int m = 0; m < rows(acc); m++)
    for (int n = 0; n < row_bytes(acc) / 4; n++) {
      uint32_t sum;  // wraps around
      memcpy(&sum, state.data[acc][m] + 4 * n, 4);
      for (int k = 0; k < row_bytes(a); k++) {
        uint8_t left = state.data[a][m][k], right = state.data[b][k / 4][4 * n + k % 4];
        sum += (uint32_t)((a_signed ? (int8_t)left : left) * (b_signed ? (int8_t)right : right));
      }
      memcpy(sums[m] + 4 * n, &sum, 4);
    }
  memcpy(state.data[acc], sums, sizeof sums);
}

static void handle(int number, siginfo_t *info, void *context) {
  greg_t *gregs = ((ucontext_t *)context)->uc_mcontext.gregs;
  Instruction in;
  if (!decode(&in, (const uint8_t *)gregs[REG_RIP], gregs)) {
    signal(SIGILL, SIG_DFL);  // and the instruction is tried again
    return;
  }
  if (in.opcode == 0x49)
    configure(&in);
  else if (in.opcode == 0x4B)
    move(&in);
  else
    multiply(&in);
  gregs[REG_RIP] += in.length;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO};
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGILL, &action, NULL)) refuse("cannot handle SIGILL");
}
