"""Find and load TVM's runtime libraries and CUDA's, without the ``tvm`` package.

The Relax virtual machine needs ``libtvm_ffi``, which the `tvm_ffi` package loads, and ``libtvm_runtime.so``. The
latter puts its functions into one table for the whole process and aborts the process when a second copy does so
again. Hence the order: whatever is loaded already; then the copy of an installed ``tvm``, which a later ``import
tvm`` would load anyway. A GPU needs ``libtvm_runtime_cuda.so`` as well, and that ``libcudart.so.13``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tvm_ternary.errors import HostError
from tvm_ternary.runtime.cuda import RUNTIME_CUDA

LIBRARY = "libtvm_runtime.so"
LIBRARY_CUDA = "libtvm_runtime_cuda.so"
CUDA_MAJOR = RUNTIME_CUDA[0]
CUDART = f"libcudart.so.{CUDA_MAJOR}"
CUDA_TOOLKITS = tuple(Path(f"/usr/local/{name}/lib64") for name in ("cuda", f"cuda-{CUDA_MAJOR}"))
VARIABLE = "TVM_TERNARY_RUNTIME"
VARIABLE_CUDA = "TVM_TERNARY_RUNTIME_CUDA"
VARIABLE_CUDART = "TVM_TERNARY_CUDART"
# A function that only this library brings: it is there when, and only when, some copy is loaded.
_LANDMARK = "ffi.Module.load_from_bytes.relax.VMExecutable"
_LANDMARK_CUDA = "device_api.cuda"
_HINT = f"install apache-tvm, put {LIBRARY} next to the artifact, or name the file in {VARIABLE}"
_HINT_CUDA = f"install apache-tvm, put {LIBRARY_CUDA} next to the artifact, or name the file in {VARIABLE_CUDA}"
_HINT_CUDART = f"install nvidia-cuda-runtime, put {CUDART} next to the artifact, or name the file in {VARIABLE_CUDART}"

_lock = threading.Lock()


def load_runtime(beside: Path) -> Any:
    """Make TVM's runtime functions available in this process, once.

    The first of these is taken: a copy that is loaded already (``import tvm`` did it, or an earlier call); the file
    that the environment variable ``TVM_TERNARY_RUNTIME`` names; the installed ``tvm`` package's; one in ``beside``;
    one next to the ``tvm_ternary`` package's runtime; one that the dynamic linker finds by itself
    (``LD_LIBRARY_PATH``).

    Parameters
    ----------
    beside : Path
        The artifact's folder.

    Returns
    -------
    module
        `tvm_ffi`.

    Raises
    ------
    HostError
        If there is no such library, or it cannot be loaded.
    """
    try:
        import tvm_ffi
    except ImportError as error:
        raise HostError(
            "apache-tvm-ffi", f"cannot be imported ({error})", "install apache-tvm-ffi==0.1.14.post1"
        ) from error
    with _lock:
        if _loaded(tvm_ffi):
            return tvm_ffi
        path = find_runtime(beside)
        _load(path, _HINT)
        if not _loaded(tvm_ffi):
            raise HostError(str(path), "is no TVM runtime with the Relax virtual machine", _HINT)
    return tvm_ffi


def load_cuda_runtime(beside: Path) -> None:
    """Make TVM's functions for CUDA available in this process, once. Call `load_runtime` first.

    `LIBRARY_CUDA` is looked for in the same places as the runtime, the variable being ``TVM_TERNARY_RUNTIME_CUDA``. It
    needs CUDA's own runtime library; see `find_cudart`.

    Parameters
    ----------
    beside : Path
        The artifact's folder.

    Raises
    ------
    HostError
        If either library is not found or cannot be loaded. Without an NVIDIA driver they never can.
    """
    import tvm_ffi

    with _lock:
        if tvm_ffi.get_global_func(_LANDMARK_CUDA, allow_missing=True) is not None:
            return
        path = find_runtime_cuda(beside)
        # TVM's asks the dynamic linker for it by name, and is given the one that is there (``import torch`` did it).
        if not _in_process(CUDART):
            _load(find_cudart(beside), _HINT_CUDART)
        _load(path, _HINT_CUDA)
        if tvm_ffi.get_global_func(_LANDMARK_CUDA, allow_missing=True) is None:
            raise HostError(str(path), "is no TVM runtime for CUDA", _HINT_CUDA)


def find_runtime(beside: Path) -> Path:
    """Give the library that `load_runtime` would load.

    Raises
    ------
    HostError
        If ``TVM_TERNARY_RUNTIME`` names no file, or nothing is found.
    """
    return _find(LIBRARY, VARIABLE, _tvm_folders(beside)) or _missing(LIBRARY, "TVM's runtime library", _HINT)


def find_runtime_cuda(beside: Path) -> Path:
    """Give the TVM library for CUDA that `load_cuda_runtime` would load, as `find_runtime` does.

    Raises
    ------
    HostError
        If ``TVM_TERNARY_RUNTIME_CUDA`` names no file, or nothing is found.
    """
    found = _find(LIBRARY_CUDA, VARIABLE_CUDA, _tvm_folders(beside))
    return found or _missing(LIBRARY_CUDA, "TVM's runtime library for CUDA", _HINT_CUDA)


def find_cudart(beside: Path) -> Path | str:
    """Give CUDA's runtime library: a path, or the bare name for the dynamic linker to find.

    The first of these is taken: the file that the environment variable ``TVM_TERNARY_CUDART`` names; one in
    ``beside``; one that ``LD_LIBRARY_PATH`` leads to; that of the package nvidia-cuda-runtime; one in
    ``/usr/local/cuda``; one that the dynamic linker finds by itself.

    Raises
    ------
    HostError
        If ``TVM_TERNARY_CUDART`` names no file.
    """
    return _find(CUDART, VARIABLE_CUDART, _cuda_folders(beside)) or CUDART


def _in_process(library: str) -> bool:
    try:
        ctypes.CDLL(library, os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def _load(path: Path | str, hint: str) -> None:
    try:
        # Global, because the artifact's own symbols are resolved against it.
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise HostError(str(path), f"cannot be loaded ({error})", hint) from error


def _find(library: str, variable: str, folders: Iterator[Path]) -> Path | None:
    named = os.environ.get(variable)
    if named is not None:
        if not Path(named).is_file():
            raise HostError(variable, f"names {named!r}, which is no file", f"name a {library}")
        return Path(named).resolve()
    for folder in folders:
        if (folder / library).is_file():
            return (folder / library).resolve()
    return None


def _missing(library: str, what: str, hint: str) -> NoReturn:
    raise HostError(library, f"{what} was not found", hint)


def _tvm_folders(beside: Path) -> Iterator[Path]:
    yield from (folder / "lib" for folder in _package_folders("tvm"))
    yield beside
    yield Path(__file__).parent
    yield from _linker_folders()


def _cuda_folders(beside: Path) -> Iterator[Path]:
    yield beside
    yield from _linker_folders()
    # A folder without __init__.py that several of NVIDIA's packages share.
    yield from (folder / f"cu{CUDA_MAJOR}" / "lib" for folder in _package_folders("nvidia"))
    yield from CUDA_TOOLKITS


def _package_folders(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _linker_folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]


def _loaded(tvm_ffi: Any) -> bool:
    return tvm_ffi.get_global_func(_LANDMARK, allow_missing=True) is not None
