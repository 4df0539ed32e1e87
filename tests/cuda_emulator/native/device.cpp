#include "device.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>

namespace {

std::map<std::string, int64_t> counters;
std::vector<std::string> registered;
std::vector<Stream*> captures;

void split(const char* text, char separator, const std::function<void(const std::string&)>& visit) {
  std::istringstream stream(text ? text : "");
  for (std::string part; std::getline(stream, part, separator);)
    if (!part.empty()) visit(part);
}

bool assign(Settings& s, const std::string& key, const std::string& value) {
  if (key == "name") s.name = value;
  else if (key == "memory") s.memory = std::stoull(value);
  else if (key == "count") s.count = std::stoi(value);
  else if (key == "major") s.major = std::stoi(value);
  else if (key == "minor") s.minor = std::stoi(value);
  else if (key == "driver") s.driver = std::stoi(value);
  else return false;
  return true;
}

template <class T>
T read_at(const char* base, size_t offset) {
  T value;
  std::memcpy(&value, base + offset, sizeof(T));
  return value;
}

// Code for an architecture runs on later ones of its major version; PTX on all later ones.
bool runs_here(bool is_ptx, uint32_t code) {
  const Settings& s = settings();
  const auto device = static_cast<uint32_t>(s.major * 10 + s.minor);
  return code <= device && (is_ptx || code / 10 == device / 10);
}

// A fatbin is a header and entries: kind (1 PTX, 2 ELF), size of its header, size of what follows, architecture.
bool fatbin_runs_here(const char* image) {
  const size_t begin = read_at<uint16_t>(image, 6), end = begin + read_at<uint64_t>(image, 8);
  for (size_t at = begin; at < end;) {
    const auto kind = read_at<uint16_t>(image, at);
    if ((kind == 1 || kind == 2) && runs_here(kind == 1, read_at<uint32_t>(image, at + 28))) return true;
    at += read_at<uint32_t>(image, at + 4) + read_at<uint64_t>(image, at + 8);
  }
  return false;
}

const tt_kernel* kernel_in(const std::string& library, const char* name) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  auto table = handle ? static_cast<const tt_kernel*>(dlsym(handle, "tt_kernels")) : nullptr;
  if (!table) fprintf(stderr, "fake driver: %s\n", dlerror());
  for (; table && table->name; ++table)
    if (!std::strcmp(table->name, name)) return table;
  return nullptr;
}

// Copies of a launch's arguments, since a captured one runs later.
struct Arguments {
  std::vector<uint64_t> words;
  std::vector<void*> pointers;

  Arguments(const char* signature, void** args) {
    for (size_t i = 0; signature[2 * i]; ++i) {
      words.push_back(0);
      std::memcpy(&words.back(), args[i], static_cast<size_t>(signature[2 * i + 1] - '0'));
    }
    for (auto& word : words) pointers.push_back(&word);
  }
  Arguments(const Arguments&) = delete;
};

std::string launch_report;

}  // namespace

Settings& settings() {
  static Settings made = [] {
    Settings s;
    split(getenv("TT_FAKE_GPU"), ';', [&](const std::string& part) {
      const size_t equal = part.find('=');
      if (!assign(s, part.substr(0, equal), part.substr(equal + 1))) {
        fprintf(stderr, "TT_FAKE_GPU: no setting %s\n", part.c_str());
        abort();
      }
    });
    return s;
  }();
  return made;
}

const char* status_name(int status) {
  switch (status) {
    case kSuccess: return "CUDA_SUCCESS";
    case kInvalidValue: return "CUDA_ERROR_INVALID_VALUE";
    case kOutOfMemory: return "CUDA_ERROR_OUT_OF_MEMORY";
    case kInsufficientDriver: return "cudaErrorInsufficientDriver";
    case kNoDevice: return "CUDA_ERROR_NO_DEVICE";
    case kInvalidDevice: return "CUDA_ERROR_INVALID_DEVICE";
    case kInvalidImage: return "CUDA_ERROR_INVALID_IMAGE";
    case kNoBinaryForGpu: return "CUDA_ERROR_NO_BINARY_FOR_GPU";
    case kInvalidHandle: return "CUDA_ERROR_INVALID_HANDLE";
    case kNotFound: return "CUDA_ERROR_NOT_FOUND";
    case kIllegalAddress: return "CUDA_ERROR_ILLEGAL_ADDRESS";
    case kCaptureUnsupported: return "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
    case kCaptureInvalidated: return "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
    case kCaptureImplicit: return "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT";
    case kLaunchFailed:
      launch_report = std::string("CUDA_ERROR_LAUNCH_FAILED: ") + tt_emu_error();
      return launch_report.c_str();
    default: return "CUDA_ERROR_UNKNOWN";
  }
}

const char* status_text(int status) {
  switch (status) {
    case kSuccess: return "no error";
    case kOutOfMemory: return "out of memory";
    case kInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case kNoDevice: return "no CUDA-capable device is detected";
    case kNoBinaryForGpu: return "no kernel image is available for execution on the device";
    case kLaunchFailed: return "unspecified launch failure";
    default: return status_name(status);
  }
}

Status device_status() {
  if (settings().driver < 13000) return kInsufficientDriver;
  return settings().count > 0 ? kSuccess : kNoDevice;
}

size_t shared_per_block() {
  const Settings& s = settings();
  const int cc = s.major * 10 + s.minor;
  if (cc == 80) return 163 * 1024;
  return cc == 86 || cc == 89 || s.major == 12 ? 99 * 1024 : 227 * 1024;
}

// Numbered alike by the driver and the runtime.
int attribute(int number) {
  switch (number) {
    case 1: case 2: case 3: return 1024;  // threads of a block, along x, along y
    case 4: return 64;
    case 5: return 0x7FFFFFFF;  // blocks along x, y, z
    case 6: case 7: return 65535;
    case 8: return 48 * 1024;  // shared memory of a block
    case 10: return 32;        // lanes of a warp
    case 12: case 82: return 65536;  // registers
    case 13: return 1500000;         // kHz
    case 16: return 108;             // multiprocessors
    case 38: return 40 << 20;        // second-level cache
    case 39: return 2048;            // threads of a multiprocessor
    case 41: return 1;               // unified addressing
    case 75: return settings().major;
    case 76: return settings().minor;
    case 81: return static_cast<int>(shared_per_block()) + 1024;
    case 97: return static_cast<int>(shared_per_block());
    default: return 0;
  }
}

size_t memory_free() { return settings().memory - std::min(settings().memory, tt_emu_allocated()); }

Status allocate(void** address, size_t bytes) {
  if (Status status = device_status()) return status;
  if (Status status = may_synchronise()) return status;
  if (bytes > memory_free()) return kOutOfMemory;
  count("allocations");
  *address = tt_emu_alloc(bytes, 256);
  return *address ? kSuccess : kOutOfMemory;
}

Status release(void* address) {
  if (Status status = may_synchronise()) return status;
  return !address || tt_emu_free(address) == 0 ? kSuccess : kInvalidValue;
}

// Device memory is what lies in the emulator's buffers.
Status copy(void* to, const void* from, size_t bytes) {
  if (!bytes) return kSuccess;
  const bool from_device = tt_emu_first_unwritten(from, 1) != -2, to_device = tt_emu_first_unwritten(to, 1) != -2;
  if (from_device) {
    const int64_t hole = tt_emu_first_unwritten(from, bytes);
    if (hole != -1) {
      const std::string at = hole == -2 ? "past the end of its buffer" : "of which nothing wrote byte " + std::to_string(hole);
      tt_emu_set_error(("a copy from the device of " + std::to_string(bytes) + " bytes " + at).c_str());
      return kLaunchFailed;
    }
  }
  if (to_device && tt_emu_first_unwritten(to, bytes) == -2) {
    tt_emu_set_error(("a copy to the device of " + std::to_string(bytes) + " bytes past the end of its buffer").c_str());
    return kLaunchFailed;
  }
  count(to_device ? (from_device ? "copies_on_device" : "copies_to_device") : "copies_from_device");
  std::memcpy(to, from, bytes);
  if (to_device) tt_emu_mark_written(to, bytes);
  return kSuccess;
}

Status set_bytes(void* address, int value, size_t bytes) {
  std::memset(address, value, bytes);
  tt_emu_mark_written(address, bytes);
  return kSuccess;
}

// An image is a fatbin, PTX or ELF, whose kernels are then taken from the registered libraries; or it names the library.
Status load_module(Module** made, const void* image) {
  if (Status status = device_status()) return status;
  static const char emulated[] = "TT_EMULATED:";
  const auto bytes = static_cast<const char*>(image);
  std::string library;
  if (!std::strncmp(bytes, emulated, sizeof emulated - 1)) {
    library = bytes + sizeof emulated - 1;
  } else if (read_at<uint32_t>(bytes, 0) == 0xBA55ED50u) {
    if (!fatbin_runs_here(bytes)) return kNoBinaryForGpu;
  } else if (std::memcmp(bytes, "\x7f" "ELF", 4) && bytes[0] != '/' && bytes[0] != '.') {
    return kInvalidImage;
  }
  count("modules");
  *made = new Module{library, {}};
  return kSuccess;
}

Status find_function(Function** found, Module* module, const char* name) {
  std::vector<std::string> libraries;
  if (!module->library.empty()) {
    libraries.push_back(module->library);
  } else {
    split(getenv("TT_FAKE_GPU_KERNELS"), ':', [&](const std::string& part) { libraries.push_back(part); });
    libraries.insert(libraries.end(), registered.begin(), registered.end());
    std::reverse(libraries.begin(), libraries.end());
  }
  for (const std::string& library : libraries)
    if (const tt_kernel* kernel = kernel_in(library, name)) {
      *found = new Function{kernel, library, 48 * 1024};
      module->functions.push_back(*found);
      return kSuccess;
    }
  return kNotFound;
}

Status launch(Function* function, const unsigned* grid, const unsigned* block, size_t shared, Stream* stream,
              void** args) {
  const tt_kernel* kernel = function->kernel;
  if (shared + static_cast<size_t>(kernel->shared_end - kernel->shared_begin) > function->dynamic_allowed)
    return kInvalidValue;
  auto arguments = std::make_shared<Arguments>(kernel->signature, args);
  unsigned g[3] = {grid[0], grid[1], grid[2]}, b[3] = {block[0], block[1], block[2]};
  return submit(stream, [=, library = function->library]() mutable {
    count("launches");
    tt_emu_set_shared_limit(shared_per_block());
    if (tt_emu_launch(kernel, g, b, shared, arguments->pointers.data()) == 0) return kSuccess;
    tt_emu_set_error((std::string(tt_emu_error()) + " <in " + library + ">").c_str());
    return kLaunchFailed;
  });
}

Status submit(Stream* stream, std::function<Status()> step) {
  if (stream && stream->capture) {
    stream->capture->steps.push_back(std::move(step));
    return kSuccess;
  }
  // The stream that all others wait for, while one is captured.
  if (!stream && !captures.empty()) {
    for (Stream* capture : captures) capture->invalidated = true;
    return kCaptureImplicit;
  }
  return step();
}

Status may_synchronise() {
  for (Stream* capture : captures)
    if (capture->mode != 2) {
      capture->invalidated = true;
      return kCaptureUnsupported;
    }
  return kSuccess;
}

Status begin_capture(Stream* stream, int mode) {
  if (!stream) return kCaptureUnsupported;
  if (stream->capture) return kInvalidValue;
  stream->capture = new Graph;
  stream->invalidated = false;
  stream->mode = mode;
  captures.push_back(stream);
  return kSuccess;
}

Status end_capture(Stream* stream, Graph** graph) {
  if (!stream || !stream->capture) return kInvalidValue;
  captures.erase(std::find(captures.begin(), captures.end(), stream));
  *graph = stream->capture;
  stream->capture = nullptr;
  if (!stream->invalidated) return kSuccess;
  delete *graph;
  *graph = nullptr;
  return kCaptureInvalidated;
}

Status launch_graph(const Graph* graph, Stream* stream) {
  return submit(stream, [graph] {
    count("graph_launches");
    const int64_t before = counters["launches"];
    Status status = kSuccess;
    for (const auto& step : graph->steps)
      if ((status = step()) != kSuccess) break;
    counters["graph_kernels"] += counters["launches"] - before;
    counters["launches"] = before;
    return status;
  });
}

void count(const char* what) { ++counters[what]; }

extern "C" {
int64_t tt_fake_counter(const char* what) { return counters[what]; }
void tt_fake_reset_counters() { counters.clear(); }
int tt_fake_set(const char* key, const char* value) { return assign(settings(), key, value) ? 0 : 1; }
void tt_fake_register(const char* library) { registered.emplace_back(library); }
}
