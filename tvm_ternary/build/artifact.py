"""Write the artifact: library, weights, manifest and footer in one file, or the weights in a second one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
from tvm.relax import VMExecutable

from tvm_ternary.build.link import link
from tvm_ternary.build.weights import weights_path, write_tensors, write_weights
from tvm_ternary.files import atomic_path
from tvm_ternary.runtime.artifact import DIGEST_SIZE, FOOTER, MAGIC, file_digest, weights_offset
from tvm_ternary.runtime.manifest import Manifest


def build_artifact(
    executable: VMExecutable,
    manifest: Manifest,
    output: Path,
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
    fatbin: bytes | None = None,
    *,
    beside: bool = True,
) -> Path:
    """Link an executable and write it with its manifest, whole or not at all.

    Parameters
    ----------
    executable : tvm.relax.VMExecutable
        Compiled for ``manifest.target``. Its ``main`` takes the inputs, then ``weights``.
    manifest : Manifest
        With the checksum of `tvm_ternary.build.weights.describe_weights`; the names of ``weights``, and the checksum of
        a file of their own, are filled in here.
    output : Path
        The ``.so`` to write. Weights beside it go to a file of the same stem and the suffix ``.safetensors``.
    weights : mapping of str to array, optional
        The parameters of ``main`` after the inputs, in order. None: all are constants of the executable.
    fatbin : bytes, optional
        Machine code of the kernels, in the place of their source: `tvm_ternary.build.nvcc.CudaCode.fatbin`.
    beside : bool
        Whether ``weights`` go to a file of their own; otherwise into the artifact.

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
    own_file = weights_path(output) if weights is not None and beside else None
    with atomic_path(output) as library:
        link(executable, manifest.target.tvm, library, fatbin)
        if weights is None or own_file is None:
            append_manifest(library, manifest, weights)
            return output
        # Both files are complete before either is put in place. Should the machine stop between the two renames, the
        # old library finds weights with another checksum and says so.
        with atomic_path(own_file) as file:
            info = write_weights(file, weights)
            append_manifest(library, replace(manifest, weights=replace(info, file=own_file.name)))
    return output


def append_manifest(library: Path, manifest: Manifest, weights: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
    """Make an artifact of an ELF library in place: append weights, if any, manifest and footer.

    Parameters
    ----------
    library : Path
    manifest : Manifest
        The names of ``weights`` are filled in.
    weights : mapping of str to array, optional
        What is to lie inside, in the order of the parameters of ``main``.

    Raises
    ------
    OSError
        If the file cannot be written. `tvm_ternary.files.atomic_path` around it makes an OutputError of that.
    """
    elf_bytes = weights_end = library.stat().st_size
    start = weights_offset(elf_bytes)
    if weights:
        manifest = replace(manifest, weights=replace(manifest.weights, names=tuple(weights)))
        with library.open("ab") as stream:
            stream.write(bytes(start - elf_bytes))
            write_tensors(stream, weights)
        weights_end = library.stat().st_size
    text = manifest.to_json().encode("utf-8")
    footer = FOOTER.pack(MAGIC, elf_bytes, len(text), max(0, weights_end - start), bytes(DIGEST_SIZE))[:-DIGEST_SIZE]
    digest = file_digest(library)
    digest.update(text + footer)
    with library.open("ab") as stream:
        stream.write(text + footer + digest.digest())
