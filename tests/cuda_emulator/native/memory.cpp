// What a thread may touch: bounds, races, reads of what was never written.
//
// Shared memory has a mark for every byte: who wrote it last, who read it, in which interval between barriers. Two
// threads that touch a byte in one interval, one of them writing, race; unless they are of one warp and a
// __syncwarp lies between. (A shuffle exchanges values and orders no memory.)
#include "memory.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "block.h"

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kDynamicAlignment = 1024;
constexpr uint16_t kNobody = 0xFFFF;

struct Access {
  uint32_t warp_epoch = 0;
  uint32_t pc = 0;
  uint16_t thread = kNobody;
};

struct SharedMark {
  uint32_t write_epoch = 0, read_epoch = 0;
  Access writer;
  Access reader[2];  // two of different warps, where there are such: then every writer races with one of them
  bool atomic = false, pending = false;
};

size_t limit = 227 * 1024;
char* dynamic_arena = nullptr;  // ends at a guard page
size_t dynamic_capacity = 0;
std::vector<SharedMark> dynamic_marks, static_marks;
const char *image_begin = nullptr, *image_end = nullptr;  // the library of the kernel
const tt_kernel* image_kernel = nullptr;
uint32_t launch = 0;

void reserve_dynamic() {
  if (dynamic_arena) return;
  dynamic_capacity = 256 * 1024;
  void* p = mmap(nullptr, dynamic_capacity + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) fail("no memory for shared memory");
  dynamic_arena = static_cast<char*>(p);
  mprotect(dynamic_arena + dynamic_capacity, kPage, PROT_NONE);
}

int note_image(dl_phdr_info* info, size_t, void* data) {
  const auto inside = static_cast<const char*>(data);
  const char *low = nullptr, *high = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    auto begin = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    auto end = begin + info->dlpi_phdr[i].p_memsz;
    if (!low || begin < low) low = begin;
    if (!high || end > high) high = end;
  }
  if (!low || inside < low || inside >= high) return 0;
  image_begin = low;
  image_end = high;
  return 1;
}

uint32_t pc_offset(const void* pc) {
  auto p = static_cast<const char*>(pc);
  return p >= image_begin && p < image_end ? static_cast<uint32_t>(p - image_begin) : 0;
}

std::string at(uint32_t pc) {
  if (!pc) return "";
  char text[32];
  snprintf(text, sizeof text, " <pc 0x%x>", pc - 1);
  return text;
}

std::string action(size_t bytes, bool write) {
  return std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes";
}

bool in_one_warp_in_order(const Access& before) {
  return before.thread / 32u == self->linear / 32 && before.warp_epoch < block.warp_epoch[self->linear / 32];
}

[[noreturn]] void race(const char* address, const char* what, const Access& other, const char* other_did, uint32_t pc) {
  fail(where(self) + ": race in shared memory: " + what + " " + describe_address(address) + at(pc) + ", which " +
       thread_name(other.thread) + " " + other_did + at(other.pc) + " with no barrier between");
}

bool conflicts(const Access& before) {
  return before.thread != kNobody && before.thread != self->linear && !in_one_warp_in_order(before);
}

void note_read(SharedMark& mark, const Access& access) {
  if (mark.read_epoch != block.epoch) {
    mark.read_epoch = block.epoch;
    mark.reader[0] = access;
    mark.reader[1] = Access{};
    return;
  }
  Access &first = mark.reader[0], &second = mark.reader[1];
  if (first.thread == access.thread) {
    first = access;
  } else if (second.thread == access.thread || second.thread == kNobody) {
    second = access;
  } else if (first.thread / 32 == second.thread / 32) {
    // Two of one warp: keep the one that synchronised later, the other place is for this one.
    if (second.warp_epoch > first.warp_epoch) std::swap(first, second);
    second = access;
  }
}

void access_shared(SharedMark* marks, const char* address, size_t bytes, bool write, bool atomic, uint32_t pc) {
  const Access access{block.warp_epoch[self->linear / 32], pc, static_cast<uint16_t>(self->linear)};
  for (size_t i = 0; i < bytes; ++i) {
    SharedMark& mark = marks[i];
    const bool written = mark.write_epoch >= block.first_epoch;
    if (mark.pending && written)
      fail(where(self) + ": " + action(bytes, write) + " of " + describe_address(address + i) + at(pc) +
           " while an asynchronous copy of " + thread_name(mark.writer.thread) + " to it isn't waited for");
    if (!written && !(write && !atomic))
      fail(where(self) + ": " + action(bytes, write) + " of " + describe_address(address + i) + at(pc) +
           ", which no thread of the block wrote");
    if (mark.write_epoch == block.epoch && conflicts(mark.writer) && !(atomic && mark.atomic))
      race(address + i, write ? "writes" : "reads", mark.writer, "wrote", pc);
    if (write && mark.read_epoch == block.epoch)
      for (const Access& reader : mark.reader)
        if (conflicts(reader)) race(address + i, "writes", reader, "read", pc);
    if (write) {
      mark.write_epoch = block.epoch;
      mark.writer = access;
      mark.atomic = atomic;
      mark.pending = false;
    } else {
      note_read(mark, access);
    }
  }
}

void access_global(Buffer& buffer, const char* address, size_t bytes, bool write, bool atomic, uint32_t pc) {
  const auto offset = static_cast<size_t>(address - buffer.begin);
  if (bytes > buffer.size - offset)
    fail(where(self) + ": " + action(bytes, write) + " at " + describe_address(address) + at(pc) + ", past its end");
  if (write && buffer.mode == TT_READ_ONLY)
    fail(where(self) + ": writes to an input, " + describe_address(address) + at(pc));
  if ((!write || atomic) && buffer.traced && std::memchr(buffer.written + offset, 0, bytes))
    fail(where(self) + ": " + action(bytes, false) + " of " + describe_address(address) + at(pc) +
         ", which nothing wrote");
  const auto me = static_cast<uint32_t>(block.number * 1024 + self->linear);
  for (size_t i = offset; i < offset + bytes; ++i) {
    GlobalMark& mark = buffer.marks[i];
    if (mark.launch == launch && mark.writer != me && !(atomic && mark.atomic)) {
      const bool ordered = !write && mark.writer / 1024 == me / 1024 && mark.epoch != block.epoch;
      if (!ordered)
        fail(where(self) + ": " + action(bytes, write) + " of " + describe_address(address) + at(pc) +
             ", which in the same launch block number " + std::to_string(mark.writer / 1024) + ", " +
             thread_name(mark.writer % 1024) + " wrote");
    }
    if (write) mark = {launch, me, block.epoch, atomic};
  }
  if (write) std::memset(buffer.written + offset, 1, bytes);
}

SharedMark* shared_marks(const char* p, size_t bytes) {
  if (p >= block.dynamic_begin && p < dynamic_arena + dynamic_capacity) {
    const auto offset = static_cast<size_t>(p - block.dynamic_begin);
    if (offset + bytes > block.dynamic_bytes)
      fail(where(self) + ": touches " + std::to_string(bytes) + " bytes at " + describe_address(p) + ", past its " +
           std::to_string(block.dynamic_bytes) + " bytes");
    return dynamic_marks.data() + offset;
  }
  const tt_kernel& kernel = *block.kernel;
  if (p >= kernel.shared_begin && p < kernel.shared_end)
    return static_marks.data() + (p - kernel.shared_begin);
  return nullptr;
}

// The name of the kernel's parameter that points into this buffer.
std::string parameter_in(const Buffer& buffer) {
  std::string names = block.kernel->parameters;
  const char* code = block.kernel->signature;
  for (int i = 0; code[2 * i]; ++i) {
    const size_t comma = names.find(',');
    if (code[2 * i] == 'P' || code[2 * i] == 'C') {
      const char* pointer = *static_cast<const char**>(block.args[i]);
      if (pointer >= buffer.begin && pointer <= buffer.begin + buffer.size) return names.substr(0, comma);
    }
    names.erase(0, comma == std::string::npos ? comma : comma + 1);
  }
  return "a buffer that no argument points to";
}

void access_any(const void* address, size_t bytes, bool write, bool atomic, const void* pc_address) {
  const auto p = static_cast<const char*>(address);
  if (!self || in_stacks(p)) return;
  const uint32_t pc = pc_offset(pc_address);
  if (SharedMark* marks = shared_marks(p, bytes)) {
    access_shared(marks, p, bytes, write, atomic, pc);
  } else if (Buffer* buffer = find_buffer(p)) {
    access_global(*buffer, p, bytes, write, atomic, pc);
  } else if (p < image_begin || p >= image_end) {  // constants and __device__ variables lie in the image
    fail(where(self) + ": " + action(bytes, write) + " where no memory is: " + describe_address(p) + at(pc));
  }
}

}  // namespace

void access_memory(const void* address, size_t bytes, bool write, const void* pc) {
  access_any(address, bytes, write, false, pc);
}

void access_atomic(const void* address, size_t bytes, const void* pc) { access_any(address, bytes, true, true, pc); }

void shared_set_pending(const void* address, size_t bytes, bool pending) {
  SharedMark* marks = shared_marks(static_cast<const char*>(address), bytes);
  for (size_t i = 0; marks && i < bytes; ++i) marks[i].pending = pending;
}

size_t shared_limit() { return limit; }

std::string describe_address(const void* address) {
  const auto p = static_cast<const char*>(address);
  const tt_kernel& kernel = *block.kernel;
  if (dynamic_arena && p >= block.dynamic_begin && p < dynamic_arena + dynamic_capacity + kPage)
    return "dynamic shared memory + " + std::to_string(p - block.dynamic_begin);
  if (p >= kernel.shared_begin && p < kernel.shared_end)
    return "static shared memory + " + std::to_string(p - kernel.shared_begin);
  static const char* wanted;
  static const Buffer* found;
  wanted = p;
  found = nullptr;
  for_each_buffer([](Buffer& b) {
    if (wanted >= b.mapping && wanted < b.mapping + b.mapped) found = &b;
  });
  if (found)
    return parameter_in(*found) + " (" + std::to_string(found->size) + " bytes) at offset " +
           std::to_string(p - found->begin);
  char number[32];
  snprintf(number, sizeof number, "address %p", address);
  return number;
}

void memory_begin_launch(const tt_kernel* kernel) {
  reserve_dynamic();
  ++launch;
  block.dynamic_begin =
      dynamic_arena + dynamic_capacity - (block.dynamic_bytes + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment;
  if (!kernel->checked) {
    for_each_buffer([](Buffer& buffer) { buffer.traced = false; });
    return;
  }
  if (image_kernel != kernel) {
    image_begin = image_end = nullptr;
    dl_iterate_phdr(note_image, const_cast<tt_kernel*>(kernel));
    image_kernel = kernel;
    static_marks.assign(static_cast<size_t>(kernel->shared_end - kernel->shared_begin), SharedMark{});
  }
  if (dynamic_marks.size() < block.dynamic_bytes) dynamic_marks.resize(block.dynamic_bytes);
}

void memory_begin_block() {
  poison(block.dynamic_begin, static_cast<size_t>(dynamic_arena + dynamic_capacity - block.dynamic_begin));
  const tt_kernel& kernel = *block.kernel;
  poison(kernel.shared_begin, static_cast<size_t>(kernel.shared_end - kernel.shared_begin));
}

void memory_check_red_zones() {
  const char* end = block.dynamic_begin + block.dynamic_bytes;
  if (!is_poison(end, static_cast<size_t>(dynamic_arena + dynamic_capacity - end), block.dynamic_bytes & 1))
    fail(std::string("kernel ") + block.kernel->name + ": writes past the " + std::to_string(block.dynamic_bytes) +
         " bytes of its dynamic shared memory");
}

extern "C" {
void tt_emu_set_shared_limit(size_t bytes) { limit = bytes; }
void tt_emu_atomic_access(const volatile void* address, int bytes) {
  if (block.kernel->checked)
    access_atomic(const_cast<const void*>(address), static_cast<size_t>(bytes), __builtin_return_address(0));
}

void* tt_emu_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes) access_memory(from, bytes, false, __builtin_return_address(0));
  if (bytes) access_memory(to, bytes, true, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
void* tt_emu_memset(void* to, int value, size_t bytes) {
  if (bytes) access_memory(to, bytes, true, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}

// ---- what g++ -fsanitize=thread calls before every access ----
#define TT_TRACE(n)                                                                                             \
  static void aligned_##n(const void* p, bool write, const void* pc) {                                          \
    if (self && reinterpret_cast<uintptr_t>(p) % n && !in_stacks(p))                                            \
      fail(where(self) + ": " + action(n, write) + " at " + describe_address(p) + at(pc_offset(pc)) +           \
           ", which isn't a multiple of " #n);                                                                  \
    access_memory(p, n, write, pc);                                                                             \
  }                                                                                                             \
  void __tsan_read##n(void* p) { aligned_##n(p, false, __builtin_return_address(0)); }                          \
  void __tsan_write##n(void* p) { aligned_##n(p, true, __builtin_return_address(0)); }                          \
  void __tsan_volatile_read##n(void* p) { aligned_##n(p, false, __builtin_return_address(0)); }                 \
  void __tsan_volatile_write##n(void* p) { aligned_##n(p, true, __builtin_return_address(0)); }                 \
  void __tsan_unaligned_read##n(void* p) { access_memory(p, n, false, __builtin_return_address(0)); }           \
  void __tsan_unaligned_write##n(void* p) { access_memory(p, n, true, __builtin_return_address(0)); }
TT_TRACE(1)
TT_TRACE(2)
TT_TRACE(4)
TT_TRACE(8)
TT_TRACE(16)
#undef TT_TRACE
void __tsan_read_range(void* p, size_t n) { access_memory(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { access_memory(p, n, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
