"""The blob in which a library of TVM carries what is not host code: bytecode, constants, GPU code.

``tvm_ffi`` reads it when the library is loaded (``src/ffi/extra/library_module.cc``). Numbers are uint64,
little-endian; text and bytes have their length before them:

    size of the rest
    count, and for each module where its imports start in the list behind, and where the last ones end
    count, and the list: indices of the modules that are imported
    for each module: its kind, and, unless that is ``_lib`` (the library itself), its content

The content of a module of kind ``cuda`` is the name of a format, a table of kernels and the code
(``CUDAModuleNode::SaveToBytes``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

from tvm_ternary.build.elf import Elf
from tvm_ternary.errors import ArtifactError

SYMBOL = "__tvm_ffi__library_bin"
_HOST_CODE = "_lib"
_NUMBER = struct.Struct("<Q")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class BinModule:
    """A module: its kind, its content (none for the library itself), and the indices of those it imports."""

    kind: str
    content: bytes | memoryview
    imports: tuple[int, ...]


@dataclass(frozen=True)
class CudaContent:
    """GPU code: ``fmt`` is ``cuda`` for source and ``fatbin`` for what nvcc made; ``table`` describes the kernels."""

    fmt: str
    table: bytes | memoryview
    code: bytes | memoryview


def read_library_bin(blob: bytes | memoryview) -> tuple[BinModule, ...]:
    """Take a blob apart; `write_library_bin` is the inverse.

    Raises
    ------
    ArtifactError
        If it is cut off, or says something that cannot be.
    """
    reader = _Reader(memoryview(blob), "library blob")
    if reader.number() != len(blob) - _NUMBER.size:
        raise reader.error("its length is not the one that it states")
    starts, children = reader.list(reader.number), reader.list(reader.number)
    count = len(starts) - 1
    if count < 0 or starts[0] != 0 or starts[-1] != len(children) or starts != sorted(starts):
        raise reader.error("the places where imports start make no sense")
    if any(child >= count for child in children):
        raise reader.error("a module is imported that is not there")
    modules = []
    for index in range(count):
        kind = reader.text()
        content = memoryview(b"") if kind == _HOST_CODE else reader.bytes()
        modules.append(BinModule(kind, content, tuple(children[starts[index] : starts[index + 1]])))
    reader.finish()
    return tuple(modules)


def write_library_bin(modules: tuple[BinModule, ...]) -> bytes:
    """Give the blob of these modules."""
    starts = list(accumulate((len(module.imports) for module in modules), initial=0))
    children = [child for module in modules for child in module.imports]
    parts: list[bytes | memoryview] = [_numbers(starts), _numbers(children)]
    for module in modules:
        parts.append(_text(module.kind))
        if module.kind != _HOST_CODE:
            parts += [_NUMBER.pack(len(module.content)), module.content]
    return b"".join([_NUMBER.pack(sum(map(len, parts))), *parts])


def read_cuda(content: bytes | memoryview) -> CudaContent:
    """Take the content of a module of kind ``cuda`` apart; `write_cuda` is the inverse.

    Raises
    ------
    ArtifactError
        If it is cut off.
    """
    view = memoryview(content)
    reader = _Reader(view, "CUDA module")
    fmt = reader.text()
    start = reader.place
    for _ in range(reader.number()):
        reader.bytes()  # the name by which the kernel is asked for
        reader.bytes()  # its name in the code
        reader.list(lambda: reader.skip(4))  # types of its arguments
        reader.list(reader.bytes)  # what a launch needs beside them: sizes of the grid and of blocks, shared memory
        reader.list(lambda: reader.skip(4))  # marks of arguments
    table = view[start : reader.place]
    code = reader.bytes()
    reader.finish()
    return CudaContent(fmt, table, code)


def write_cuda(content: CudaContent) -> bytes:
    """Give the content of a module of kind ``cuda``."""
    return b"".join([_text(content.fmt), content.table, _NUMBER.pack(len(content.code)), content.code])


def with_cuda_code(blob: bytes | memoryview, code: bytes) -> bytes:
    """Put machine code in the place of the CUDA source; all else stays as it is.

    Parameters
    ----------
    blob : bytes
        Of a library with one module of kind ``cuda``.
    code : bytes
        A fatbin for all kernels of that module.

    Raises
    ------
    ArtifactError
        If the blob is damaged or does not hold exactly one such module.
    """
    modules = read_library_bin(blob)
    places = [place for place, module in enumerate(modules) if module.kind == "cuda"]
    if len(places) != 1:
        raise ArtifactError("library blob", f"holds {len(places)} CUDA modules, expected one")
    place = places[0]
    content = replace(read_cuda(modules[place].content), fmt="fatbin", code=code)
    changed = replace(modules[place], content=write_cuda(content))
    return write_library_bin((*modules[:place], changed, *modules[place + 1 :]))


def library_blob(library: bytes | memoryview) -> memoryview:
    """Give the blob of an ELF library, of an artifact's too.

    Raises
    ------
    ArtifactError
        If there is none in it.
    """
    elf = Elf(library)
    symbol = next((symbol for symbol in elf.symbols(".dynsym") if symbol.name == SYMBOL), None)
    if symbol is None:
        raise ArtifactError("library", f"has no symbol {SYMBOL}; expected one linked from a compiled model")
    return elf.symbol_content(symbol)


class _Reader:
    """Reads one thing after another and refuses to read past the end."""

    def __init__(self, data: memoryview, subject: str) -> None:
        self._data, self._subject, self.place = data, subject, 0

    def skip(self, size: int) -> memoryview:
        end = self.place + size
        if end > len(self._data):
            raise self.error(f"is cut off: {size} bytes expected, {len(self._data) - self.place} are left")
        self.place = end
        return self._data[end - size : end]

    def number(self) -> int:
        return int(_NUMBER.unpack(self.skip(_NUMBER.size))[0])

    def bytes(self) -> memoryview:
        return self.skip(self.number())

    def text(self) -> str:
        try:
            return str(self.bytes(), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error("holds a name that is no text") from error

    def list(self, item: Callable[[], _Item]) -> list[_Item]:
        return [item() for _ in range(self.number())]

    def finish(self) -> None:
        if self.place != len(self._data):
            raise self.error(f"{len(self._data) - self.place} bytes are left over")

    def error(self, problem: str) -> ArtifactError:
        return ArtifactError(self._subject, problem, "is this the version of TVM that this package asks for?")


def _numbers(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values) + 1}Q", len(values), *values)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return _NUMBER.pack(len(encoded)) + encoded
