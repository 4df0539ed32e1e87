"""Named tensors of a checkpoint, read one at a time, wherever they are stored."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.safetensors_file import SafetensorsFile
from tvm_ternary.formats.ternary import TernaryTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NOT_READ = ("*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.ckpt*")


class Tensors(Protocol):
    """The tensors of a checkpoint by name."""

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the file."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the data."""

    def dtype(self, name: str) -> str:
        """The stored element type: a numpy name, ``bfloat16``, ``float8_e4m3fn`` or ``float8_e5m2``."""

    def load(self, name: str) -> npt.NDArray[Any]:
        """The elements: bfloat16 and float8 as the float32 numbers they are, everything else as it is stored.

        Where nothing has to be converted the array is read-only and mapped from the file.
        """

    def where(self, name: str) -> str:
        """The file and the tensor, for messages."""


@runtime_checkable
class TernaryTensors(Tensors, Protocol):
    """Tensors some of which are ternary matrices; of those ``shape`` is (N, K), however the float model had it."""

    @property
    def ternary(self) -> Mapping[str, TernaryTensor]:
        """The ternary ones by name, each read when it is asked for."""


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Open a safetensors file, or the checkpoint in a folder, which may be sharded.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file, an index (``*.safetensors.index.json``), or a folder that holds
        ``model.safetensors.index.json``, ``model.safetensors`` or one other safetensors file.

    Raises
    ------
    ModelError
        If there is none, a shard is missing, or a file is truncated or damaged; names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    return ShardedTensors(path) if path.name.endswith(".json") else SafetensorsFile(path)


def checkpoint_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files that `open_tensors` would read, the index first.

    Raises
    ------
    ModelError
        If there are none.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.name.endswith(".json"):
        return (path,)
    return (path, *(path.parent / shard for shard in sorted(set(_weight_map(path).values()))))


class ShardedTensors:
    """Tensors of several files, as an index says.

    Parameters
    ----------
    index : path
        JSON, whose ``weight_map`` gives the file of each tensor.
    """

    def __init__(self, index: str | os.PathLike[str]) -> None:
        index = Path(index)
        weight_map = _weight_map(index)
        shards = {shard: self._open(index, shard) for shard in dict.fromkeys(weight_map.values())}
        self._shards = {name: shards[shard] for name, shard in weight_map.items()}
        held = {shard: set(file.names()) for shard, file in shards.items()}
        for name, shard in weight_map.items():
            if name not in held[shard]:
                raise ModelError(str(shards[shard].path), f"lacks {name}, which {index.name} says it holds", _AGAIN)
        for shard, names in held.items():
            if extra := sorted(names - weight_map.keys()):
                raise ModelError(str(shards[shard].path), f"holds {extra[0]}, which {index.name} does not name", _AGAIN)

    @staticmethod
    def _open(index: Path, shard: str) -> SafetensorsFile:
        path = index.parent / shard
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(str(index), f"names {shard!r} as a shard; expected a .safetensors file beside it")
        if not path.is_file():
            raise ModelError(str(path), f"is missing; {index.name} names it", _AGAIN)
        return SafetensorsFile(path)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._shards[name].dtype(name)

    def load(self, name: str) -> npt.NDArray[Any]:
        return self._shards[name].load(name)

    def where(self, name: str) -> str:
        return self._shards[name].where(name)


_AGAIN = "download the checkpoint again"


def _file_in(folder: Path) -> Path:
    for name in (INDEX, SINGLE):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        hint = f"{INDEX} has to say which tensor is in which of them"
        raise ModelError(str(folder), f"holds {len(found)} safetensors files and no index", hint)
    others = sorted(path.name for pattern in _NOT_READ for path in folder.glob(pattern))
    hint = f"convert {others[0]} with safetensors" if others else f"expected {SINGLE} or {INDEX}"
    raise ModelError(str(folder), "holds no safetensors file", hint)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except OSError as error:
        raise ModelError(str(index), f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ModelError(str(index), f"is not JSON ({error})", _AGAIN) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(str(index), "has no weight_map of tensor names to files", _AGAIN)
    return dict(weight_map)
