"""Write the artifact: library, manifest and footer in one file, and large weights in a second one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
from tvm.relax import VMExecutable

from tvm_ternary.build.link import link
from tvm_ternary.build.weights import weights_path, write_weights
from tvm_ternary.files import atomic_path
from tvm_ternary.runtime.artifact import DIGEST_SIZE, FOOTER, MAGIC
from tvm_ternary.runtime.manifest import Manifest

_CHUNK = 1 << 24


def build_artifact(
    executable: VMExecutable,
    manifest: Manifest,
    output: Path,
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
    fatbin: bytes | None = None,
) -> Path:
    """Link an executable and write it with its manifest, whole or not at all.

    Parameters
    ----------
    executable : tvm.relax.VMExecutable
        Compiled for ``manifest.target``. Its ``main`` takes the inputs, then the weights that lie beside.
    manifest : Manifest
        With the checksum of `tvm_ternary.build.weights.describe_weights`; when ``weights`` are given,
        ``manifest.weights`` is filled in here.
    output : Path
        The ``.so`` to write. Weights beside it go to a file of the same stem and the suffix ``.safetensors``.
    weights : mapping of str to array, optional
        The parameters of ``main`` after the inputs, in order. None: the weights are constants of the executable.

    fatbin : bytes, optional
        Machine code of the kernels, in the place of their source: `tvm_ternary.build.nvcc.CudaCode.fatbin`.

    Returns
    -------
    Path
        ``output``.

    Raises
    ------
    HostError
        If no linker is found or it fails.
    OutputError
        If a file cannot be written, or a safetensors file that is not ours is in the way. What was there before stays.
    """
    beside = None if weights is None else weights_path(output)
    with atomic_path(output) as library:
        link(executable, manifest.target.tvm, library, fatbin)
        if weights is None or beside is None:
            append_manifest(library, manifest)
            return output
        # Both files are complete before either is put in place. Should the machine stop between the two renames, the
        # old library finds weights with another checksum and says so.
        with atomic_path(beside) as file:
            info = write_weights(file, weights)
            append_manifest(library, replace(manifest, weights=replace(info, file=beside.name)))
    return output


def append_manifest(library: Path, manifest: Manifest) -> None:
    """Make an artifact of an ELF library in place: append manifest and footer.

    Raises
    ------
    OSError
        If the file cannot be written. `tvm_ternary.files.atomic_path` around it makes an OutputError of that.
    """
    digest = _sha256(library)
    text = manifest.to_json().encode("utf-8")
    footer = FOOTER.pack(MAGIC, library.stat().st_size, len(text), 0, bytes(DIGEST_SIZE))[:-DIGEST_SIZE]
    digest.update(text + footer)
    with library.open("ab") as stream:
        stream.write(text + footer + digest.digest())


def _sha256(file: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest
