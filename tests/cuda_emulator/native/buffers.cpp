// Global memory: buffers between guard pages, what of them was written.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "block.h"

namespace {
std::map<const char*, Buffer> buffers;
Buffer* last_found = nullptr;
size_t allocated = 0;
constexpr size_t kPage = 4096;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
}  // namespace

void poison(void* begin, size_t bytes) {
  auto p = static_cast<char*>(begin);
  const char two[2] = {static_cast<char>(kPoison & 0xFF), static_cast<char>(kPoison >> 8)};
  size_t done = bytes < 2 ? bytes : 2;
  std::memcpy(p, two, done);
  for (; done < bytes; done *= 2) std::memcpy(p + done, p, done < bytes - done ? done : bytes - done);
}

bool is_poison(const void* begin, size_t bytes, size_t phase) {
  const auto p = static_cast<const unsigned char*>(begin);
  for (size_t i = 0; i < bytes; ++i)
    if (p[i] != (((i + phase) & 1) ? kPoison >> 8 : kPoison & 0xFF)) return false;
  return true;
}

Buffer* find_buffer(const void* address) {
  const auto p = static_cast<const char*>(address);
  if (last_found && p >= last_found->begin && p < last_found->begin + last_found->size) return last_found;
  auto it = buffers.upper_bound(p);
  if (it == buffers.begin()) return nullptr;
  Buffer& buffer = std::prev(it)->second;
  if (p >= buffer.begin + buffer.size) return nullptr;
  return last_found = &buffer;
}

void for_each_buffer(void (*visit)(Buffer&)) {
  for (auto& [begin, buffer] : buffers) visit(buffer);
}

bool red_zone_intact(const Buffer& buffer) {
  const char* end = buffer.begin + buffer.size;
  return is_poison(end, static_cast<size_t>(buffer.mapping + buffer.mapped - kPage - end), buffer.size & 1);
}

extern "C" {

void* tt_emu_alloc(size_t bytes, size_t alignment) {
  Buffer buffer;
  const size_t aligned = round_up(bytes, alignment), pages = round_up(aligned ? aligned : 1, kPage);
  buffer.mapped = pages + 2 * kPage;
  buffer.mapping = static_cast<char*>(reserve(buffer.mapped));
  if (!buffer.mapping) return nullptr;
  buffer.begin = buffer.mapping + kPage + pages - aligned;
  buffer.size = bytes;
  poison(buffer.begin, aligned);
  mprotect(buffer.mapping, kPage, PROT_NONE);
  mprotect(buffer.mapping + kPage + pages, kPage, PROT_NONE);
  buffer.written = static_cast<uint8_t*>(reserve(bytes + 1));
  buffer.marks = static_cast<GlobalMark*>(reserve((bytes + 1) * sizeof(GlobalMark)));
  // Buffers of no bytes end at their guard page, which no other buffer has.
  buffers[buffer.begin] = buffer;
  last_found = nullptr;
  allocated += bytes;
  return buffer.begin;
}

int tt_emu_free(void* address) {
  auto it = buffers.find(static_cast<char*>(address));
  if (it == buffers.end()) return 1;
  Buffer& buffer = it->second;
  munmap(buffer.mapping, buffer.mapped);
  munmap(buffer.written, buffer.size + 1);
  munmap(buffer.marks, (buffer.size + 1) * sizeof(GlobalMark));
  allocated -= buffer.size;
  buffers.erase(it);
  last_found = nullptr;
  return 0;
}

void tt_emu_protect(void* address, int mode) {
  auto it = buffers.find(static_cast<char*>(address));
  if (it == buffers.end()) return;
  Buffer& buffer = it->second;
  buffer.mode = mode;
  mprotect(buffer.mapping + kPage, buffer.mapped - 2 * kPage,
           mode == TT_READ_ONLY ? PROT_READ : PROT_READ | PROT_WRITE);
}

void tt_emu_mark_written(const void* address, size_t bytes) {
  Buffer* buffer = bytes ? find_buffer(address) : nullptr;
  if (buffer) std::memset(buffer->written + (static_cast<const char*>(address) - buffer->begin), 1, bytes);
}

int64_t tt_emu_first_unwritten(const void* address, size_t bytes) {
  if (!bytes) return -1;
  Buffer* buffer = find_buffer(address);
  if (!buffer) return -2;
  const auto offset = static_cast<size_t>(static_cast<const char*>(address) - buffer->begin);
  if (bytes > buffer->size - offset) return -2;
  if (!buffer->traced) return -1;
  const void* hole = std::memchr(buffer->written + offset, 0, bytes);
  return hole ? static_cast<const uint8_t*>(hole) - (buffer->written + offset) : -1;
}

size_t tt_emu_allocated() { return allocated; }

}  // extern "C"
