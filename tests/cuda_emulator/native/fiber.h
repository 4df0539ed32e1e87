// Stacks to run the threads of a block on, and the switch between two of them.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(TT_FIBER_ASSEMBLY) && defined(__x86_64__)
#define TT_FIBER_ASSEMBLY 1
#endif
#if !TT_FIBER_ASSEMBLY
#include <ucontext.h>
#endif

struct Context {
#if TT_FIBER_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

void context_switch(Context& from, Context& to);
// A context that calls entry() on this stack; entry never returns.
void context_make(Context& made, char* stack, size_t size, void (*entry)());

// All stacks lie in one range, so that an access to a local variable is told by its address.
constexpr size_t kStackBytes = 256 * 1024;
char* stack_of(unsigned thread);
bool in_stacks(const void* address);
