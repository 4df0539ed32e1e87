"""Find and load TVM's runtime library, without the ``tvm`` package.

The Relax virtual machine needs ``libtvm_ffi``, which the `tvm_ffi` package loads, and ``libtvm_runtime.so``. The
latter puts its functions into one table for the whole process and aborts the process when a second copy does so
again. Hence the order: whatever is loaded already; then the copy of an installed ``tvm``, which a later ``import
tvm`` would load anyway.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tvm_ternary.errors import HostError

LIBRARY = "libtvm_runtime.so"
VARIABLE = "TVM_TERNARY_RUNTIME"
# A function that only the runtime library brings: it is there when, and only when, some copy is loaded.
_LANDMARK = "ffi.Module.load_from_bytes.relax.VMExecutable"
_HINT = f"install apache-tvm, put {LIBRARY} next to the artifact, or name the file in {VARIABLE}"

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
        try:
            # Global, because the artifact's own symbols are resolved against it.
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise HostError(str(path), f"cannot be loaded ({error})", _HINT) from error
        if not _loaded(tvm_ffi):
            raise HostError(str(path), "is no TVM runtime with the Relax virtual machine", _HINT)
    return tvm_ffi


def find_runtime(beside: Path) -> Path | str:
    """Give the library that `load_runtime` would load: a path, or the bare name for the dynamic linker to find.

    Raises
    ------
    HostError
        If ``TVM_TERNARY_RUNTIME`` names no file, or nothing is found.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        if not Path(named).is_file():
            raise HostError(VARIABLE, f"names {named!r}, which is no file", f"name a {LIBRARY}")
        return Path(named).resolve()
    for path in _candidates(beside):
        if path.is_file():
            return path.resolve()
    if any((Path(folder) / LIBRARY).is_file() for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder):
        return LIBRARY
    raise HostError(LIBRARY, "TVM's runtime library was not found", _HINT)


def _candidates(beside: Path) -> Iterator[Path]:
    spec = importlib.util.find_spec("tvm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder) / "lib" / LIBRARY
    yield beside / LIBRARY
    yield Path(__file__).parent / LIBRARY


def _loaded(tvm_ffi: Any) -> bool:
    return tvm_ffi.get_global_func(_LANDMARK, allow_missing=True) is not None
