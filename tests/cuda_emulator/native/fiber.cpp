#include "fiber.h"

#include <sys/mman.h>

#include <stdexcept>

#if TT_FIBER_ASSEMBLY
// Saves what a call preserves; some 2 ns, where swapcontext makes a system call.
extern "C" void tt_switch(void** save, void* load);
asm(R"(
.text
.type tt_switch,@function
tt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tt_switch,.-tt_switch
)");

void context_switch(Context& from, Context& to) { tt_switch(&from.stack_pointer, to.stack_pointer); }

void context_make(Context& made, char* stack, size_t size, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t{63};
  auto words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // where entry would return to; also aligns the stack as after a call
  *--words = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  made.stack_pointer = words;
}
#else
void context_switch(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

void context_make(Context& made, char* stack, size_t size, void (*entry)()) {
  getcontext(&made.context);
  made.context.uc_stack.ss_sp = stack;
  made.context.uc_stack.ss_size = size;
  made.context.uc_link = nullptr;
  makecontext(&made.context, entry, 0);
}
#endif

namespace {
constexpr unsigned kThreads = 1024;
constexpr size_t kGuard = 4096;
char* arena = nullptr;
}  // namespace

char* stack_of(unsigned thread) {
  if (!arena) {
    void* mapped = mmap(nullptr, kThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("no memory for the stacks of 1024 threads");
    arena = static_cast<char*>(mapped);
    for (unsigned i = 0; i < kThreads; ++i) mprotect(arena + i * kStackBytes, kGuard, PROT_NONE);
  }
  return arena + thread * kStackBytes;
}

bool in_stacks(const void* address) {
  const auto p = static_cast<const char*>(address);
  return arena && p >= arena && p < arena + kThreads * kStackBytes;
}
