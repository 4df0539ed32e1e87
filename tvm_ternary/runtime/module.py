"""Load an artifact and run it: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import ArtifactError, HostError, InputError, OptionError
from tvm_ternary.runtime.arrays import BFLOAT16, aligned, aligned_empty, can_be_read_in_place, dtype_of, span
from tvm_ternary.runtime.artifact import Artifact, read_artifact
from tvm_ternary.runtime.cache_feed import CacheFeed
from tvm_ternary.runtime.cuda import check_device
from tvm_ternary.runtime.device import Device, choose_device
from tvm_ternary.runtime.driver import read_devices
from tvm_ternary.runtime.inputs import check_inputs, check_outputs
from tvm_ternary.runtime.library import load_cuda_runtime, load_runtime
from tvm_ternary.runtime.manifest import SMALL_OUTPUT, Manifest, TensorSpec
from tvm_ternary.runtime.model_cache import ModelCache, ModuleCacheStats, make_cache
from tvm_ternary.runtime.profile import Profile, take_profile
from tvm_ternary.runtime.threads import CallingThread, ComputeThread, thread_count
from tvm_ternary.runtime.weights import artifact_weights
from tvm_ternary.target import host_features

# The virtual machine's allocator that keeps freed buffers for the next run.
_POOLED = 2
_DEFAULT_STREAM = 0
# TVM's pool keeps freed buffers by their exact size and never lets go; a model that is fed one length after another
# would grow without bound. After this many different shapes the pool is emptied.
_SHAPES_KEPT = 16


@dataclass(frozen=True)
class Timing:
    """Seconds for one run of the model.

    Parameters
    ----------
    median, p20, p80 : float
        Over ``runs``.
    runs : tuple of float
        One for each repetition, in order.
    """

    median: float
    p20: float
    p80: float
    runs: tuple[float, ...]


def load(
    path: str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    *,
    kv_tokens: int | None = None,
    kv_window: int | None = None,
    kv_memory: int | str | None = None,
) -> Module:
    """Load an artifact that `tvm_ternary.compile` made. Neither ``tvm`` nor a compiler is needed.

    Parameters
    ----------
    path : path
        The ``.so``. Weights that lie beside it are found by the name in its manifest.
    device : str, optional
        ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``. None: the CPU or the first GPU, as it was compiled.
    threads : int, optional
        How many threads compute on the CPU. None: see `tvm_ternary.runtime.threads.thread_count`. For a GPU one is
        enough, which is then what None stands for. One on a CPU is the thread that calls; what else it does with TVM
        is then done by it alone, too.
    kv_tokens, kv_window, kv_memory
        Of a model that was compiled to keep keys and values: how many tokens a sequence may have (None: as many as the
        model allows, or 4,096), the last tokens that stay in float, and the bytes that all may take; see
        `tvm_ternary.runtime.model_cache.ModelCache`.

    Raises
    ------
    ArtifactError
        If the file, or its weights, are missing, truncated, altered or not ours.
    HostError
        If this host lacks a CPU feature that the code needs, the device, a driver for it, enough of its memory, or a
        runtime library; or the artifact has no code for the device.
    OptionError
        If ``threads`` is no such number, ``device`` no such name, or one of the last three is wrong, or given for a
        model that keeps nothing.
    """
    if threads is not None:
        thread_count(threads)
    folder = Path(os.path.realpath(path)).parent
    # Checking a large file takes as long as loading TVM's runtime, and they do not hinder each other.
    with ThreadPoolExecutor(1) as helper:
        runtime = helper.submit(load_runtime, folder)
        artifact = read_artifact(path)
        chosen = choose_device(device, artifact.manifest.target, os.fspath(path))
        _check_host(artifact, chosen)
        count = 1 if threads is None and chosen.kind == "cuda" else thread_count(threads)
        tvm_ffi = runtime.result()
    if chosen.kind == "cuda":
        load_cuda_runtime(folder)
    cache = make_cache(artifact.manifest, kv_tokens, kv_window, kv_memory)
    return Module(artifact, tvm_ffi, chosen, count, cache)


class Module:
    """A model that is ready to run. Made by `load`.

    Runs are put one after another, so a module may be shared among threads; to run in parallel, load it once for each.
    After a fork the child may go on using it on the CPU, if no run was under way; CUDA does not work in the child.
    """

    def __init__(
        self, artifact: Artifact, tvm_ffi: Any, device: Device, threads: int, cache: ModelCache | None = None
    ) -> None:
        self._artifact = artifact
        self._cache = cache
        self._feed = None if cache is None else CacheFeed(cache, self.manifest.caches[0], self.inputs)
        self._tvm_ffi = tvm_ffi
        self._device = device
        self._process = os.getpid()
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._write = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._read = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        self._synchronize = tvm_ffi.get_global_func("runtime.Device_StreamSync")
        self._place = tvm_ffi.device(device.kind, device.number)
        self._release_pool = tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")
        self._shapes_seen: set[tuple[tuple[int, ...], ...]] = set()
        here = device.kind == "cpu" and threads == 1
        self._thread = CallingThread(tvm_ffi) if here else ComputeThread(tvm_ffi, threads)
        self._machine, self._main, self._weights = self._thread.call(self._open)

    @property
    def manifest(self) -> Manifest:
        """What the artifact says about itself."""
        return self._artifact.manifest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the inputs."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the outputs."""
        return self.manifest.outputs

    @property
    def device(self) -> str:
        """Where it runs: ``cpu`` or ``cuda:N``."""
        return str(self._device)

    @property
    def threads(self) -> int:
        """How many threads of the CPU compute."""
        return self._thread.count

    @property
    def cache(self) -> ModelCache:
        """What it keeps from run to run: ``length``, ``truncate(tokens)``, ``reset()``, ``bytes(batch)``, ``stats()``.

        Raises
        ------
        OptionError
            If it was not compiled to keep anything.
        """
        if self._cache is None:
            problem = "keeps no keys and values; what is past is among its inputs, if it has any"
            raise OptionError(f"model {self.manifest.model.name}", problem, "compile with --attention")
        return self._cache

    @property
    def known_dims(self) -> dict[str, int]:
        """Dimensions that the inputs are not asked for: how many tokens the cache has."""
        return {} if self._cache is None else {self.manifest.caches[0].past: self._cache.length}

    def stats(self) -> ModuleCacheStats:
        """What it keeps now, what that takes, and what was decided for each attention and why.

        Raises
        ------
        OptionError
            As of `cache`.
        """
        return self.cache.stats()

    def __repr__(self) -> str:
        specs = (", ".join(map(str, part)) for part in (self.inputs, self.outputs))
        return f"<Module {self.manifest.model.name}: {' -> '.join(specs)}>"

    def run(self, output_names: Sequence[str] | None, inputs: Mapping[str, npt.ArrayLike]) -> list[npt.NDArray[Any]]:
        """Run the model, as onnxruntime's ``InferenceSession.run`` does.

        Parameters
        ----------
        output_names : sequence of str or None
            Which outputs to return, in which order. None: all.
        inputs : mapping of str to array
            Every input, with exactly the declared dtype and shape. Any layout will do; on a CPU, contiguous ones at
            multiples of 64 bytes, as outputs are, are read where they lie, and others copied.

        Returns
        -------
        list of arrays
            They may be written to: none shares memory with an input, a weight or another.

        Raises
        ------
        InputError
            If a name, dtype or shape is not as declared, or the model itself refuses the values.
        HostError
            If the GPU runs out of memory or fails, or this process is a fork of the one that loaded the module to it.
        """
        self._check_process()
        wanted = check_outputs(self.outputs, output_names)
        arrays = self._check(inputs)
        return self._thread.call(self._run, arrays, wanted)

    def time(self, inputs: Mapping[str, npt.ArrayLike], repeat: int = 10, number: int = 1) -> Timing:
        """Measure how long the model takes, without the copying of inputs and outputs, after one run to warm up.

        On a GPU each measurement ends when the GPU is done.

        Parameters
        ----------
        inputs : mapping of str to array
            As for `run`.
        repeat : int
            How many times to measure.
        number : int
            How many runs each measurement averages over.

        Raises
        ------
        InputError, HostError
            As for `run`.
        OptionError
            If ``repeat`` or ``number`` is below 1.
        """
        self._check_process()
        _check_counts(repeat=repeat, number=number)
        arrays = self._check(inputs)
        runs = self._thread.call(self._time, arrays, repeat, number)
        p20, median, p80 = (float(value) for value in np.percentile(runs, (20, 50, 80)))
        return Timing(median, p20, p80, tuple(runs))

    def profile(self, inputs: Mapping[str, npt.ArrayLike], repeat: int = 10) -> Profile:
        """Measure every call of a run, in order.

        Parameters
        ----------
        inputs : mapping of str to array
            As for `run`.
        repeat : int
            How many runs to measure.

        Raises
        ------
        InputError
            As for `run`.
        OptionError
            If ``repeat`` is below 1, or the model is on a GPU, where calls return before they are done.
        """
        if self._device.kind != "cpu":
            raise OptionError("profile", f"is for the CPU; this model is on {self._device}", "use nsys for a GPU")
        _check_counts(repeat=repeat)
        arrays = self._check(inputs)
        return self._thread.call(self._profile, arrays, repeat)

    def _check(self, inputs: Mapping[str, npt.ArrayLike]) -> list[npt.NDArray[Any]]:
        known = {name: (size, "the cache") for name, size in self.known_dims.items()}
        return check_inputs(self.inputs, inputs, self.manifest.bounds, known)

    def _check_process(self) -> None:
        if self._device.kind == "cuda" and self._process != os.getpid():
            problem = "was used before this process was forked; CUDA does not work in the child"
            raise HostError(f"device {self._device}", problem, "load the module in the child, started by spawn")

    # What follows runs on the thread that computes only.

    def _open(self) -> tuple[Any, Callable[..., Any], list[Any]]:
        try:
            library = self._tvm_ffi.load_module(_spelling(self._artifact.path))
            machine = library["vm_load_executable"]()
            # Constants go to the first device. Shapes are computed on the CPU, which comes last.
            devices = dict.fromkeys((self._device, Device("cpu")))
            machine["vm_initialization"](
                *(argument for device in devices for argument in (device.dlpack_type, device.number, _POOLED))
            )
            main = machine["main"]
        except (RuntimeError, AttributeError, ValueError) as error:
            if failure := self._device_failure(error):
                raise failure from error
            problem = f"cannot be loaded by TVM's runtime ({_first_line(error)})"
            raise ArtifactError(str(self._artifact.path), problem, self._versions()) from error
        return machine, main, self._upload(artifact_weights(self._artifact))

    def _run(self, arrays: list[npt.NDArray[Any]], wanted: list[int]) -> list[npt.NDArray[Any]]:
        tensors = self._tensors(arrays)
        results = self._call(tensors)
        if self._feed is not None:
            self._feed.advance(arrays)
        if self._device.kind != "cpu":
            return [self._array(results[index]) for index in wanted]
        views = [self._view(results[index]) for index in wanted]
        large = [index for index, view in enumerate(views) if view.nbytes >= SMALL_OUTPUT]
        # A result may be an input or another result. A weight it is not (`graph.passes.own_outputs`).
        taken = [span(array) for array in arrays] if large else []
        handed_out = {}
        for index in large:
            start, end = span(views[index])
            shared = any(start < other_end and other < end for other, other_end in taken)
            if not shared and views[index].flags.writeable:
                handed_out[index] = views[index]
                taken.append((start, end))
        return [handed_out[index] if index in handed_out else aligned(view) for index, view in enumerate(views)]

    def _time(self, arrays: list[npt.NDArray[Any]], repeat: int, number: int) -> list[float]:
        tensors = self._tensors(arrays)
        runs = []
        with self._as_it_was():
            self._call(tensors)
            for _ in range(repeat):
                start = time.perf_counter()
                for _ in range(number):
                    self._main(*tensors)
                self._synchronize(self._place, _DEFAULT_STREAM)
                runs.append((time.perf_counter() - start) / number)
        return runs

    def _profile(self, arrays: list[npt.NDArray[Any]], repeat: int) -> Profile:
        tensors = self._tensors(arrays)
        layers = {function.name: function.layers for function in self.manifest.functions}
        with self._as_it_was():
            self._call(tensors)
            return take_profile(self._machine, lambda: self._main(*tensors), self._tvm_ffi.Tensor, layers, repeat)

    def _as_it_was(self) -> AbstractContextManager[None]:
        """Runs in here leave the cache as it is."""
        return nullcontext() if self._feed is None else self._feed.as_it_was()

    def _call(self, tensors: list[Any]) -> list[Any]:
        try:
            result = self._main(*tensors)
            # Kernels run after the call has returned, and so does what they do wrong.
            self._synchronize(self._place, _DEFAULT_STREAM)
        except Exception as error:
            if failure := self._device_failure(error):
                raise failure from error
            hint = "check the shapes against what the model allows, its longest length for one"
            raise InputError(
                f"model {self.manifest.model.name}", f"refused the inputs ({_first_line(error)})", hint
            ) from error
        results = [result] if isinstance(result, self._tvm_ffi.Tensor) else list(result)
        assert len(results) == len(self.outputs)
        return results

    def _tensors(self, arrays: list[npt.NDArray[Any]]) -> list[Any]:
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._shapes_seen:
            if len(self._shapes_seen) == _SHAPES_KEPT:
                self._shapes_seen.clear()
                self._release_pool()
            self._shapes_seen.add(shapes)
        given = self._upload(arrays)
        if self._feed is not None:
            given += self._feed.arguments(arrays, self._tensor, self._tvm_ffi.Shape)
        return [*given, *self._weights]

    def _upload(self, arrays: Sequence[npt.NDArray[Any]]) -> list[Any]:
        try:
            return [self._tensor(array) for array in arrays]
        except RuntimeError as error:
            if failure := self._device_failure(error):
                raise failure from error
            raise

    def _tensor(self, array: npt.NDArray[Any]) -> Any:
        """Take an array as it is if it may be, else copy it to memory of TVM's own.

        Compiled code takes 64-byte alignment and compact strides for granted, and writes to no input.
        """
        ffi = self._tvm_ffi
        if self._device.kind == "cpu" and can_be_read_in_place(array):
            return ffi.from_dlpack(array)
        source = np.ascontiguousarray(array)
        tensor = self._allocate(ffi.Shape(array.shape), ffi.dtype(array.dtype.name), self._place, None)
        self._write(tensor, ctypes.c_void_p(source.ctypes.data), source.nbytes)
        return tensor

    def _view(self, tensor: Any) -> npt.NDArray[Any]:
        """The memory of a tensor; a copy where numpy has no such type to see it as."""
        return self._array(tensor) if str(tensor.dtype) == BFLOAT16 else np.from_dlpack(tensor)

    def _array(self, tensor: Any) -> npt.NDArray[Any]:
        """Copy to memory of numpy's own, so that it can be an input as it is: keys of the past, in the next step."""
        array = aligned_empty(tuple(tensor.shape), dtype_of(str(tensor.dtype)))
        self._read(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def _device_failure(self, error: Exception) -> HostError | None:
        """Give the error for what went wrong on the GPU rather than in the model."""
        text = _first_line(error)
        if self._device.kind != "cuda" or "CUDA" not in f"{type(error).__name__} {text}":
            return None
        if "out of memory" in text or "MEMORY_ALLOCATION" in text:
            hint = "use smaller inputs, or free some of its memory"
            return HostError(f"device {self._device}", f"ran out of memory ({text})", hint)
        hint = "check nvidia-smi and start again: after an error CUDA does not work in this process"
        return HostError(f"device {self._device}", f"failed ({text})", hint)

    def _versions(self) -> str:
        built = ", ".join(f"{name} {version}" for name, version in sorted(self.manifest.versions.items()))
        return f"it was compiled with {built}" if built else "compile the model again"


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise OptionError(name, f"is {value}; expected at least 1")


_files_seen: dict[Path, list[int]] = {}


def _spelling(path: Path) -> str:
    """Spell a path so that a file which has taken the place of a loaded one is loaded too.

    The dynamic linker takes a path that it has seen for the library it loaded from there, even after a compile has put
    a new file in its place; so each file that a path has stood for gets a spelling of its own.
    """
    files = _files_seen.setdefault(path.absolute(), [])
    inode = path.stat().st_ino
    if inode not in files:
        files.append(inode)
    return f"{path.absolute().parent}/{'./' * files.index(inode)}{path.name}"


def _check_host(artifact: Artifact, device: Device) -> None:
    subject = str(artifact.path)
    if artifact.architecture != platform.machine():
        problem = f"is built for {artifact.architecture}; this host is {platform.machine()}"
        raise HostError(subject, problem, "compile the model with --target native on this host")
    needed = artifact.manifest.target.features
    missing = sorted(set(needed) - host_features()) if needed else []
    if missing:
        problem = f"is built for target {artifact.manifest.target.name}; this CPU lacks {', '.join(missing)}"
        raise HostError(subject, problem, "compile the model with --target native on this host")
    if device.kind == "cuda":
        check_device(read_devices(device.number), artifact.manifest, device.number, subject)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
