"""Link a Relax executable to an ELF library: the same executable gives the same bytes, whatever the folder."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm_ffi
from tvm.relax import VMExecutable

from tvm_ternary.build.executable import cuda_source
from tvm_ternary.build.library_bin import with_cuda_code
from tvm_ternary.errors import HostError

# No start files: they differ between distributions and nothing here needs them. The libraries are named because no
# start files means -nostdlib. No build-id and no symbol table: both vary with things that are not in the code.
_FLAGS = ("-shared", "-nostdlib", "-s", "-Wl,--build-id=none", "-Wl,--hash-style=gnu", "-Wl,-z,noexecstack")
_LIBRARIES = ("-Wl,--as-needed", "-lm", "-lc", "-lgcc")
_NATIVE_COMPILERS = ("cc", "gcc", "g++", "clang")
# What a linker, or the shell's word for the signal that ended it, says when the output cannot be written.
_UNWRITABLE = {
    **{os.strerror(code): code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES)},
    "File size limit exceeded": errno.EFBIG,
}


def link(executable: VMExecutable, tvm_target: Mapping[str, Any], output: Path, fatbin: bytes | None = None) -> None:
    """Write the ELF library of an executable.

    Parameters
    ----------
    executable : tvm.relax.VMExecutable
        What `tvm_ternary.build.executable.build_executable` returns.
    tvm_target : mapping
        The TVM target it was compiled for; for a GPU its ``host`` counts. ``mtriple`` chooses the linker, the whole
        makes the object that holds the weights.
    output : Path
        Where to write. Overwritten; use a temporary path.
    fatbin : bytes, optional
        The machine code of the executable's CUDA source, which it replaces: needed where there is such source, for
        the library must hold none.

    Raises
    ------
    HostError
        If no C compiler that links for this target is found, or linking fails.
    OSError
        If ``output`` cannot be written. `tvm_ternary.files.atomic_path` around it makes an OutputError of that.
    """
    if (cuda_source(executable) is None) != (fatbin is None):
        raise ValueError("a fatbin must be given for an executable with CUDA source, and for no other")
    host = dict(tvm_target.get("host", tvm_target))
    linker = find_linker(str(host["mtriple"]))
    with _objects(executable, json.dumps(host), fatbin) as objects:
        paths = [f"/proc/self/fd/{handle}" for handle in objects]
        command = [*linker, *_FLAGS, "-o", str(output), *paths, *_LIBRARIES]
        result = subprocess.run(
            command,
            pass_fds=objects,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            # The messages are read below.
            env={**os.environ, "LC_ALL": "C"},
        )
    if result.returncode != 0:
        raise _link_error(linker, result)


def find_linker(triple: str) -> list[str]:
    """Give the command of a C compiler that links for ``triple``: that of the variable ``CC``, or one on the ``PATH``.

    Parameters
    ----------
    triple : str
        Such as ``x86_64-unknown-linux-gnu``. For a foreign architecture the cross compiler's usual name is looked for.

    Raises
    ------
    HostError
        If there is none.
    """
    architecture = triple.partition("-")[0]
    native = architecture == os.uname().machine
    named = shlex.split(os.environ.get("CC", "")) if native else []
    names = named[:1] or (_NATIVE_COMPILERS if native else (f"{architecture}-linux-gnu-gcc",))
    for name in names:
        if path := shutil.which(name):
            return [path, *named[1:]]
    package = "gcc" if native else f"gcc-{architecture.replace('_', '-')}-linux-gnu"
    hint = f"install one (apt-get install {package})" + (" or set CC" if native else "")
    raise HostError("linker", f"no C compiler to link for {triple}: {', '.join(names)} not on the PATH", hint)


@contextmanager
def _objects(executable: VMExecutable, target: str, fatbin: bytes | None) -> Iterator[list[int]]:
    """Give the object files, code first, as handles of files in memory.

    LLVM ends the whole process when it cannot write an object ("IO failure on output stream"); in memory the disk's
    space does not matter, and the names, which are part of what the linker sees, do not vary.
    """
    handles: list[int] = []
    try:
        for module in [*_code_modules(executable.mod), _data_module(executable.mod, target, fatbin)]:
            handles.append(os.memfd_create("object"))
            module.write_to_file(f"/proc/self/fd/{handles[-1]}", "o")
        yield handles
    finally:
        for handle in handles:
            os.close(handle)


def _code_modules(root: Any) -> list[Any]:
    modules = [root, *(found for child in root.imports for found in _code_modules(child))]
    return [module for module in dict.fromkeys(modules) if module.kind == "llvm"]


def _data_module(root: Any, target: str, fatbin: bytes | None) -> Any:
    """Give an LLVM module with the bytecode, the constants and GPU code, which the runtime looks for in the library."""
    if fatbin is None:
        return tvm_ffi.get_global_func("runtime.ModulePackImportsToLLVM")(root, False, target, "")
    # The same in two steps, and between them the source is replaced.
    packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(root).numpy()
    blob = with_cuda_code(packed.data, fatbin)
    return tvm_ffi.get_global_func("codegen.codegen_blob")(blob, False, target, "")


def _link_error(linker: Sequence[str], result: subprocess.CompletedProcess[str]) -> HostError | OSError:
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    for text, code in _UNWRITABLE.items():
        if any(text in line for line in lines):
            return OSError(code, os.strerror(code))
    # The compiler driver closes with a line that only says that the linker failed.
    causes = [line for line in lines if "collect2" not in line and "linker command failed" not in line] or lines
    telling = next(
        (line for line in causes if any(word in line for word in ("error", "undefined", "cannot"))), causes[0]
    )
    return HostError(
        shlex.join(linker), f"could not link the library ({telling})", "check the compiler, or set CC to another"
    )
