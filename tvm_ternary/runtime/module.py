"""Load an artifact and run it: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import ArtifactError, HostError, InputError, OptionError
from tvm_ternary.runtime.artifact import Artifact, read_artifact
from tvm_ternary.runtime.inputs import check_inputs, check_outputs
from tvm_ternary.runtime.library import load_runtime
from tvm_ternary.runtime.manifest import Manifest, TensorSpec
from tvm_ternary.runtime.threads import ComputeThread, thread_count
from tvm_ternary.runtime.weights import read_weights
from tvm_ternary.target import host_features

# Arguments of the virtual machine's initialisation: device type and number as in DLPack, and the allocator that keeps
# freed buffers for the next run.
_CPU = (1, 0)
_POOLED = 2
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


def load(path: str | os.PathLike[str], device: str = "cpu", threads: int | None = None) -> Module:
    """Load an artifact that `tvm_ternary.compile` made. Neither ``tvm`` nor a compiler is needed.

    Parameters
    ----------
    path : path
        The ``.so``. Weights that lie beside it are found by the name in its manifest.
    device : str
        ``cpu``.
    threads : int, optional
        How many threads compute. None: see `tvm_ternary.runtime.threads.thread_count`.

    Raises
    ------
    ArtifactError
        If the file, or its weights, are missing, truncated, altered or not ours.
    HostError
        If this host lacks a CPU feature that the code needs, the device, or TVM's runtime library.
    OptionError
        If ``threads`` is no such number.
    """
    if device != "cpu":
        raise HostError(f"device {device!r}", "not in this version; expected 'cpu'")
    count = thread_count(threads)
    artifact = read_artifact(path)
    _check_host(artifact)
    return Module(artifact, load_runtime(artifact.path.parent), count)


class Module:
    """A model that is ready to run. Made by `load`.

    Runs are put one after another, so a module may be shared among threads; to run in parallel, load it once for each.
    After a fork the child may go on using it, if no run was under way.
    """

    def __init__(self, artifact: Artifact, tvm_ffi: Any, threads: int) -> None:
        self._artifact = artifact
        self._tvm_ffi = tvm_ffi
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._release_pool = tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")
        self._shapes_seen: set[tuple[tuple[int, ...], ...]] = set()
        self._thread = ComputeThread(tvm_ffi, threads)
        self._main, self._weights = self._thread.call(self._open)

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
    def threads(self) -> int:
        """How many threads compute."""
        return self._thread.count

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
            Every input, with exactly the declared dtype and shape. They are copied; any layout will do.

        Returns
        -------
        list of arrays
            They own their memory and may be written to.

        Raises
        ------
        InputError
            If a name, dtype or shape is not as declared, or the model itself refuses the values.
        """
        wanted = check_outputs(self.outputs, output_names)
        arrays = check_inputs(self.inputs, inputs, self.manifest.bounds)
        return self._thread.call(self._run, arrays, wanted)

    def time(self, inputs: Mapping[str, npt.ArrayLike], repeat: int = 10, number: int = 1) -> Timing:
        """Measure how long the model takes, without the copying of inputs and outputs, after one run to warm up.

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
        InputError
            As for `run`.
        OptionError
            If ``repeat`` or ``number`` is below 1.
        """
        for name, value in (("repeat", repeat), ("number", number)):
            if value < 1:
                raise OptionError(name, f"is {value}; expected at least 1")
        arrays = check_inputs(self.inputs, inputs, self.manifest.bounds)
        runs = self._thread.call(self._time, arrays, repeat, number)
        p20, median, p80 = (float(value) for value in np.percentile(runs, (20, 50, 80)))
        return Timing(median, p20, p80, tuple(runs))

    # What follows runs on the compute thread only.

    def _open(self) -> tuple[Callable[..., Any], list[Any]]:
        try:
            library = self._tvm_ffi.load_module(_spelling(self._artifact.path))
            machine = library["vm_load_executable"]()
            machine["vm_initialization"](*_CPU, _POOLED)
            main = machine["main"]
        except (RuntimeError, AttributeError, ValueError) as error:
            problem = f"cannot be loaded by TVM's runtime ({_first_line(error)})"
            raise ArtifactError(str(self._artifact.path), problem, self._versions()) from error
        info = self.manifest.weights
        arrays = read_weights(self._artifact.path.parent, info) if info.file is not None else ()
        return main, [self._tensor(array) for array in arrays]

    def _run(self, arrays: list[npt.NDArray[Any]], wanted: list[int]) -> list[npt.NDArray[Any]]:
        results = self._call(self._tensors(arrays))
        # Copied, because a result may share memory with an input, a weight or another result.
        return [np.array(np.from_dlpack(results[index])) for index in wanted]

    def _time(self, arrays: list[npt.NDArray[Any]], repeat: int, number: int) -> list[float]:
        tensors = self._tensors(arrays)
        self._call(tensors)
        runs = []
        for _ in range(repeat):
            start = time.perf_counter()
            for _ in range(number):
                self._main(*tensors)
            runs.append((time.perf_counter() - start) / number)
        return runs

    def _call(self, tensors: list[Any]) -> list[Any]:
        try:
            result = self._main(*tensors)
        except Exception as error:
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
        return [*(self._tensor(array) for array in arrays), *self._weights]

    def _tensor(self, array: npt.NDArray[Any]) -> Any:
        """Copy to memory of TVM's own: compiled code takes 64-byte alignment and compact strides for granted."""
        ffi = self._tvm_ffi
        tensor = self._allocate(ffi.Shape(array.shape), ffi.dtype(array.dtype.name), ffi.device("cpu", 0), None)
        np.from_dlpack(tensor)[...] = array
        return tensor

    def _versions(self) -> str:
        built = ", ".join(f"{name} {version}" for name, version in sorted(self.manifest.versions.items()))
        return f"it was compiled with {built}" if built else "compile the model again"


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


def _check_host(artifact: Artifact) -> None:
    subject = str(artifact.path)
    if artifact.architecture != platform.machine():
        problem = f"is built for {artifact.architecture}; this host is {platform.machine()}"
        raise HostError(subject, problem, "compile the model with --target native on this host")
    needed = artifact.manifest.target.features
    missing = sorted(set(needed) - host_features()) if needed else []
    if missing:
        problem = f"is built for target {artifact.manifest.target.name}; this CPU lacks {', '.join(missing)}"
        raise HostError(subject, problem, "compile the model with --target native on this host")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
