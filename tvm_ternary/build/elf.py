"""Read 64-bit little-endian ELF files: sections and symbols, as far as libraries and GPU code need them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tvm_ternary.errors import ArtifactError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_CLASS64_LITTLE = b"\x7fELF\x02\x01"
_NOBITS = 8


@dataclass(frozen=True)
class Section:
    """A section: where it lies in the file, and in memory once loaded.

    Parameters
    ----------
    name : str
    kind : int
        ``sh_type``. Sections of type 8 (NOBITS) have a size and no bytes in the file.
    address, offset, size : int
        In memory, in the file, in bytes.
    link : int
        Index of the section that belongs to this one: the names of a symbol table.
    """

    name: str
    kind: int
    address: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class Symbol:
    """A name for ``size`` bytes at ``value``; ``section`` is an index."""

    name: str
    section: int
    value: int
    size: int


class Elf:
    """An ELF image in memory.

    Parameters
    ----------
    data : bytes
        The image. Bytes behind it do not matter.

    Raises
    ------
    ArtifactError
        If it is no 64-bit little-endian ELF image, or cut off.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        try:
            self.sections = self._read_sections()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise _damaged(str(error)) from error

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return next((section for section in self.sections if section.name == name), None)

    def content(self, section: Section) -> memoryview:
        """The bytes of a section, none where it has none in the file."""
        if section.kind == _NOBITS:
            return memoryview(b"")
        if section.offset + section.size > len(self._data):
            raise _damaged(f"section {section.name} ends behind the file")
        return self._data[section.offset : section.offset + section.size]

    def symbols(self, table: str) -> list[Symbol]:
        """The symbols of a table, ``.symtab`` or ``.dynsym``, by index; none where there is no such table."""
        section = self.section(table)
        if section is None:
            return []
        names = bytes(self.content(self.sections[section.link]))
        entries = _SYMBOL.iter_unpack(self.content(section))
        return [Symbol(_text(names, name), index, value, size) for name, _, _, index, value, size in entries]

    def symbol_content(self, symbol: Symbol) -> memoryview:
        """The bytes that a symbol of a linked image names."""
        section = self.sections[symbol.section]
        start = symbol.value - section.address
        return self.content(section)[start : start + symbol.size]

    def _read_sections(self) -> list[Section]:
        header = _HEADER.unpack_from(self._data)
        if not header[0].startswith(_CLASS64_LITTLE):
            raise ArtifactError("ELF image", "does not begin as a 64-bit little-endian ELF file does")
        start, size, count, names_index = header[6], header[11], header[12], header[13]
        rows = [_SECTION.unpack_from(self._data, start + i * size) for i in range(count)]
        names = bytes(self._data[rows[names_index][4] : rows[names_index][4] + rows[names_index][5]])
        return [Section(_text(names, row[0]), row[1], row[3], row[4], row[5], row[6]) for row in rows]


def _text(names: bytes, start: int) -> str:
    end = names.find(b"\0", start)
    if end < 0:
        raise IndexError("a name has no end")
    return names[start:end].decode()


def _damaged(reason: str) -> ArtifactError:
    return ArtifactError("ELF image", f"is damaged ({reason})", "build it again")
