// Buffers of global memory and the shadow of shared memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

// Half, bfloat16, float and double NaN; as bytes 127 and -3, as int32 above 2^30.
constexpr uint16_t kPoison = 0x7FFD;
void poison(void* begin, size_t bytes);
bool is_poison(const void* begin, size_t bytes, size_t phase);

// Which thread wrote a byte of global memory, in which launch.
struct GlobalMark {
  uint32_t launch;
  uint32_t writer;  // number of the block * 1024 + thread
  uint32_t epoch;
  uint32_t atomic;
};

struct Buffer {
  char* mapping = nullptr;  // guard page, slack, bytes, slack below the alignment, guard page
  size_t mapped = 0;
  char* begin = nullptr;
  size_t size = 0;
  int mode = 0;
  bool traced = true;  // no unchecked kernel ran since it was made, so that `written` tells the truth
  uint8_t* written = nullptr;   // a byte each; pages come when touched
  GlobalMark* marks = nullptr;  // likewise
};

// The buffer of this address, or null.
Buffer* find_buffer(const void* address);
// Calls visit(buffer) for every buffer.
void for_each_buffer(void (*visit)(Buffer&));
// Checks that nothing wrote between a buffer's end and its guard page.
bool red_zone_intact(const Buffer& buffer);
