// Runs a model that tvm-ternary compiled, without Python: .npy files in, .npy files out.
//
// Needs libtvm_ffi.so and libtvm_runtime.so; on a GPU also libtvm_runtime_cuda.so and libcudart.so.13. All lie beside
// this program. README.txt has the command that builds it.
#include <dlfcn.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/device.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;
using Dims = std::map<std::string, int64_t>;

static const char kUsage[] =
    "usage: runner [--device cpu|cuda:N] [--repeat N] [--dim NAME=SIZE]... [--tokens N] [--output DIR]\n"
    "              MODEL.so [INPUT.npy ...]\n"
    "Inputs come in the order of the model; without any they are made up, the same ones every time. A dimension that\n"
    "is not given is 1 if it leads a shape, else 32. --output writes each result to DIR/output_N.npy. A model\n"
    "that keeps keys and values starts without any and has room for --tokens of them (4096). The variable\n"
    "TVM_NUM_THREADS says how many threads compute.\n";

struct Options {
  std::string device, output, model;
  std::vector<std::string> inputs;
  Dims dims;
  int repeat = 0, tokens = 4096;
};

// An array in the memory of the host, C order.
struct Array {
  std::string dtype;  // numpy's name
  std::vector<int64_t> shape;
  std::vector<char> data;
};

[[noreturn]] static void Fail(const std::string& message) { throw std::runtime_error(message); }

static json::Value Member(const json::Value& object, const char* key) {
  return object.cast<json::Object>().at(ffi::String(key));
}
static std::string Text(const json::Value& object, const char* key) {
  return std::string(Member(object, key).cast<ffi::String>());
}
static json::Array List(const json::Value& object, const char* key) { return Member(object, key).cast<json::Array>(); }

// The last bytes of a file; all of it by default.
static std::string ReadFile(const std::string& path, uint64_t last = UINT64_MAX) {
  std::ifstream stream(path, std::ios::binary);
  if (!std::filesystem::is_regular_file(path) || !stream) Fail(path + ": cannot be read");
  const uint64_t size = std::filesystem::file_size(path);
  std::string content(std::min(size, last), '\0');
  stream.seekg(static_cast<std::streamoff>(size - content.size()));
  if (!stream.read(content.data(), static_cast<std::streamsize>(content.size()))) Fail(path + ": cannot be read");
  return content;
}

// An artifact ends with 64 bytes: "TVMTERN1", the sizes of its ELF part, of the manifest and of the weights, a SHA-256.
struct Footer {
  uint64_t elf, manifest, weights;
};
static Footer ReadFooter(const std::string& path) {
  const std::string bytes = ReadFile(path, 64);
  if (bytes.compare(0, 8, "TVMTERN1") != 0) Fail(path + ": is no library made by tvm-ternary, or cut short");
  Footer footer;
  std::memcpy(&footer, bytes.data() + 8, sizeof(footer));
  return footer;
}

static json::Value ReadManifest(const std::string& path) {
  const uint64_t size = ReadFooter(path).manifest;
  return json::Parse(ffi::String(ReadFile(path, size + 64).substr(0, size)));
}

// A type's names: numpy's, that in .npy files, that in safetensors files; for floats, how many bits the mantissa has.
struct Type {
  std::string name, npy, safetensors;
  int mantissa = 0;
};
static const Type& FindType(const std::string& any_name) {
  static const Type kTypes[] = {
      {"bool", "|b1", "BOOL"},  {"int8", "|i1", "I8"},     {"int16", "<i2", "I16"},   {"int32", "<i4", "I32"},
      {"int64", "<i8", "I64"},  {"uint8", "|u1", "U8"},    {"uint16", "<u2", "U16"},  {"uint32", "<u4", "U32"},
      {"uint64", "<u8", "U64"}, {"float16", "<f2", "F16", 10}, {"bfloat16", "<V2", "BF16", 7},
      {"float32", "<f4", "F32", 23}, {"float64", "<f8", "F64", 52}};
  for (const Type& type : kTypes) {
    if (any_name == type.name || any_name == type.safetensors) return type;
  }
  Fail("dtype " + any_name + " is not supported");
}
static int64_t ItemBytes(const std::string& dtype) { return FindType(dtype).npy[2] - '0'; }
static int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}
static std::string Join(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

// The .npy format: magic, version, length of the header, the header (a Python dictionary), the data.
static Array ReadNpy(const std::string& path, const std::string& dtype) {
  const std::string file = ReadFile(path);
  if (file.size() < 12 || file.compare(0, 6, "\x93NUMPY") != 0) Fail(path + ": is no .npy file");
  const size_t start = file[6] == 1 ? 10 : 12;
  uint32_t length = 0;
  std::memcpy(&length, file.data() + 8, start - 8);
  const std::string header = file.substr(start, length);
  if (header.find("'" + FindType(dtype).npy + "'") == std::string::npos) Fail(path + ": is not of dtype " + dtype);
  if (header.find("'fortran_order': False") == std::string::npos) Fail(path + ": is in Fortran order");
  Array array{dtype, {}, {}};
  const size_t open = header.find('(', header.find("'shape'"));
  if (open == std::string::npos) Fail(path + ": has no shape in its header");
  for (const char* at = header.c_str() + open + 1; *at && *at != ')';) {
    char* end = nullptr;
    const int64_t size = std::strtoll(at, &end, 10);
    if (end == at) {
      ++at;  // A comma or a blank.
    } else {
      array.shape.push_back(size);
      at = end;
    }
  }
  array.data.assign(file.begin() + std::min(file.size(), start + length), file.end());
  const int64_t bytes = Elements(array.shape) * ItemBytes(dtype);
  if (static_cast<int64_t>(array.data.size()) != bytes) Fail(path + ": is cut short");
  return array;
}

static void WriteNpy(const std::filesystem::path& path, const Array& array) {
  std::string header = "{'descr': '" + FindType(array.dtype).npy + "', 'fortran_order': False, 'shape': (" +
                       Join(array.shape) + (array.shape.empty() ? "), }" : ",), }");
  header.append((64 - (10 + header.size() + 1) % 64) % 64, ' ');
  header += '\n';
  const uint16_t length = static_cast<uint16_t>(header.size());
  std::ofstream stream(path, std::ios::binary);
  stream.write("\x93NUMPY\x01\x00", 8).write(reinterpret_cast<const char*>(&length), 2) << header;
  stream.write(array.data.data(), static_cast<std::streamsize>(array.data.size())).flush();
  if (!stream) Fail(path.string() + ": cannot be written");
}

// Floats of random bits with 1 <= |x| < 2; integers of 0 and 1, 1 at the start of the last axis, as masks need.
static Array MakeUp(const std::string& dtype, const std::vector<int64_t>& shape, std::mt19937_64& random) {
  const int64_t bytes = ItemBytes(dtype), last = shape.empty() ? 1 : shape.back();
  const int mantissa = FindType(dtype).mantissa, sign = static_cast<int>(8 * bytes) - 1;
  Array array{dtype, shape, std::vector<char>(static_cast<size_t>(Elements(shape) * bytes))};
  for (int64_t i = 0; i < Elements(shape); ++i) {
    const uint64_t bits = random(), one = (uint64_t{1} << (sign - 1)) - (uint64_t{1} << mantissa);  // 1.0
    uint64_t value = i % last == 0 ? 1 : bits >> 63;
    if (mantissa > 0) value = one | (bits & ((uint64_t{1} << mantissa) - 1)) | bits >> 63 << sign;
    std::memcpy(array.data.data() + i * bytes, &value, static_cast<size_t>(bytes));
  }
  return array;
}

static ffi::Tensor Upload(const Array& array, DLDevice device) {
  static const auto allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  static const auto write = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
  const DLDataType dtype = ffi::StringToDLDataType(array.dtype);
  auto tensor = allocate(ffi::Shape(array.shape), dtype, device, nullptr).cast<ffi::Tensor>();
  write(tensor, static_cast<void*>(const_cast<char*>(array.data.data())), static_cast<int64_t>(array.data.size()));
  return tensor;
}

static Array Download(const ffi::Tensor& tensor, const std::string& dtype) {
  static const auto read = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
  Array array{dtype, std::vector<int64_t>(tensor.shape().begin(), tensor.shape().end()), {}};
  array.data.resize(static_cast<size_t>(Elements(array.shape) * ItemBytes(dtype)));
  read(tensor, static_cast<void*>(array.data.data()), static_cast<int64_t>(array.data.size()));
  return array;
}

// The weights that lie in the artifact, on a multiple of 64 bytes behind the ELF part, or beside it: safetensors, that is
// the header's length, the header (JSON), the data.
static void UploadWeights(const json::Value& manifest, const std::string& model, DLDevice device,
                          std::vector<ffi::Any>* arguments) {
  const json::Value weights = Member(manifest, "weights");
  if (List(weights, "names").empty()) return;
  const bool inside = Member(weights, "file") == nullptr;
  const std::string path =
      inside ? model : (std::filesystem::path(model).parent_path() / Text(weights, "file")).string();
  const std::string file = ReadFile(path);
  const uint64_t start = inside ? (ReadFooter(model).elf + 63) / 64 * 64 : 0;
  uint64_t length = 0;
  if (file.size() >= start + sizeof(length)) std::memcpy(&length, file.data() + start, sizeof(length));
  if (length == 0 || length > file.size() - start - sizeof(length)) Fail(path + ": is cut short");
  const json::Value header = json::Parse(ffi::String(file.substr(start + sizeof(length), length)));
  for (const json::Value& name : List(weights, "names")) {
    const json::Value entry = header.cast<json::Object>().at(name);
    Array array{FindType(Text(entry, "dtype")).name, {}, {}};
    for (const json::Value& size : List(entry, "shape")) array.shape.push_back(size.cast<int64_t>());
    const uint64_t begin = start + sizeof(length) + length + List(entry, "data_offsets")[0].cast<uint64_t>();
    const uint64_t bytes = static_cast<uint64_t>(Elements(array.shape) * ItemBytes(array.dtype));
    if (begin + bytes > file.size()) Fail(path + ": is cut short");
    array.data.assign(file.data() + begin, file.data() + begin + bytes);
    arguments->push_back(Upload(array, device));
  }
}

static DLDevice OpenDevice(const std::string& name, const json::Value& target) {
  const std::string kind = Text(target, "device"), wanted = name.empty() ? kind : name;
  const auto device = ffi::Any(ffi::String(wanted)).try_cast<DLDevice>();
  if (!device || wanted.compare(0, kind.size(), kind) != 0) Fail("device " + wanted + ": this model runs on " + kind);
  if (kind == "cpu") return *device;
  if (!dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL)) {
    Fail("device " + wanted + ": no NVIDIA driver or CUDA runtime (" + dlerror() + ")");
  }
  const auto attribute = ffi::Function::GetGlobalRequired("runtime.GetDeviceAttr");
  enum { kExist = 0, kComputeVersion = 4 };  // DeviceAttrKind of TVM's device_api.h.
  const int type = device->device_type, number = device->device_id;
  if (attribute(type, number, static_cast<int>(kExist)).cast<int>() == 0) {
    Fail("device " + wanted + ": no such GPU, or the driver is too old for CUDA 13; see nvidia-smi");
  }
  const auto capability = attribute(type, number, static_cast<int>(kComputeVersion)).cast<ffi::String>();
  std::cout << "device " << wanted << ", compute capability " << std::string(capability) << "\n";
  return *device;
}

static std::vector<Array> ReadInputs(const json::Value& manifest, const Options& options) {
  const json::Array specs = List(manifest, "inputs");
  const auto bounds = Member(manifest, "bounds").cast<ffi::Map<ffi::String, int64_t>>();
  const bool given = !options.inputs.empty();
  if (given && options.inputs.size() != specs.size()) {
    Fail("got " + std::to_string(options.inputs.size()) + " inputs; expected " + std::to_string(specs.size()));
  }
  Dims dims = options.dims;
  for (const json::Value& spec : specs) {
    const json::Array shape = List(spec, "shape");
    const auto leading = shape.empty() ? std::nullopt : shape[0].as<ffi::String>();
    if (leading && !given) dims.insert({*leading, 1});
  }
  std::mt19937_64 random(0);
  std::vector<Array> arrays;
  for (size_t i = 0; i < specs.size(); ++i) {
    const std::string dtype = Text(specs[i], "dtype");
    Array array = given ? ReadNpy(options.inputs[i], dtype) : Array{};
    std::vector<int64_t> shape;
    for (const json::Value& dim : List(specs[i], "shape")) {
      const auto name = dim.as<ffi::String>();
      const int64_t most = name && bounds.count(*name) ? bounds.at(*name) : INT64_MAX;
      const int64_t usual = shape.size() < array.shape.size() ? array.shape[shape.size()] : std::min<int64_t>(32, most);
      shape.push_back(name ? dims.insert({*name, usual}).first->second : dim.cast<int64_t>());
      if (name && (shape.back() < 1 || shape.back() > most)) Fail("dimension " + *name + ": out of bounds");
    }
    if (!given) array = MakeUp(dtype, shape, random);
    const std::string got = Join(array.shape), expected = Join(shape);
    if (got != expected) Fail("input " + Text(specs[i], "name") + ": is [" + got + "]; expected [" + expected + "]");
    arrays.push_back(std::move(array));
  }
  return arrays;
}

static int Number(const std::string& option, const std::string& text) {
  const bool digits = text.find_first_not_of("0123456789") == std::string::npos;
  if (!digits || text.empty() || text.size() > 9 || std::stoi(text) < 1) {
    Fail(option + ": got '" + text + "'; expected a number of at least 1");
  }
  return std::stoi(text);
}

static Options ParseOptions(const std::vector<std::string>& words) {
  Options options;
  size_t i = 0;
  for (; i < words.size() && words[i].rfind("--", 0) == 0; i += 2) {
    const std::string& option = words[i];
    const std::string value = i + 1 < words.size() ? words[i + 1] : "";
    const size_t equals = value.find('=');
    if (option == "--device") {
      options.device = value;
    } else if (option == "--output") {
      options.output = value;
    } else if (option == "--repeat") {
      options.repeat = Number(option, value);
    } else if (option == "--tokens") {
      options.tokens = Number(option, value);
    } else if (option == "--dim" && equals != std::string::npos) {
      options.dims[value.substr(0, equals)] = Number(option, value.substr(equals + 1));
    } else {
      Fail(option + " " + value + ": no such option\n" + kUsage);
    }
  }
  if (i >= words.size()) Fail(std::string("no model is named\n") + kUsage);
  options.model = words[i];
  options.inputs.assign(words.begin() + static_cast<std::ptrdiff_t>(i) + 1, words.end());
  return options;
}

// The size of a dimension: a number, or that of an input that has one of this name.
static int64_t SizeOf(const json::Value& dim, const json::Value& manifest, const std::vector<Array>& inputs) {
  const auto name = dim.as<ffi::String>();
  if (!name) return dim.cast<int64_t>();
  const json::Array specs = List(manifest, "inputs");
  for (size_t i = 0; i < specs.size(); ++i) {
    const json::Array shape = List(specs[i], "shape");
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis].as<ffi::String>() == name) return inputs[i].shape[axis];
    }
  }
  Fail("dimension " + std::string(*name) + ": no input has it");
}

// Memory of a model that keeps keys and values: no tokens yet. What a step needs is written here: the first argument is
// how many tokens there are, the second the same for each sequence, and a run appends its own to the arrays behind. The
// next run is told one number more for each; a smaller one cuts what is beyond.
static void AddCaches(const json::Value& manifest, const std::vector<Array>& inputs, int64_t tokens, DLDevice device,
                      std::vector<ffi::Any>* arguments) {
  const json::Array caches = List(manifest, "caches");
  if (caches.empty()) return;
  const auto add = [&](const char* dtype, const std::vector<int64_t>& shape) {
    Array zeros{dtype, shape, std::vector<char>(static_cast<size_t>(Elements(shape) * ItemBytes(dtype)))};
    arguments->push_back(Upload(zeros, device));
  };
  const int64_t batch = SizeOf(Member(caches[0], "batch"), manifest, inputs);
  arguments->push_back(ffi::Shape({0}));
  add("int32", {batch});
  constexpr int64_t kBlock = 64, kLanes = 16;
  const auto up = [](int64_t count, int64_t unit) { return (count + unit - 1) / unit; };
  for (const json::Value& cache : caches) {
    const auto number = [&](const char* key) { return Member(cache, key).cast<int64_t>(); };
    const int64_t heads = number("kv_heads"), size = number("size"), value_size = number("value_size");
    const int64_t whole = up(tokens, kBlock) * kBlock;
    const bool all = Member(cache, "window").as<int64_t>() == std::nullopt;
    const int64_t window = all ? whole : std::min(number("window"), whole);
    const int64_t blocks = std::max<int64_t>(1, (tokens - window) / kBlock);
    // Words of 16 numbers of one plane, or 8 of two, for 16 rows beside each other; then a scale for each column.
    const auto packed = [&](int64_t rows, int64_t terms, int64_t planes, int64_t scales) {
      for (int64_t count : {planes % 2 ? 16 : 0, planes > 1 ? 8 : 0}) {
        if (count) add("uint32", {batch, heads, blocks, up(rows, kLanes), up(terms, count), kLanes});
      }
      add("float32", {batch, heads, blocks, scales});
    };
    packed(kBlock, size, number("key_planes"), size);
    if (number("value_planes") > 0) {
      packed(value_size, kBlock, number("value_planes"), kBlock);
    } else {
      add("float32", {batch, heads, blocks, kBlock, value_size});
    }
    for (int64_t elements : {size, value_size}) add("float32", {batch, heads, window + kBlock, elements});
    for (int i = 0; i < 2; ++i) add("int32", {batch});
  }
}

static ffi::Any Call(const ffi::Function& function, const std::vector<ffi::Any>& arguments, DLDevice device) {
  static const auto synchronize = ffi::Function::GetGlobalRequired("runtime.Device_StreamSync");
  const std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  function.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  synchronize(device, static_cast<int64_t>(0));
  return result;
}

static void Run(const Options& options) {
  const json::Value manifest = ReadManifest(options.model);
  const std::vector<Array> inputs = ReadInputs(manifest, options);
  const DLDevice device = OpenDevice(options.device, Member(manifest, "target"));
  // A path with a slash, or the dynamic linker searches its own folders.
  const ffi::Module library = ffi::Module::LoadFromFile(std::filesystem::absolute(options.model).string());
  const ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  const ffi::Function initialize = machine->GetFunction("vm_initialization").value();
  // The device and then the CPU, which computes shapes; 2 is the allocator that keeps freed memory.
  const int type = device.device_type, cpu = kDLCPU;
  type == cpu ? initialize(cpu, 0, 2) : initialize(type, device.device_id, 2, cpu, 0, 2);
  const ffi::Function main = machine->GetFunction("main").value();
  std::vector<ffi::Any> arguments;
  for (const Array& input : inputs) arguments.push_back(Upload(input, device));
  AddCaches(manifest, inputs, options.tokens, device, &arguments);
  UploadWeights(manifest, options.model, device, &arguments);

  const ffi::Any result = Call(main, arguments, device);
  const json::Array specs = List(manifest, "outputs");
  for (size_t i = 0; i < specs.size(); ++i) {
    const auto all = result.as<ffi::Array<ffi::Tensor>>();
    const ffi::Tensor tensor = all ? (*all)[static_cast<int64_t>(i)] : result.cast<ffi::Tensor>();
    const Array array = Download(tensor, Text(specs[i], "dtype"));
    std::cout << Text(specs[i], "name") << ": " << array.dtype << " [" << Join(array.shape) << "]\n";
    if (options.output.empty()) continue;
    std::filesystem::create_directories(options.output);
    WriteNpy(std::filesystem::path(options.output) / ("output_" + std::to_string(i) + ".npy"), array);
  }
  std::vector<double> times;
  for (int i = 0; i < options.repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    Call(main, arguments, device);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  if (!times.empty()) std::cout << "median of " << times.size() << " runs: " << times[times.size() / 2] << " ms\n";
}

int main(int count, char** words) {
  setenv("TVM_BIND_THREADS", "0", 0);  // TVM would pin its threads to the first CPUs.
  try {
    Run(ParseOptions({words + 1, words + count}));
    return 0;
  } catch (const ffi::Error& error) {
    std::cerr << "error: " << error.kind() << ": " << error.message() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
  }
  return 2;
}
