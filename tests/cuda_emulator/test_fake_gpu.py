"""The fake driver: what a process sees of it, which images it takes, graphs and their counters."""

import struct

import pytest

from tests.cuda_emulator import EmulatorError, fake_gpu

LIBRARIES = """
import ctypes, struct, sys
driver, runtime = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libcudart.so.13")
number = ctypes.c_int()
def asked(function, *arguments):
    status = function(ctypes.byref(number), *arguments)
    return number.value if status == 0 else -status
"""


def seen(expression: str, **settings: object) -> str:
    return fake_gpu.python(f"{LIBRARIES}\nprint({expression})", fake_gpu.environment(**settings)).strip()


def test_properties() -> None:
    expression = (
        "driver.cuInit(0), asked(driver.cuDriverGetVersion), asked(driver.cuDeviceGetCount), "
        "asked(driver.cuDeviceGetAttribute, 75, 0), asked(driver.cuDeviceGetAttribute, 76, 0), "
        "asked(runtime.cudaGetDeviceCount), asked(runtime.cudaDeviceGetAttribute, 97, 0)"
    )
    assert seen(expression, compute_capability=(8, 6), driver=13010) == f"0 13010 1 8 6 1 {99 * 1024}"


def test_what_tvm_sees() -> None:
    code = """
import tvm
gpu = tvm.cuda(0)
print(gpu.exist, gpu.compute_version, gpu.device_name, gpu.total_global_memory, tvm.cuda(1).exist)
"""
    env = fake_gpu.environment(compute_capability=(12, 0), name="Some GPU", memory=12345678)
    assert fake_gpu.python(code, env).split("\n")[0] == "True 12.0 Some GPU 12345678 False"


def test_a_machine_without_a_gpu() -> None:
    expression = "driver.cuInit(0), asked(driver.cuDeviceGetCount), asked(runtime.cudaGetDeviceCount)"
    assert seen(expression, count=0) == "100 0 -100"


def test_a_driver_that_is_too_old() -> None:
    expression = "driver.cuInit(0), asked(driver.cuDriverGetVersion), asked(runtime.cudaGetDeviceCount)"
    assert seen(expression, driver=12080) == "0 12080 -35"


def test_memory_ends() -> None:
    expression = (
        "runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1001)), runtime.cudaGetLastError()"
    )
    assert seen(expression, memory=1000) == "2 2"


KERNEL = """
extern "C" __global__ void add(float* y, const float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = y[i] + x[i];
}
"""


def fatbin(*entries: tuple[int, int]) -> bytes:
    """Of (kind, architecture), kind 1 for PTX and 2 for ELF; with nothing inside."""
    packed = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 8, 0, 0, 0, 0, arch) + bytes(40) for kind, arch in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(packed)) + packed


@pytest.mark.parametrize(
    ("entries", "status"),
    [
        ([(2, 80)], 209),
        ([(2, 80), (2, 90)], 0),
        ([(2, 90)], 0),
        ([(2, 100)], 209),
        ([(1, 80)], 0),
        ([(1, 100)], 209),
        ([], 209),
    ],
)
def test_an_image_needs_code_for_the_gpu(entries: list[tuple[int, int]], status: int) -> None:
    image = fatbin(*entries)
    expression = f"driver.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), {image!r})"
    assert seen(expression, compute_capability=(9, 0)) == str(status)


def test_an_image_that_is_none() -> None:
    assert seen("driver.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), b'garbage!')") == "200"


RUN = f"""
import numpy as np
from tests.cuda_emulator import fake_gpu
module, function, y, x = (ctypes.c_void_p() for _ in range(4))
def done(status):
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(text))
        raise SystemExit(text.value.decode())
done(driver.cuModuleLoadData(ctypes.byref(module), {fatbin((2, 80))!r}))
done(driver.cuModuleGetFunction(ctypes.byref(function), module, b"add"))
for pointer in (x, y):
    done(runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(400)))
def address(array):
    return array.ctypes.data_as(ctypes.c_void_p)
def put(pointer, values):
    array = np.asarray(values, np.float32)
    done(runtime.cudaMemcpyAsync(pointer, address(array), ctypes.c_size_t(array.nbytes), 1, None))
def get(pointer, n):
    array = np.empty(n, np.float32)
    done(runtime.cudaMemcpyAsync(address(array), pointer, ctypes.c_size_t(array.nbytes), 2, None))
    return array
def launch(n, stream=None, blocks=4):
    n = ctypes.c_int(n)
    arguments = (ctypes.c_void_p * 3)(*(ctypes.addressof(a) for a in (y, x, n)))
    class Config(ctypes.Structure):
        _fields_ = [("extents", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p * 2)]
    config = Config((ctypes.c_uint * 7)(blocks, 1, 1, 32, 1, 1, 0), stream)
    return driver.cuLaunchKernelEx(ctypes.byref(config), function, arguments, None)
def counted(*names):
    return tuple(fake_gpu.counters(names).values())
put(x, np.arange(100)), put(y, np.ones(100))
"""


def run(code: str, **settings: object) -> str:
    return fake_gpu.python(LIBRARIES + RUN + code, fake_gpu.environment(kernels=[KERNEL], **settings)).strip()


def test_a_launch_by_the_driver() -> None:
    code = "done(launch(100)); print(get(y, 100).sum(), counted('launches', 'copies_to_device', 'copies_from_device'))"
    assert run(code) == "5050.0 (1, 2, 1)"


def test_a_kernel_that_fails() -> None:
    with pytest.raises(
        EmulatorError, match=r"kernel add, block \(3,.* where no memory is: y \(400 bytes\) at .*line 4: `"
    ):
        run("done(launch(101))")


def test_a_graph() -> None:
    """A captured launch runs when its graph does, with the arguments of then."""
    code = """
stream, graph, executable = (ctypes.c_void_p() for _ in range(3))
done(runtime.cudaStreamCreate(ctypes.byref(stream)))
done(runtime.cudaStreamBeginCapture(stream, 0))
done(launch(100, stream)), done(launch(50, stream))
done(runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)))
done(runtime.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)))
done(runtime.cudaGraphDestroy(graph))
before = get(y, 100).sum()
done(runtime.cudaGraphLaunch(executable, None)), done(runtime.cudaGraphLaunch(executable, None))
print(before, get(y, 100).sum(), counted("launches", "graphs", "graph_launches", "graph_kernels"))
"""
    total = 100 + 2 * (sum(range(100)) + sum(range(50)))
    assert run(code) == f"100.0 {total}.0 (0, 1, 2, 4)"


@pytest.mark.parametrize(
    ("forbidden", "status"),
    [
        ("runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4))", 900),
        ("runtime.cudaStreamSynchronize(stream)", 900),
        ("launch(100)", 906),
    ],
)
def test_what_a_capture_forbids(forbidden: str, status: int) -> None:
    code = f"""
stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
done(runtime.cudaStreamCreate(ctypes.byref(stream)))
done(runtime.cudaStreamBeginCapture(stream, 0))
print({forbidden}, runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)))
"""
    assert run(code) == f"{status} 901"
