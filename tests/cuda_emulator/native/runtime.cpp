// libcudart.so.13: what TVM's runtime calls of the CUDA runtime. Streams run what they are given at once.
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace {
using Event = std::chrono::steady_clock::time_point;
thread_local int last_error = kSuccess;
thread_local int current_device = 0;

int done(int status) {
  if (status) last_error = status;
  return status;
}

template <class T>
void put(char* base, size_t offset, T value) {
  std::memcpy(base + offset, &value, sizeof(T));
}
}  // namespace

extern "C" {

int cudaRuntimeGetVersion(int* version) { return *version = 13000, kSuccess; }
int cudaDriverGetVersion(int* version) { return *version = settings().driver, kSuccess; }
int cudaGetDeviceCount(int* count) {
  const Status status = device_status();
  *count = status ? 0 : settings().count;
  return done(status);
}
int cudaGetDevice(int* device) { return *device = current_device, done(device_status()); }
int cudaSetDevice(int device) {
  if (Status status = device_status()) return done(status);
  if (device < 0 || device >= settings().count) return done(kInvalidDevice);
  current_device = device;
  return kSuccess;
}
int cudaDeviceGetAttribute(int* value, int number, int device) {
  if (Status status = device_status()) return done(status);
  *value = attribute(number);
  return device >= 0 && device < settings().count ? kSuccess : done(kInvalidDevice);
}
// struct cudaDeviceProp of CUDA 13, 1008 bytes; the fields that are read are set.
int cudaGetDeviceProperties(void* properties, int device) {
  if (device < 0 || device >= settings().count) return done(kInvalidDevice);
  auto p = static_cast<char*>(properties);
  std::memset(p, 0, 1008);
  std::strncpy(p, settings().name.c_str(), 255);
  put(p, 288, settings().memory);
  put(p, 296, size_t{48 * 1024});
  put(p, 304, attribute(12));
  put(p, 308, attribute(10));
  put(p, 320, attribute(1));
  for (int i = 0; i < 3; ++i) {
    put(p, 324 + 4 * static_cast<size_t>(i), attribute(2 + i));
    put(p, 336 + 4 * static_cast<size_t>(i), attribute(5 + i));
  }
  put(p, 360, settings().major);
  put(p, 364, settings().minor);
  put(p, 384, attribute(16));
  put(p, 596, attribute(38));
  put(p, 604, attribute(39));
  put(p, 672, shared_per_block());
  return kSuccess;
}
int cudaMemGetInfo(size_t* free, size_t* total) {
  *free = memory_free();
  *total = settings().memory;
  return done(device_status());
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
int cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(int status) { return status_name(status); }
const char* cudaGetErrorString(int status) { return status_text(status); }

int cudaMalloc(void** address, size_t bytes) { return done(allocate(address, bytes)); }
int cudaFree(void* address) { return done(release(address)); }
int cudaMallocHost(void** address, size_t bytes) {
  *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return kSuccess;
}
int cudaFreeHost(void* address) { return std::free(address), kSuccess; }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, Stream* stream) {
  return done(submit(stream, [=] { return copy(to, from, bytes); }));
}
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, Stream* stream) {
  return cudaMemcpyAsync(to, from, bytes, 0, stream);
}
int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
int cudaMemsetAsync(void* address, int value, size_t bytes, Stream* stream) {
  return done(submit(stream, [=] { return set_bytes(address, value, bytes); }));
}

int cudaStreamCreateWithFlags(Stream** stream, unsigned) { return *stream = new Stream, done(device_status()); }
int cudaStreamCreate(Stream** stream) { return cudaStreamCreateWithFlags(stream, 0); }
int cudaStreamDestroy(Stream* stream) {
  delete stream;
  return kSuccess;
}
int cudaStreamSynchronize(Stream* stream) {
  if (stream && stream->capture) stream->invalidated = true;
  return done(stream && stream->capture ? kCaptureUnsupported : stream ? kSuccess : may_synchronise());
}
int cudaDeviceSynchronize() { return done(may_synchronise()); }
int cudaStreamWaitEvent(Stream*, Event*, unsigned) { return kSuccess; }
int cudaStreamBeginCapture(Stream* stream, int mode) { return done(begin_capture(stream, mode)); }
int cudaStreamEndCapture(Stream* stream, Graph** graph) { return done(end_capture(stream, graph)); }
// A graph that is run is a copy: the one it came from may be destroyed.
int cudaGraphInstantiate(Graph** made, const Graph* graph, unsigned long long) {
  count("graphs");
  *made = new Graph(*graph);
  return kSuccess;
}
int cudaGraphLaunch(Graph* graph, Stream* stream) { return done(launch_graph(graph, stream)); }
int cudaGraphDestroy(Graph* graph) {
  delete graph;
  return kSuccess;
}
int cudaGraphExecDestroy(Graph* graph) {
  delete graph;
  return kSuccess;
}

int cudaEventCreate(Event** event) { return *event = new Event, kSuccess; }
int cudaEventDestroy(Event* event) {
  delete event;
  return kSuccess;
}
int cudaEventRecord(Event* event, Stream*) { return *event = std::chrono::steady_clock::now(), kSuccess; }
int cudaEventSynchronize(Event*) { return kSuccess; }
int cudaEventElapsedTime(float* milliseconds, Event* start, Event* stop) {
  *milliseconds = std::chrono::duration<float, std::milli>(*stop - *start).count();
  return kSuccess;
}
}
