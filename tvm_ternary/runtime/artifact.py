"""The artifact file: an ELF library, then large weights, then the manifest, then a footer.

::

    ELF shared object, as linked          the dynamic linker ignores what follows it
    zeros up to a multiple of 64 bytes    only if weights follow
    weights, in the safetensors format    none if they lie beside, or are small
    manifest, JSON in UTF-8
    footer, 64 bytes                      8  magic b"TVMTERN1"
                                          8  size of the ELF part, little endian
                                          8  size of the manifest, little endian
                                          8  size of the weights, little endian
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
from tvm_ternary.runtime.arrays import ALIGNMENT
from tvm_ternary.runtime.manifest import Manifest

MAGIC = b"TVMTERN1"
FOOTER = struct.Struct("<8sQQQ32s")
DIGEST_SIZE = 32

_ELF_HEADER = struct.Struct("<4sBBB9xHHIQQQIHHHHHH")
_ELF_MAGIC = b"\x7fELF"
_MACHINES = {62: "x86_64", 183: "aarch64"}
_CHUNK = 1 << 20
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
    weights_bytes : int
        Size of the weights behind it, 0 if there are none.
    """

    path: Path
    manifest: Manifest
    architecture: str
    elf_bytes: int
    weights_bytes: int


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
                sizes = _sizes(view, subject)
                # At one go: `load` does other things meanwhile, which each piece would wait for.
                if hashlib.sha256(view[:-DIGEST_SIZE]).digest() != sizes.digest:
                    raise ArtifactError(subject, "is altered: its SHA-256 is not the one in its footer", _AGAIN)
                text = bytes(view[sizes.manifest_start : -FOOTER.size])
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
    return Artifact(file.resolve(), manifest, architecture, sizes.elf, sizes.weights)


def weights_offset(elf_bytes: int) -> int:
    """Where weights begin that lie inside."""
    return elf_bytes + -elf_bytes % ALIGNMENT


def file_digest(file: Path) -> hashlib._Hash:
    """SHA-256 over a file, with memory for a small part of it.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with file.open("rb") as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest


@dataclass(frozen=True)
class _Sizes:
    """What the footer says, in bytes."""

    elf: int
    weights: int
    manifest: int
    digest: bytes

    @property
    def manifest_start(self) -> int:
        return weights_offset(self.elf) + self.weights if self.weights else self.elf

    @property
    def file(self) -> int:
        return self.manifest_start + self.manifest + FOOTER.size


def _architecture(view: memoryview, subject: str) -> str:
    fields = _ELF_HEADER.unpack_from(view)
    if fields[0] != _ELF_MAGIC:
        raise ArtifactError(subject, "is not an ELF library", "name a library made by 'tvm-ternary compile'")
    bits, order, machine = fields[1], fields[2], fields[5]
    if (bits, order) != (2, 1) or machine not in _MACHINES:
        raise ArtifactError(subject, f"is ELF for machine {machine}; expected 64-bit {' or '.join(_MACHINES.values())}")
    return _MACHINES[machine]


def _sizes(view: memoryview, subject: str) -> _Sizes:
    """Give the sizes of the parts, which make up the file."""
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
    _, elf_bytes, manifest_bytes, weights_bytes, digest = footer
    sizes = _Sizes(elf_bytes, weights_bytes, manifest_bytes, digest)
    if sizes.file != len(view):
        raise ArtifactError(subject, f"is altered: the footer speaks of {sizes.file} bytes, got {len(view)}", _AGAIN)
    return sizes


def _elf_end(view: memoryview) -> int:
    """Give the first byte after the section headers, which the linker writes last."""
    fields = _ELF_HEADER.unpack_from(view)
    offset, entry_size, entries = fields[9], fields[14], fields[15]
    return int(offset + entry_size * entries)
