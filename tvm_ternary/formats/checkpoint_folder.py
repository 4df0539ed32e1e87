"""A checkpoint of several files: written in shards, read a tensor at a time.

The files lie as other libraries expect them: ``model.safetensors`` alone, or ``model-00001-of-00003.safetensors`` and
so on with ``model.safetensors.index.json``. Each is one that `save_tensors` writes, so that every tensor has a
checksum, which is looked at when the tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tvm_ternary.errors import ModelError
from tvm_ternary.files import atomic_path
from tvm_ternary.formats.checkpoint import CheckpointFile, save_tensors
from tvm_ternary.formats.ternary import TernaryTensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 1 << 30

Tensor = TernaryTensor | npt.NDArray[Any]


class CheckpointFolder(Mapping[str, Tensor]):
    """The tensors of a folder that `save_folder` wrote, each mapped from its file when it is asked for.

    Parameters
    ----------
    folder : path
        Every file's header is read and checked at once.

    Raises
    ------
    ModelError
        If a file is missing, damaged or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: CheckpointFile(folder / name) for name in _shards(folder)}
        self._where = {name: file for file, content in self._files.items() for name in content}

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._where[name]][name]

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def __len__(self) -> int:
        return len(self._where)

    def extent(self, name: str) -> tuple[str, int, int]:
        """Where a float tensor lies: file name, first byte and number of bytes."""
        file = self._where[name]
        return (file, *self._files[file].extent(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, (N, K) of a ternary one, without reading it."""
        return self._files[self._where[name]].shape(name)

    def is_ternary(self, name: str) -> bool:
        """Whether a tensor is ternary, without reading it."""
        return self._files[self._where[name]].is_ternary(name)


def save_folder(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors to a folder that exists, in as few files as the size of one allows.

    Tensors are asked for twice, once for their size, and held only while their file is written.

    Raises
    ------
    LayoutError, OutputError
        As `save_tensors`.
    """
    shards: list[list[str]] = [[]]
    total = size = 0
    for name in sorted(tensors):
        needed = tensors[name].nbytes
        if shards[-1] and size + needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + needed, total + needed
    if len(shards) == 1:
        save_tensors(folder / WEIGHTS, {name: tensors[name] for name in shards[0]})
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensors[name] for name in names}
        save_tensors(folder / file, shard)
        where |= dict.fromkeys((part for name, tensor in shard.items() for part in _parts(name, tensor)), file)
    with atomic_path(folder / INDEX) as path:
        document = {"metadata": {"total_size": total}, "weight_map": where}
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")


def _parts(name: str, tensor: Tensor) -> tuple[str, ...]:
    if not isinstance(tensor, TernaryTensor):
        return (name,)
    scaled = tensor.transform is not None and tensor.transform.scale is not None
    return tuple(f"{name}.{part}" for part in ("planes", "scale", *(["input_scale"] if scaled else [])))


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.exists():
        return [WEIGHTS]
    try:
        where = json.loads(index.read_text("utf-8"))["weight_map"]
        files = sorted({str(Path(file)) for file in where.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(str(index), "is no index of shards", "the folder is damaged; quantize again") from error
    if any(Path(file).name != file for file in files):
        raise ModelError(str(index), "names files outside of its folder", "the folder is damaged; quantize again")
    return files
