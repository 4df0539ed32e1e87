"""Ask the NVIDIA driver what GPUs this host has. Needs nothing but the driver's own library."""

from __future__ import annotations

import ctypes
from typing import Any

from tvm_ternary.runtime.cuda import CudaFacts, Gpu

LIBRARY = "libcuda.so.1"

# CUdevice_attribute in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NAME_BYTES = 256


class _DriverError(Exception):
    """A call failed; the text is the error's name."""


def read_devices(number: int | None = None) -> CudaFacts:
    """Ask for the driver's version and for all GPUs.

    Parameters
    ----------
    number : int, optional
        The GPU whose free memory is asked for too. That takes a context on it for the moment, some 0.2 s.

    Returns
    -------
    CudaFacts
        Nothing is raised: what went wrong is a fact.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return CudaFacts(library=str(error))
    driver, version = _Driver(library), (0, 0)
    try:
        version = driver.version()
        driver.call("cuInit", 0)
        count = driver.number("cuDeviceGetCount")
        return CudaFacts(version=version, gpus=tuple(driver.gpu(index, index == number) for index in range(count)))
    except _DriverError as error:
        return CudaFacts(version=version, initialization=str(error))


class _Driver:
    """Calls of the driver's library, its status checked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            raise _DriverError((name.value or str(status).encode()).decode())

    def number(self, function: str, *arguments: Any) -> int:
        """A whole number that comes back through the first argument."""
        value = ctypes.c_int()
        self.call(function, ctypes.byref(value), *arguments)
        return value.value

    def version(self) -> tuple[int, int]:
        """13000 is CUDA 13.0."""
        version = self.number("cuDriverGetVersion")
        return version // 1000, version % 1000 // 10

    def gpu(self, index: int, with_free_memory: bool) -> Gpu:
        device = self.number("cuDeviceGet", index)
        name, total = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
        self.call("cuDeviceGetName", name, _NAME_BYTES, device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
        major, minor = (
            self.number("cuDeviceGetAttribute", attribute, device)
            for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        free = self.free_bytes(device) if with_free_memory else None
        return Gpu(index, name.value.decode(errors="replace"), (major, minor), total.value, free)

    def free_bytes(self, device: int) -> int:
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self.call("cuCtxPushCurrent_v2", context)
            try:
                self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            finally:
                # Whoever called may have a context of his own.
                self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        finally:
            self.call("cuDevicePrimaryCtxRelease_v2", device)
        return free.value
