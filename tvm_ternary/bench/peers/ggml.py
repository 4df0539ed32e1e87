"""The few functions of ggml, the library below llama.cpp, that one matrix product needs, through ctypes.

It is done as llama.cpp does it: the weight goes to a buffer of the kind that the CPU backend prefers for its type (some
repack it), the product is a graph of one node, and `ggml_backend_graph_compute` runs it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.engines import Floats
from tvm_ternary.errors import HostError

FLOAT32 = 0
_POINTER, _INT, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_LIBRARIES = ("libggml-base.so", "libggml-cpu.so")
_GET_EXTRA = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)
_LOG = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
# It tells which kernel it chose, a line a weight, on standard error.
_SILENT = _LOG(lambda level, text, data: None)
# Nodes of a graph, which ggml makes room for; tensors of a context.
_NODES, _TENSORS = 4, 8


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


# Function -> (result, arguments), as in ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h.
_BASE: dict[str, tuple[Any, Sequence[Any]]] = {
    "ggml_init": (_POINTER, (_InitParams,)),
    "ggml_log_set": (None, (_LOG, _POINTER)),
    "ggml_free": (None, (_POINTER,)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_graph_overhead_custom": (_SIZE, (_SIZE, ctypes.c_bool)),
    "ggml_new_tensor_2d": (_POINTER, (_POINTER, _INT, _INT64, _INT64)),
    "ggml_mul_mat": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_new_graph_custom": (_POINTER, (_POINTER, _SIZE, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_quantize_chunk": (_SIZE, (_INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER)),
    "ggml_row_size": (_SIZE, (_INT, _INT64)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, (_POINTER, _POINTER)),
    "ggml_backend_buffer_free": (None, (_POINTER,)),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, (_POINTER, _SIZE)),
    "ggml_backend_tensor_alloc": (_INT, (_POINTER, _POINTER, _POINTER)),
    "ggml_backend_tensor_set": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
    "ggml_backend_get_device": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_backend_reg": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_buffer_type": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_POINTER, _POINTER)),
    "ggml_backend_reg_get_proc_address": (_POINTER, (_POINTER, ctypes.c_char_p)),
    "ggml_backend_graph_compute": (_INT, (_POINTER, _POINTER)),
}
_CPU: dict[str, tuple[Any, Sequence[Any]]] = {
    "ggml_backend_cpu_init": (_POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_POINTER, _INT)),
}


class Ggml:
    """ggml's CPU backend, from the libraries in a folder; made by `load`."""

    def __init__(self, folder: Path) -> None:
        try:
            # In this order, and seen by all: the second one needs the first.
            base, cpu = (ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in _LIBRARIES)
            self._bind(base, _BASE)
            self._bind(cpu, _CPU)
        except (OSError, AttributeError) as error:
            names = " and ".join(_LIBRARIES)
            raise HostError(str(folder), f"holds no usable {names} ({error})", "name the folder of a build") from error
        self.ggml_log_set(_SILENT, None)
        self.backend = self.ggml_backend_cpu_init()

    def _bind(self, library: ctypes.CDLL, signatures: dict[str, tuple[Any, Sequence[Any]]]) -> None:
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml has no {name}")

    def buffer_types(self) -> list[Any]:
        """Where a weight can lie, best first; the last one takes any."""
        device = self.ggml_backend_get_device(self.backend)
        registry = self.ggml_backend_dev_backend_reg(device)
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        types: list[Any] = []
        if address:
            extra = _GET_EXTRA(address)(device)
            while extra[len(types)]:
                types.append(extra[len(types)])
        return [*types, self.ggml_backend_dev_buffer_type(device)]

    def quantize(self, kind: int, dense: Floats) -> npt.NDArray[np.uint8]:
        """Rows in a type of ggml, as its own quantizer makes them."""
        n, k = dense.shape
        rows = np.empty((n, self.ggml_row_size(kind, k)), np.uint8)
        self.ggml_quantize_chunk(kind, dense.ctypes.data, rows.ctypes.data, 0, n, k, None)
        return rows


@cache
def load(folder: Path) -> Ggml:
    """Load the libraries of a folder; a process can hold those of one folder only.

    Raises
    ------
    HostError
        If the folder lacks a library, or one lacks a function.
    """
    return Ggml(folder)


@dataclass(frozen=True)
class _Weight:
    context: Any
    tensor: Any


class Product:
    """x w^T for one weight in a type of ggml.

    Parameters
    ----------
    ggml : Ggml
    kind : int
        A ``ggml_type``.
    rows : (N, bytes) uint8
        The weight in that type.
    k : int
    """

    def __init__(self, ggml: Ggml, kind: int, rows: npt.NDArray[np.uint8], k: int) -> None:
        self._ggml, self._n, self._k = ggml, len(rows), k
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        self._weight = self._place(kind, rows)

    def bind(self, x: Floats, y: Floats) -> Callable[[], Floats]:
        """A function that multiplies x (M, K) as it is when called, writes y (M, N), and returns it."""
        ggml, m = self._ggml, len(x)
        context = self._context()
        left, right = self._weight.tensor, ggml.ggml_new_tensor_2d(context, FLOAT32, self._k, m)
        product = ggml.ggml_mul_mat(context, left, right)
        for tensor, array in ((right, x), (product, y)):
            buffer = ggml.ggml_backend_cpu_buffer_from_ptr(array.ctypes.data, array.nbytes)
            self._resources.callback(ggml.ggml_backend_buffer_free, buffer)
            ggml.ggml_backend_tensor_alloc(buffer, tensor, array.ctypes.data)
        graph = ggml.ggml_new_graph_custom(context, _NODES, False)
        ggml.ggml_build_forward_expand(graph, product)
        # The graph knows their addresses only.
        operands = (self, x, y)

        def call() -> Floats:
            status = ggml.ggml_backend_graph_compute(ggml.backend, graph)
            assert status == 0, status
            return operands[2]

        return call

    def _place(self, kind: int, rows: npt.NDArray[np.uint8]) -> _Weight:
        """Put the weight into the first buffer whose kernels multiply by its type."""
        ggml = self._ggml
        device = ggml.ggml_backend_get_device(ggml.backend)
        for buffer_type in ggml.buffer_types():
            with ExitStack() as trial:
                context = self._context(trial)
                tensor = ggml.ggml_new_tensor_2d(context, kind, self._k, self._n)
                buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
                trial.callback(ggml.ggml_backend_buffer_free, buffer)
                x = ggml.ggml_new_tensor_2d(context, FLOAT32, self._k, 1)
                if buffer and ggml.ggml_backend_dev_supports_op(device, ggml.ggml_mul_mat(context, tensor, x)):
                    ggml.ggml_backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)
                    self._resources.push(trial.pop_all())
                    return _Weight(context, tensor)
        raise AssertionError("the CPU's own buffer takes every type")

    def _context(self, resources: ExitStack | None = None) -> Any:
        """Room for a few tensors and a graph, without their data."""
        ggml = self._ggml
        size = _TENSORS * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_NODES, False)
        context = ggml.ggml_init(_InitParams(size, None, True))
        (self._resources if resources is None else resources).callback(ggml.ggml_free, context)
        return context
