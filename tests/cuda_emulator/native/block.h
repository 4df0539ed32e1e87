// The threads of the block that runs now: who they are, what they wait for, how they wait.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kDone };

// What a thread that waits for its warp has come to. `run` does the work once, when all have come.
struct Collective {
  const char* name = nullptr;
  int line = 0;
  unsigned mask = 0;
  bool whole_warp = false;   // all 32 lanes must come
  bool orders_memory = false;
  bool any_lanes = false;  // __activemask: whoever is there
  void (*run)(unsigned participants) = nullptr;
  void* operand = nullptr;
  int kind = 0, bytes = 0, lane = 0, width = 0;
};

struct PendingCopy {
  char* shared;
  int bytes;
  unsigned group;
  unsigned char data[16];
};

struct Thread {
  Context context;
  State state = State::kDone;
  tt_uint3 index{};
  unsigned linear = 0;
  int barrier_line = 0, barrier_predicate = 0, barrier_kind = -1, barrier_result = 0;
  Collective collective;
  std::vector<PendingCopy> copies;
  unsigned copy_group = 0;
};

struct Block {
  const tt_kernel* kernel = nullptr;
  void** args = nullptr;
  tt_uint3 index{}, dim{}, grid{};
  unsigned threads = 0;
  uint64_t number = 0;       // of this launch
  uint32_t epoch = 1;        // grows at every barrier and block, never repeats
  uint32_t first_epoch = 1;  // of this block
  uint32_t warp_epoch[32] = {};
  char* dynamic_begin = nullptr;
  size_t dynamic_bytes = 0;
};

extern Block block;
extern Thread* self;  // the thread that runs, null between threads
extern Thread threads[1024];

// Ends the launch with this reason. From a thread it never comes back; from the scheduler it throws.
[[noreturn]] void fail(const std::string& reason);
// "kernel k, block (0,0,0), thread (5,0,0)"
std::string where(const Thread* thread);
std::string thread_name(unsigned linear);

// Comes back when all lanes it needs have come and `run` has run.
void meet(const Collective& collective);
inline Thread& lane_of_warp(unsigned lane);
// The first thread of the warp whose collective runs now.
extern Thread* warp_begin;
inline Thread& lane_of_warp(unsigned lane) { return warp_begin[lane]; }

// memory.cpp
void access_memory(const void* address, size_t bytes, bool write, const void* pc);
void access_atomic(const void* address, size_t bytes, const void* pc);
void memory_begin_launch(const tt_kernel* kernel);
void memory_begin_block();
void memory_check_red_zones();
void shared_set_pending(const void* address, size_t bytes, bool pending);
std::string describe_address(const void* address);
size_t shared_limit();
