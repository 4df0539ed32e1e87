"""The artifact file: an ELF library, then the manifest, then a footer.

::

    ELF shared object, as linked          the dynamic linker ignores what follows it
    manifest, JSON in UTF-8
    footer, 64 bytes                      8  magic b"TVMTERN1"
                                          8  size of the ELF part, little endian
                                          8  size of the manifest, little endian
                                          8  zero
                                          32 SHA-256 over all that comes before these 32 bytes
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from tvm_ternary.errors import ArtifactError
from tvm_ternary.runtime.manifest import Manifest

MAGIC = b"TVMTERN1"
FOOTER = struct.Struct("<8sQQQ32s")
DIGEST_SIZE = 32

_ELF_HEADER = struct.Struct("<4sBBB9xHHIQQQIHHHHHH")
_ELF_MAGIC = b"\x7fELF"
_MACHINES = {62: "x86_64", 183: "aarch64"}
_AGAIN = "copy it again, or compile the model again"


@dataclass(frozen=True)
class Artifact:
    """An artifact that has been read and found whole.

    Parameters
    ----------
    path : Path
        Absolute.
    manifest : Manifest
        What it says about itself.
    architecture : str
        What the machine code is for, as `platform.machine` names it.
    elf_bytes : int
        Size of the ELF part.
    """

    path: Path
    manifest: Manifest
    architecture: str
    elf_bytes: int


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact's manifest and check every byte against the digest. No code of the artifact runs.

    Raises
    ------
    ArtifactError
        If the file is missing, not an ELF library, without a manifest, truncated, altered, or of another version.
    """
    file = Path(path)
    subject = os.fspath(path)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < _ELF_HEADER.size:
                raise ArtifactError(subject, f"has {size} bytes, too few for a compiled library", _AGAIN)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                architecture = _architecture(view, subject)
                elf_bytes, manifest_bytes = _sizes(view, subject)
                text = bytes(view[elf_bytes : elf_bytes + manifest_bytes])
    except FileNotFoundError as error:
        raise ArtifactError(subject, "no such file", "name a library made by 'tvm-ternary compile'") from error
    except OSError as error:
        raise ArtifactError(
            subject, f"cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    try:
        manifest = Manifest.from_json(text.decode("utf-8"), subject)
    except UnicodeDecodeError as error:
        raise ArtifactError(subject, "the manifest is not UTF-8", _AGAIN) from error
    return Artifact(file.resolve(), manifest, architecture, elf_bytes)


def _architecture(view: memoryview, subject: str) -> str:
    fields = _ELF_HEADER.unpack_from(view)
    if fields[0] != _ELF_MAGIC:
        raise ArtifactError(subject, "is not an ELF library", "name a library made by 'tvm-ternary compile'")
    bits, order, machine = fields[1], fields[2], fields[5]
    if (bits, order) != (2, 1) or machine not in _MACHINES:
        raise ArtifactError(subject, f"is ELF for machine {machine}; expected 64-bit {' or '.join(_MACHINES.values())}")
    return _MACHINES[machine]


def _sizes(view: memoryview, subject: str) -> tuple[int, int]:
    """Give the sizes of the ELF part and of the manifest after checking the footer and the digest."""
    elf_end = _elf_end(view)
    if elf_end > len(view):
        raise ArtifactError(subject, f"is truncated: {len(view)} bytes of at least {elf_end}", _AGAIN)
    if len(view) == elf_end:
        raise ArtifactError(
            subject, "is a library without a manifest: cut short, or not made by tvm-ternary", "compile the model again"
        )
    # A file cut short may end before the footer would begin; it has no magic there either.
    footer = FOOTER.unpack(view[-FOOTER.size :]) if len(view) - elf_end >= FOOTER.size else (b"",)
    if footer[0] != MAGIC:
        raise ArtifactError(subject, "is truncated or has bytes appended: no footer at its end", _AGAIN)
    _, elf_bytes, manifest_bytes, zero, digest = footer
    if zero or elf_bytes + manifest_bytes + FOOTER.size != len(view):
        raise ArtifactError(
            subject,
            f"is altered: the footer speaks of {elf_bytes + manifest_bytes + FOOTER.size} bytes, got {len(view)}",
            _AGAIN,
        )
    if hashlib.sha256(view[:-DIGEST_SIZE]).digest() != digest:
        raise ArtifactError(subject, "is altered: its SHA-256 is not the one in its footer", _AGAIN)
    return elf_bytes, manifest_bytes


def _elf_end(view: memoryview) -> int:
    """Give the first byte after the section headers, which the linker writes last."""
    fields = _ELF_HEADER.unpack_from(view)
    offset, entry_size, entries = fields[9], fields[14], fields[15]
    return int(offset + entry_size * entries)
