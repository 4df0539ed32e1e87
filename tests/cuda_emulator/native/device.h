// The fake device that libcuda.so.1 and libcudart.so.13 both show: its properties, modules, streams and graphs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "emulator.h"

// Numbers that the driver's and the runtime's errors share.
enum Status {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInsufficientDriver = 35,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kNoBinaryForGpu = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kLaunchFailed = 719,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureImplicit = 906,
};

struct Settings {
  int count = 1, major = 8, minor = 0;
  int driver = 13000;  // the newest CUDA that the driver knows
  size_t memory = size_t{80} << 30;
  std::string name = "Emulated GPU";
};
Settings& settings();

struct Function {
  const tt_kernel* kernel;
  std::string library;
  size_t dynamic_allowed;
};
struct Module {
  std::string library;  // of emulated kernels; empty: kernels come from those registered
  std::vector<Function*> functions;
};

struct Graph {
  std::vector<std::function<Status()>> steps;
};
struct Stream {
  Graph* capture = nullptr;
  bool invalidated = false;
  int mode = 0;
};

// The text of a status; the name of a failed launch holds the emulator's report.
const char* status_text(int status);
const char* status_name(int status);
// The status that the calls give when there is no device, or its driver is too old; else success.
Status device_status();
int attribute(int number);
size_t shared_per_block();  // what a kernel may ask for
Status allocate(void** address, size_t bytes);
Status release(void* address);
Status copy(void* to, const void* from, size_t bytes);
Status set_bytes(void* address, int value, size_t bytes);
size_t memory_free();

Status load_module(Module** made, const void* image);
Status find_function(Function** found, Module* module, const char* name);
Status launch(Function* function, const unsigned* grid, const unsigned* block, size_t shared, Stream* stream,
              void** args);

// Runs a step now, or records it where the stream is captured.
Status submit(Stream* stream, std::function<Status()> step);
// Success unless a capture forbids calls that wait for or change the whole device.
Status may_synchronise();
Status begin_capture(Stream* stream, int mode);
Status end_capture(Stream* stream, Graph** graph);
Status launch_graph(const Graph* graph, Stream* stream);
void count(const char* what);

extern "C" {
int64_t tt_fake_counter(const char* what);
void tt_fake_reset_counters();
// "count", "major", "minor", "driver", "memory" or "name"
int tt_fake_set(const char* key, const char* value);
// A library of emulated kernels, for the modules that hold real code; the last registered is asked first.
void tt_fake_register(const char* library);
}
