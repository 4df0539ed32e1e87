// libcuda.so.1: what TVM's runtime calls of the driver, and what a program asks before it loads that runtime.
#include <cstdio>
#include <cstring>

#include "device.h"

struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  Stream* stream;
  void* attributes;
  unsigned attribute_count;
};

extern "C" {

int cuInit(unsigned) { return settings().count > 0 ? kSuccess : kNoDevice; }
int cuDriverGetVersion(int* version) { return *version = settings().driver, kSuccess; }
int cuDeviceGetCount(int* count) { return *count = settings().count, kSuccess; }
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < settings().count ? kSuccess : kInvalidDevice;
}
int cuDeviceGetAttribute(int* value, int number, int device) {
  *value = attribute(number);
  return device >= 0 && device < settings().count ? kSuccess : kInvalidDevice;
}
int cuDeviceGetName(char* name, int size, int device) {
  snprintf(name, static_cast<size_t>(size), "%s", settings().name.c_str());
  return device >= 0 && device < settings().count ? kSuccess : kInvalidDevice;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = settings().memory, kSuccess; }
int cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = memory_free();
  *total = settings().memory;
  return kSuccess;
}
// One context, that of device 0.
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &settings(), device_status(); }
int cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }
int cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
int cuCtxGetCurrent(void** context) { return *context = &settings(), kSuccess; }
int cuCtxSetCurrent(void*) { return kSuccess; }
int cuCtxPushCurrent_v2(void*) { return kSuccess; }
int cuCtxPopCurrent_v2(void** context) { return *context = &settings(), kSuccess; }
int cuCtxSynchronize() { return may_synchronise(); }

int cuGetErrorName(int status, const char** text) { return *text = status_name(status), kSuccess; }
int cuGetErrorString(int status, const char** text) { return *text = status_text(status), kSuccess; }

int cuModuleLoadData(Module** module, const void* image) { return load_module(module, image); }
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  return find_function(function, module, name);
}
int cuModuleUnload(Module* module) {
  for (Function* function : module->functions) delete function;
  delete module;
  return kSuccess;
}
int cuFuncSetAttribute(Function* function, int number, int value) {
  const tt_kernel* kernel = function->kernel;
  const size_t total = static_cast<size_t>(value) + static_cast<size_t>(kernel->shared_end - kernel->shared_begin);
  if (number != 8) return kSuccess;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  if (value < 0 || total > shared_per_block()) return kInvalidValue;
  function->dynamic_allowed = total;
  return kSuccess;
}
int cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** args, void**) {
  return launch(function, config->grid, config->block, config->shared, config->stream, args);
}
int cuTensorMapEncodeTiled() { return kInvalidValue; }
}
