// Runs blocks one after another: the threads of a warp until they all wait or end, then the next warp.
#include "block.h"

#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

Block block;
Thread* self = nullptr;
Thread* warp_begin = nullptr;
Thread threads[1024];

namespace {

Context scheduler;
std::string failure;
bool failed = false;
std::string last_error;
std::mutex launch_mutex;
uint64_t seed = 0;
std::mt19937_64 shuffle_random;
sigjmp_buf escape;
volatile sig_atomic_t in_launch = 0;

void entry() {
  block.kernel->invoke(block.args);
  self->state = State::kDone;
  Context& mine = self->context;
  context_switch(mine, scheduler);
}

void suspend() { context_switch(self->context, scheduler); }

void resume(Thread& thread) {
  self = &thread;
  context_switch(scheduler, thread.context);
  self = nullptr;
  if (failed) throw std::runtime_error(failure);
}

// "lanes 0-15 wait at __shfl_sync (line 7, mask 0xffffffff); lanes 16-31 have ended"
std::string warp_state(const Thread* warp, unsigned lanes) {
  std::vector<std::string> what(lanes);
  for (unsigned i = 0; i < lanes; ++i) {
    const Thread& t = warp[i];
    if (t.state == State::kDone) what[i] = "have ended";
    if (t.state == State::kAtBarrier) what[i] = "wait at __syncthreads (line " + std::to_string(t.barrier_line) + ")";
    if (t.state == State::kAtCollective) {
      char mask[16];
      snprintf(mask, sizeof mask, "0x%08x", t.collective.mask);
      what[i] = std::string("wait at ") + t.collective.name + " (line " + std::to_string(t.collective.line) + ", mask " +
                mask + ")";
    }
  }
  std::string text;
  for (unsigned i = 0; i < lanes;) {
    unsigned end = i;
    while (end + 1 < lanes && what[end + 1] == what[i]) ++end;
    text += (text.empty() ? "lanes " : "; lanes ") + std::to_string(i) + "-" + std::to_string(end) + " " + what[i];
    i = end + 1;
  }
  return text;
}

bool same_call(const Collective& a, const Collective& b) {
  return a.name == b.name && a.line == b.line && a.mask == b.mask;
}

// Completes the collectives of a warp for which every lane has come; whether there was one.
bool complete_collectives(Thread* warp, unsigned lanes, bool any_lanes) {
  bool completed = false;
  for (unsigned i = 0; i < lanes; ++i) {
    if (warp[i].state != State::kAtCollective || warp[i].collective.any_lanes != any_lanes) continue;
    const Collective& call = warp[i].collective;
    unsigned present = 0, living = 0;
    const unsigned existing = lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1;
    for (unsigned j = 0; j < lanes; ++j) {
      if (warp[j].state != State::kDone) living |= 1u << j;
      if (warp[j].state == State::kAtCollective && same_call(warp[j].collective, call)) present |= 1u << j;
    }
    if (!any_lanes) {
      if (!(call.mask >> i & 1))
        throw std::runtime_error(std::string(call.name) + ": lane " + std::to_string(i) + " is not in its own mask; " +
                                 warp_state(warp, lanes));
      const unsigned needed = call.whole_warp ? 0xFFFFFFFFu : call.mask & existing;
      if ((present & needed) != needed) continue;
      present &= call.mask;
    }
    warp_begin = warp;
    call.run(present);
    if (call.orders_memory && (present & living) == living) ++block.warp_epoch[warp->linear / 32];
    for (unsigned j = 0; j < lanes; ++j)
      if (present >> j & 1) warp[j].state = State::kReady;
    completed = true;
  }
  return completed;
}

void run_warp(unsigned number) {
  Thread* warp = threads + number * 32;
  const unsigned lanes = std::min(32u, block.threads - number * 32);
  for (;;) {
    for (unsigned i = 0; i < lanes; ++i)
      if (warp[i].state == State::kReady) resume(warp[i]);
    if (complete_collectives(warp, lanes, false)) continue;
    if (complete_collectives(warp, lanes, true)) continue;
    break;
  }
  for (unsigned i = 0; i < lanes; ++i)
    if (warp[i].state == State::kAtCollective) {
      throw std::runtime_error(where(&warp[i]) + ": warp " + std::to_string(number) + " diverges at a collective: " +
                               warp_state(warp, lanes));
    }
}

// All threads wait at the barrier: lets them go on. False when all have ended.
bool pass_barrier() {
  unsigned waiting = 0;
  int sum = 0;
  for (unsigned i = 0; i < block.threads; ++i) waiting += threads[i].state == State::kAtBarrier;
  if (!waiting) return false;
  for (unsigned w = 0; w * 32 < block.threads; ++w) {
    Thread* warp = threads + w * 32;
    const unsigned lanes = std::min(32u, block.threads - w * 32);
    for (unsigned i = 0; i < lanes; ++i) {
      const bool here = warp[i].state == State::kAtBarrier;
      if (!here || warp[i].barrier_line != warp[0].barrier_line)
        throw std::runtime_error(where(&warp[i]) + ": not all threads come to one barrier: warp " + std::to_string(w) +
                                 ": " + warp_state(warp, lanes));
      sum += warp[i].barrier_predicate != 0;
    }
  }
  const int count = static_cast<int>(block.threads);
  for (unsigned i = 0; i < block.threads; ++i) {
    Thread& t = threads[i];
    t.barrier_result = t.barrier_kind == 0 ? sum : t.barrier_kind == 1 ? sum == count : sum > 0;
    t.state = State::kReady;
  }
  ++block.epoch;
  return true;
}

void start_block() {
  for (unsigned i = 0; i < block.threads; ++i) {
    Thread& t = threads[i];
    t.linear = i;
    t.index = {i % block.dim.x, i / block.dim.x % block.dim.y, i / (block.dim.x * block.dim.y)};
    t.state = State::kReady;
    t.copies.clear();
    t.copy_group = 0;
    context_make(t.context, stack_of(i), kStackBytes, entry);
  }
  ++block.epoch;
  block.first_epoch = block.epoch;
  memory_begin_block();
}

void run_block() {
  start_block();
  unsigned order[32];
  const unsigned warps = (block.threads + 31) / 32;
  std::iota(order, order + warps, 0u);
  do {
    if (seed) std::shuffle(order, order + warps, shuffle_random);
    for (unsigned i = 0; i < warps; ++i) run_warp(order[i]);
  } while (pass_barrier());
  memory_check_red_zones();
}

// ---- a touched guard page ----
// Handlers run on a stack of their own; the launch is left with a jump, its threads are given up.
char signal_stack[64 * 1024];
struct sigaction previous_segv, previous_bus;
stack_t previous_stack;

void on_fault(int number, siginfo_t* info, void*) {
  if (!in_launch || !self) {
    sigaction(number, number == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
    return;  // faults again, into the handler that was there before
  }
  failure = where(self) + ": touches memory that isn't there or is read-only, " + describe_address(info->si_addr);
  siglongjmp(escape, 1);
}

struct FaultHandlers {
  FaultHandlers() {
    stack_t stack{};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &previous_stack);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    in_launch = 1;
  }
  ~FaultHandlers() {
    in_launch = 0;
    sigaction(SIGSEGV, &previous_segv, nullptr);
    sigaction(SIGBUS, &previous_bus, nullptr);
    sigaltstack(&previous_stack, nullptr);
  }
};

void check_launch(const tt_kernel* kernel, const unsigned* grid, const unsigned* dim, size_t dynamic_shared) {
  const uint64_t threads_asked = static_cast<uint64_t>(dim[0]) * dim[1] * dim[2];
  const std::string name = std::string("kernel ") + kernel->name + ": ";
  if (threads_asked == 0 || threads_asked > 1024 || dim[2] > 64)
    throw std::runtime_error(name + "a block of " + std::to_string(dim[0]) + " x " + std::to_string(dim[1]) + " x " +
                             std::to_string(dim[2]) + " threads; 1 to 1024 are allowed, z to 64");
  if (kernel->max_threads && threads_asked > kernel->max_threads)
    throw std::runtime_error(name + std::to_string(threads_asked) + " threads, __launch_bounds__ allows " +
                             std::to_string(kernel->max_threads));
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7FFFFFFFu || grid[1] > 65535 || grid[2] > 65535)
    throw std::runtime_error(name + "a grid of " + std::to_string(grid[0]) + " x " + std::to_string(grid[1]) + " x " +
                             std::to_string(grid[2]) + "; 1 to 2^31-1, 65535, 65535 are allowed");
  const size_t shared = dynamic_shared + static_cast<size_t>(kernel->shared_end - kernel->shared_begin);
  if (shared > shared_limit())
    throw std::runtime_error(name + std::to_string(shared) + " bytes of shared memory, the device has " +
                             std::to_string(shared_limit()) + " for a block");
  if (static_cast<size_t>(kernel->shared_end - kernel->shared_begin) > 48 * 1024)
    throw std::runtime_error(name + "more than 48 KiB of static shared memory");
}

void run_grid(const unsigned* grid) {
  block.number = 0;
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0]; ++x) {
        block.index = {x, y, z};
        run_block();
        ++block.number;
      }
}

}  // namespace

void fail(const std::string& reason) {
  if (!self) throw std::runtime_error(reason);
  failure = reason;
  failed = true;
  suspend();
  abort();  // a thread given up is not resumed
}

std::string thread_name(unsigned i) {
  return "thread (" + std::to_string(i % block.dim.x) + "," + std::to_string(i / block.dim.x % block.dim.y) + "," +
         std::to_string(i / (block.dim.x * block.dim.y)) + ") (warp " + std::to_string(i / 32) + " lane " +
         std::to_string(i % 32) + ")";
}

std::string where(const Thread* thread) {
  return std::string("kernel ") + block.kernel->name + ", block (" + std::to_string(block.index.x) + "," +
         std::to_string(block.index.y) + "," + std::to_string(block.index.z) + "), " + thread_name(thread->linear);
}

void meet(const Collective& collective) {
  self->collective = collective;
  self->state = State::kAtCollective;
  suspend();
}

extern "C" {

tt_uint3 tt_emu_thread_idx() { return self->index; }
tt_uint3 tt_emu_block_idx() { return block.index; }
tt_uint3 tt_emu_block_dim() { return block.dim; }
tt_uint3 tt_emu_grid_dim() { return block.grid; }
char* tt_emu_dynamic_shared() { return block.dynamic_begin; }

void tt_emu_syncthreads(int line) { tt_emu_syncthreads_reduce(-1, 0, line); }

int tt_emu_syncthreads_reduce(int kind, int predicate, int line) {
  self->barrier_kind = kind;
  self->barrier_predicate = predicate;
  self->barrier_line = line;
  self->state = State::kAtBarrier;
  suspend();
  return self->barrier_result;
}

int tt_emu_launch(const tt_kernel* kernel, const unsigned* grid, const unsigned* dim, size_t dynamic_shared,
                  void** args) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  failed = false;
  shuffle_random.seed(seed);
  FaultHandlers handlers;
  // What must outlive the jump is static.
  if (sigsetjmp(escape, 1)) {
    self = nullptr;
    last_error = failure;
    return 1;
  }
  try {
    check_launch(kernel, grid, dim, dynamic_shared);
    block.kernel = kernel;
    block.args = args;
    block.dim = {dim[0], dim[1], dim[2]};
    block.grid = {grid[0], grid[1], grid[2]};
    block.threads = dim[0] * dim[1] * dim[2];
    block.dynamic_bytes = dynamic_shared;
    memory_begin_launch(kernel);
    run_grid(grid);
  } catch (const std::exception& error) {
    self = nullptr;
    last_error = error.what();
    return 1;
  }
  return 0;
}

const char* tt_emu_error() { return last_error.c_str(); }
void tt_emu_set_error(const char* message) { last_error = message; }
void tt_emu_set_seed(uint64_t value) { seed = value; }

}  // extern "C"
