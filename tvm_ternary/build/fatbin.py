"""Read what nvcc writes: a fatbin of machine code and PTX, and what its kernels use of a GPU.

Neither format is documented. What is read here was found by comparing with what ptxas says; `tests/build/test_nvcc.py`
holds the two together, so that a release of nvcc that changes them is noticed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tvm_ternary.build.elf import Elf
from tvm_ternary.errors import ArtifactError

MAGIC = 0xBA55ED50
_HEADER = struct.Struct("<IHHQ")
# kind, version, size of this header, size of the code, and then, behind 12 bytes, the architecture: 90 for sm_90.
_ENTRY = struct.Struct("<HHIQ12xI")
_KINDS = {1: "ptx", 2: "elf"}
_STARTS = {"ptx": (b".version", b"//"), "elf": (b"\x7fELF",)}
# Attributes of .nv.info: (index of a symbol, number). Only format 4 has data behind its four bytes.
_INFO = struct.Struct("<BBH")
_SIZED, _REGISTERS, _STACK = 4, 0x2F, 0x12
# From sm_90 on the section of a kernel's shared memory begins with a part that belongs to the system.
_RESERVED_SECTION, _RESERVED_BYTES = ".nv.shared.reserved.0", 1024


@dataclass(frozen=True)
class FatbinEntry:
    """Code for one architecture.

    Parameters
    ----------
    kind : str
        ``elf`` for machine code (a cubin), ``ptx`` for text that a driver compiles.
    arch : str
        Such as ``sm_90``; PTX is for this and every later one.
    data : bytes
        The ELF image, or the text.
    """

    kind: str
    arch: str
    data: bytes


@dataclass(frozen=True)
class CubinKernel:
    """What a kernel uses, as its machine code states it.

    Parameters
    ----------
    name : str
    registers : int
        A thread.
    shared_bytes : int
        Static shared memory a block. Dynamic shared memory is asked for at launch and stands in no cubin.
    local_bytes : int
        Stack a thread: local arrays and spilled registers.
    constant_bytes : int
        Constant memory, arguments included.
    """

    name: str
    registers: int
    shared_bytes: int
    local_bytes: int
    constant_bytes: int


def read_fatbin(data: bytes) -> tuple[FatbinEntry, ...]:
    """Take a fatbin apart.

    Parameters
    ----------
    data : bytes
        As `tvm_ternary.build.nvcc.compile_fatbin` makes it: not compressed.

    Raises
    ------
    ArtifactError
        If it is none, cut off, or compressed.
    """
    entries = []
    try:
        magic, _, start, size = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise _unreadable(f"begins with {magic:#x}, expected {MAGIC:#x}")
        if start + size != len(data):
            raise _unreadable(f"holds {len(data)} bytes, expected {start + size}")
        while start < len(data):
            kind, _, header, length, arch = _ENTRY.unpack_from(data, start)
            code = data[start + header : start + header + length]
            if len(code) < length or not header:
                raise _unreadable("is cut off")
            entries.append(_entry(kind, arch, code))
            start += header + length
    except struct.error as error:
        raise _unreadable("is cut off") from error
    return tuple(entries)


def read_kernels(cubin: bytes) -> tuple[CubinKernel, ...]:
    """Give the kernels of a cubin, by name.

    Raises
    ------
    ArtifactError
        If it is no ELF image.
    """
    elf = Elf(cubin)
    sections = {section.name: section for section in elf.sections}
    info = elf.section(".nv.info")
    attributes = {} if info is None else _attributes(elf.content(info))
    reserved = _RESERVED_BYTES if _RESERVED_SECTION in sections else 0
    kernels = []
    for index, symbol in enumerate(elf.symbols(".symtab")):
        if f".text.{symbol.name}" not in sections:
            continue
        shared = sections.get(f".nv.shared.{symbol.name}")
        constants = [s for s in elf.sections if _is_constant(s.name, symbol.name)]
        kernels.append(
            CubinKernel(
                symbol.name,
                attributes[_REGISTERS, index],
                max(shared.size - reserved, 0) if shared else 0,
                attributes.get((_STACK, index), 0),
                sum(section.size for section in constants),
            )
        )
    return tuple(sorted(kernels, key=lambda kernel: kernel.name))


def _entry(kind: int, arch: int, code: bytes) -> FatbinEntry:
    if kind not in _KINDS:
        raise _unreadable(f"holds an entry of kind {kind}, expected PTX (1) or ELF (2)")
    name = _KINDS[kind]
    if not code.lstrip().startswith(_STARTS[name]):
        raise _unreadable(f"holds compressed code for sm_{arch}; expected it as it is")
    # The text is padded to whole words.
    return FatbinEntry(name, f"sm_{arch}", code.rstrip(b"\0") if name == "ptx" else code)


def _attributes(info: memoryview) -> dict[tuple[int, int], int]:
    """Numbers by attribute and index of the symbol that they are about."""
    found = {}
    start = 0
    while start < len(info):
        form, attribute, size = _INFO.unpack_from(info, start)
        start += _INFO.size
        if form == _SIZED:
            if size == 8:
                index, value = struct.unpack_from("<II", info, start)
                found[attribute, index] = value
            start += size
    return found


def _is_constant(section: str, kernel: str) -> bool:
    bank, _, owner = section.removeprefix(".nv.constant").partition(".")
    return section.startswith(".nv.constant") and bank.isdigit() and owner == kernel


def _unreadable(reason: str) -> ArtifactError:
    return ArtifactError("fatbin", reason, "make it with the nvcc options that compile_fatbin uses")
