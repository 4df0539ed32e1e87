// What a library of emulated kernels, the emulator and the fake driver know of each other.
#pragma once
#include <cstddef>
#include <cstdint>

struct tt_uint3 {
  unsigned x, y, z;
};

// One kernel of a compiled source; the table of them is `tt_kernels`, ended by a null name.
struct tt_kernel {
  const char* name;
  void (*invoke)(void** args);  // args[i] points to the i-th argument, as cuLaunchKernel has it
  const char* signature;        // two characters an argument: P pointer, C pointer to const, i/u/f number; then its size
  const char* parameters;       // their names, with commas
  char* shared_begin;           // its static shared memory
  char* shared_end;
  unsigned max_threads;  // __launch_bounds__, 0 without
  int checked;           // compiled with memory accesses traced
};

extern "C" {
// ---- called by kernels (see cuda_shim.h) ----
tt_uint3 tt_emu_thread_idx() __attribute__((const));
tt_uint3 tt_emu_block_idx() __attribute__((const));
tt_uint3 tt_emu_block_dim() __attribute__((const));
tt_uint3 tt_emu_grid_dim() __attribute__((const));
char* tt_emu_dynamic_shared() __attribute__((const));
void tt_emu_syncthreads(int line);
int tt_emu_syncthreads_reduce(int kind, int predicate, int line);
void tt_emu_syncwarp(unsigned mask, int line);
unsigned tt_emu_activemask(int line);
unsigned tt_emu_ballot(unsigned mask, int predicate, int line);
// kind: 0 lane, 1 up, 2 down, 3 xor; `data` is replaced
void tt_emu_shuffle(int kind, unsigned mask, void* data, int bytes, int lane, int width, int line);
// kind: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor
unsigned tt_emu_reduce(int kind, int is_signed, unsigned mask, unsigned value, int line);
void* tt_emu_memcpy(void* to, const void* from, size_t bytes);
void* tt_emu_memset(void* to, int value, size_t bytes);
void tt_emu_atomic_access(const volatile void* address, int bytes);

void tt_emu_mma_m16n8k32_u8s8(int* d, const unsigned* a, const unsigned* b);
void tt_emu_mma_m16n8k32_s8s8(int* d, const unsigned* a, const unsigned* b);
void tt_emu_mma_m16n8k16_f16(float* d, const unsigned* a, const unsigned* b);
void tt_emu_mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b);
void tt_emu_mma_m16n8k256_b1_and_popc(int* d, const unsigned* a, const unsigned* b);
// ldmatrix.m8n8.b16: `count` matrices (1, 2, 4), each thread names one row of 16 bytes
void tt_emu_ldmatrix(unsigned* d, const void* row, int count, int transposed);

void tt_emu_cp_async(void* shared, const void* global, int bytes, int valid_bytes);
void tt_emu_cp_async_commit();
void tt_emu_cp_async_wait(int groups_left);
void tt_emu_cp_async_wait_all();

// ---- called by who launches ----
// 0, or 1 with the reason in tt_emu_error(). A failed launch leaves memory half written.
int tt_emu_launch(const tt_kernel* kernel, const unsigned* grid, const unsigned* block, size_t dynamic_shared,
                  void** args);
const char* tt_emu_error();
void tt_emu_set_error(const char* message);
// Order of warps between barriers: 0 ascending, else shuffled by this seed.
void tt_emu_set_seed(uint64_t seed);
// The most shared memory of a block, static and dynamic.
void tt_emu_set_shared_limit(size_t bytes);

// Global memory, poisoned, right before a guard page as far as the alignment allows.
void* tt_emu_alloc(size_t bytes, size_t alignment);
int tt_emu_free(void* address);
enum { TT_READ_WRITE = 0, TT_READ_ONLY = 1 };
void tt_emu_protect(void* address, int mode);
// Says that the host wrote these bytes; they may be read from now on.
void tt_emu_mark_written(const void* address, size_t bytes);
// The offset of the first byte of [address, address + bytes) that nothing wrote; -1 if there is none, or
// if unchecked kernels ran since the allocation and so nobody knows; -2 when the range isn't inside one buffer.
int64_t tt_emu_first_unwritten(const void* address, size_t bytes);
size_t tt_emu_allocated();
}
