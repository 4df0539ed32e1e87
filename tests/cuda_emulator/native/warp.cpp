// What the lanes of a warp do together, and asynchronous copies.
#include <cmath>
#include <cstring>

#include "block.h"
#include "half.h"
#include "memory.h"

namespace {

bool has(unsigned set, unsigned lane) { return lane < 32 && (set >> lane & 1); }

// ---- exchange of values ----

void run_shuffle(unsigned present) {
  static char values[32][16];
  for (unsigned i = 0; i < 32; ++i)
    if (has(present, i)) {
      const Collective& c = lane_of_warp(i).collective;
      std::memcpy(values[i], c.operand, static_cast<size_t>(c.bytes));
    }
  for (unsigned i = 0; i < 32; ++i) {
    if (!has(present, i)) continue;
    const Collective& c = lane_of_warp(i).collective;
    const int width = c.width, first = static_cast<int>(i) / width * width, me = static_cast<int>(i);
    int from = me;
    if (c.kind == 0) from = first + (c.lane & (width - 1));
    if (c.kind == 1) from = me - c.lane >= first ? me - c.lane : me;
    if (c.kind == 2) from = me + c.lane < first + width ? me + c.lane : me;
    if (c.kind == 3) from = (me ^ c.lane) < first + width ? me ^ c.lane : me;
    if (has(present, static_cast<unsigned>(from)))
      std::memcpy(c.operand, values[from], static_cast<size_t>(c.bytes));
    else
      poison(c.operand, static_cast<size_t>(c.bytes));  // a lane that isn't there: undefined
  }
}

struct Ballot {
  int predicate;
  unsigned result;
};

void run_ballot(unsigned present) {
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (has(present, i) && static_cast<Ballot*>(lane_of_warp(i).collective.operand)->predicate) votes |= 1u << i;
  for (unsigned i = 0; i < 32; ++i)
    if (has(present, i)) static_cast<Ballot*>(lane_of_warp(i).collective.operand)->result = votes;
}

void run_activemask(unsigned present) {
  for (unsigned i = 0; i < 32; ++i)
    if (has(present, i)) *static_cast<unsigned*>(lane_of_warp(i).collective.operand) = present;
}

unsigned combine(int kind, bool is_signed, unsigned a, unsigned b) {
  const bool less = is_signed ? static_cast<int>(a) < static_cast<int>(b) : a < b;
  switch (kind) {
    case 0: return a + b;
    case 1: return less ? a : b;
    case 2: return less ? b : a;
    case 3: return a & b;
    case 4: return a | b;
    default: return a ^ b;
  }
}

void run_reduce(unsigned present) {
  unsigned result = 0;
  bool first = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (!has(present, i)) continue;
    const Collective& c = lane_of_warp(i).collective;
    const unsigned value = *static_cast<unsigned*>(c.operand);
    result = first ? value : combine(c.kind, c.width != 0, result, value);
    first = false;
  }
  for (unsigned i = 0; i < 32; ++i)
    if (has(present, i)) *static_cast<unsigned*>(lane_of_warp(i).collective.operand) = result;
}

void run_nothing(unsigned) {}

Collective collective(const char* name, int line, unsigned mask, void (*run)(unsigned), void* operand) {
  Collective c;
  c.name = name;
  c.line = line;
  c.mask = mask;
  c.run = run;
  c.operand = operand;
  return c;
}

// ---- matrix products: fragments as in the PTX ISA, "Matrix fragments for mma" ----

struct Product {
  void* d;
  const unsigned *a, *b;
};

const Product& product_of(unsigned lane) { return *static_cast<Product*>(lane_of_warp(lane).collective.operand); }

// Element (i / 2 * 8 + lane / 4, lane % 4 * 2 + i % 2) of the 16 x 8 results is register i of a lane.
template <class T, class Multiply>
void for_results(Multiply&& multiply) {
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < 4; ++i) {
      T& d = static_cast<T*>(product_of(lane).d)[i];
      d = multiply(d, i / 2 * 8 + lane / 4, lane % 4 * 2 + i % 2);
    }
}

// Registers hold `32 / bits` numbers that follow each other in k. Register r of A is of row lane / 4 + 8 (r % 2), and
// of the first or second half of k by r / 2; register r of B is of column lane / 4 and of half r.
template <class Store>
void gather_a(unsigned per_register, Store&& store) {
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned r = 0; r < 4; ++r)
      store(lane / 4 + 8 * (r % 2), (lane % 4 + 4 * (r / 2)) * per_register, product_of(lane).a[r]);
}
template <class Store>
void gather_b(unsigned per_register, Store&& store) {
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned r = 0; r < 2; ++r) store(lane / 4, (lane % 4 + 4 * r) * per_register, product_of(lane).b[r]);
}

template <class A>
void run_mma_bytes(unsigned) {
  static int a[16][32], b[8][32];
  gather_a(4, [](unsigned row, unsigned k, unsigned word) {
    for (unsigned j = 0; j < 4; ++j) a[row][k + j] = static_cast<A>(word >> 8 * j);
  });
  gather_b(4, [](unsigned column, unsigned k, unsigned word) {
    for (unsigned j = 0; j < 4; ++j) b[column][k + j] = static_cast<int8_t>(word >> 8 * j);
  });
  for_results<int>([](int d, unsigned row, unsigned column) {
    for (unsigned k = 0; k < 32; ++k) d += a[row][k] * b[column][k];
    return d;
  });
}

template <float (*widen)(uint16_t)>
void run_mma_halves(unsigned) {
  static float a[16][16], b[8][16];
  gather_a(2, [](unsigned row, unsigned k, unsigned word) {
    for (unsigned j = 0; j < 2; ++j) a[row][k + j] = widen(static_cast<uint16_t>(word >> 16 * j));
  });
  gather_b(2, [](unsigned column, unsigned k, unsigned word) {
    for (unsigned j = 0; j < 2; ++j) b[column][k + j] = widen(static_cast<uint16_t>(word >> 16 * j));
  });
  for_results<float>([](float d, unsigned row, unsigned column) {
    for (unsigned k = 0; k < 16; ++k) d += a[row][k] * b[column][k];
    return d;
  });
}

void run_mma_bits(unsigned) {
  static unsigned a[16][8], b[8][8];
  gather_a(1, [](unsigned row, unsigned word_of_k, unsigned word) { a[row][word_of_k] = word; });
  gather_b(1, [](unsigned column, unsigned word_of_k, unsigned word) { b[column][word_of_k] = word; });
  for_results<int>([](int d, unsigned row, unsigned column) {
    for (unsigned k = 0; k < 8; ++k) d += __builtin_popcount(a[row][k] & b[column][k]);
    return d;
  });
}

void meet_mma(const char* name, void (*run)(unsigned), void* d, const unsigned* a, const unsigned* b) {
  Product product{d, a, b};
  Collective c = collective(name, 0, 0xFFFFFFFFu, run, &product);
  c.whole_warp = true;
  meet(c);
}

// ---- ldmatrix ----
struct Load {
  unsigned* d;
  const unsigned char* row;
  int count, transposed;
};

void run_ldmatrix(unsigned) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& load = *static_cast<Load*>(lane_of_warp(lane).collective.operand);
    for (int m = 0; m < load.count; ++m) {
      uint16_t pair[2];
      for (unsigned j = 0; j < 2; ++j) {
        unsigned row = lane / 4, column = lane % 4 * 2 + j;
        if (load.transposed) std::swap(row, column);
        const auto& owner = *static_cast<Load*>(lane_of_warp(static_cast<unsigned>(m) * 8 + row).collective.operand);
        std::memcpy(&pair[j], owner.row + 2 * column, 2);
      }
      load.d[m] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
  }
}

}  // namespace

extern "C" {

void tt_emu_syncwarp(unsigned mask, int line) {
  Collective c = collective("__syncwarp", line, mask, run_nothing, nullptr);
  c.orders_memory = true;
  meet(c);
}

unsigned tt_emu_activemask(int line) {
  unsigned result = 0;
  Collective c = collective("__activemask", line, 0, run_activemask, &result);
  c.any_lanes = true;
  meet(c);
  return result;
}

unsigned tt_emu_ballot(unsigned mask, int predicate, int line) {
  Ballot ballot{predicate, 0};
  meet(collective("a warp vote", line, mask, run_ballot, &ballot));
  return ballot.result;
}

void tt_emu_shuffle(int kind, unsigned mask, void* data, int bytes, int lane, int width, int line) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail(where(self) + ": " + names[kind] + " of width " + std::to_string(width) + ", not a power of two to 32");
  if (bytes > 8) fail(where(self) + ": " + names[kind] + " of " + std::to_string(bytes) + " bytes, at most 8");
  Collective c = collective(names[kind], line, mask, run_shuffle, data);
  c.kind = kind;
  c.bytes = bytes;
  c.lane = lane;
  c.width = width;
  meet(c);
}

unsigned tt_emu_reduce(int kind, int is_signed, unsigned mask, unsigned value, int line) {
  Collective c = collective("a warp reduction", line, mask, run_reduce, &value);
  c.kind = kind;
  c.width = is_signed;
  meet(c);
  return value;
}

void tt_emu_mma_m16n8k32_u8s8(int* d, const unsigned* a, const unsigned* b) {
  meet_mma("mma.m16n8k32.u8.s8", run_mma_bytes<uint8_t>, d, a, b);
}
void tt_emu_mma_m16n8k32_s8s8(int* d, const unsigned* a, const unsigned* b) {
  meet_mma("mma.m16n8k32.s8.s8", run_mma_bytes<int8_t>, d, a, b);
}
void tt_emu_mma_m16n8k16_f16(float* d, const unsigned* a, const unsigned* b) {
  meet_mma("mma.m16n8k16.f16", run_mma_halves<tt::half_to_float>, d, a, b);
}
void tt_emu_mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b) {
  meet_mma("mma.m16n8k16.bf16", run_mma_halves<tt::bf16_to_float>, d, a, b);
}
void tt_emu_mma_m16n8k256_b1_and_popc(int* d, const unsigned* a, const unsigned* b) {
  meet_mma("mma.m16n8k256.b1.and.popc", run_mma_bits, d, a, b);
}

void tt_emu_ldmatrix(unsigned* d, const void* row, int count, int transposed) {
  if (static_cast<int>(self->linear % 32) < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail(where(self) + ": ldmatrix of a row at " + describe_address(row) + ", which isn't a multiple of 16");
    if (block.kernel->checked) access_memory(row, 16, false, __builtin_return_address(0));
  }
  Load load{d, static_cast<const unsigned char*>(row), count, transposed};
  Collective c = collective("ldmatrix", 0, 0xFFFFFFFFu, run_ldmatrix, &load);
  c.whole_warp = true;
  meet(c);
}

// ---- asynchronous copies: arrive in shared memory when waited for; until then it is poison ----

void tt_emu_cp_async(void* shared, const void* global, int bytes, int valid_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail(where(self) + ": cp.async of " + std::to_string(bytes) + " bytes; 4, 8 or 16 are allowed");
  if (valid_bytes < 0 || valid_bytes > bytes)
    fail(where(self) + ": cp.async that reads " + std::to_string(valid_bytes) + " of " + std::to_string(bytes) + " bytes");
  const auto size = static_cast<uintptr_t>(bytes);
  if (reinterpret_cast<uintptr_t>(shared) % size || (valid_bytes && reinterpret_cast<uintptr_t>(global) % size))
    fail(where(self) + ": cp.async between " + describe_address(shared) + " and " + describe_address(global) +
         ", not both multiples of " + std::to_string(bytes));
  const void* pc = __builtin_return_address(0);
  if (block.kernel->checked) {
    if (valid_bytes) access_memory(global, static_cast<size_t>(valid_bytes), false, pc);
    access_memory(shared, size, true, pc);
    shared_set_pending(shared, size, true);
  }
  PendingCopy copy{static_cast<char*>(shared), bytes, self->copy_group, {}};
  std::memcpy(copy.data, global, static_cast<size_t>(valid_bytes));
  self->copies.push_back(copy);
  poison(shared, size);
}

void tt_emu_cp_async_commit() { ++self->copy_group; }

void tt_emu_cp_async_wait(int groups_left) {
  size_t kept = 0;
  for (const PendingCopy& copy : self->copies) {
    if (copy.group + static_cast<unsigned>(groups_left) >= self->copy_group) {
      self->copies[kept++] = copy;
      continue;
    }
    if (block.kernel->checked) {
      shared_set_pending(copy.shared, static_cast<size_t>(copy.bytes), false);
      access_memory(copy.shared, static_cast<size_t>(copy.bytes), true, __builtin_return_address(0));
    }
    std::memcpy(copy.shared, copy.data, static_cast<size_t>(copy.bytes));
  }
  self->copies.resize(kept);
}

void tt_emu_cp_async_wait_all() {
  tt_emu_cp_async_commit();
  tt_emu_cp_async_wait(0);
}

}  // extern "C"
