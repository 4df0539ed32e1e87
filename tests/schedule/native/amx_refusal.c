// For a CPU with AMX: where AMX_REFUSED is set, makes Linux refuse the tiles by a signal stack that is too small for
// them (Documentation/arch/x86/xstate.rst).

#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>

__attribute__((constructor)) static void shrink_signal_stack(void) {
  static char memory[2048];
  const stack_t stack = {.ss_sp = memory, .ss_size = sizeof memory};
  if (getenv("AMX_REFUSED") != NULL && sigaltstack(&stack, NULL) != 0) abort();
}
