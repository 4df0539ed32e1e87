"""The tensors of a quantized checkpoint, as those of a float one with some ternary among them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats.checkpoint_folder import CheckpointFolder
from tvm_ternary.formats.ternary import TernaryTensor

FLOAT = "float."
"""What the stored names of float tensors begin with where a ternary one may have the same name."""


class Ternary(Mapping[str, TernaryTensor]):
    """The named tensors of a checkpoint that are ternary, each read when it is asked for."""

    def __init__(self, tensors: CheckpointFolder, names: Collection[str]) -> None:
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> TernaryTensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._tensors[name]
        assert isinstance(tensor, TernaryTensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


class QuantizedTensors:
    """What `tensor_files.TernaryTensors` describes.

    A tensor that is both a ternary matrix and a float table, as tied embeddings are, is the matrix in ``ternary`` and
    the table for `load`.

    Parameters
    ----------
    tensors : CheckpointFolder
    names : collection of str
        The ternary ones.
    """

    def __init__(self, tensors: CheckpointFolder, names: Collection[str]) -> None:
        self._tensors = tensors
        self.ternary: Mapping[str, TernaryTensor] = Ternary(tensors, names)
        self._names = tuple(name for name in tensors if name.removeprefix(FLOAT) not in self.ternary or name in names)

    def names(self) -> tuple[str, ...]:
        """Names of the tensors, those of ternary matrices included."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, (N, K) of a ternary matrix."""
        return self._tensors.shape(name)

    def dtype(self, name: str) -> str:
        """Element type of a tensor; a ternary matrix is one of float32."""
        return "float32" if name in self.ternary else str(self.load(name).dtype)

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor; a ternary matrix dequantized, unless it is a float table, too."""
        if name in self.ternary and FLOAT + name not in self._tensors:
            return self.ternary[name].dequantize()
        tensor = self._tensors[FLOAT + name if name in self.ternary else name]
        assert isinstance(tensor, np.ndarray)
        return tensor

    def where(self, name: str) -> str:
        """What an error calls a tensor."""
        return f"{self._tensors.folder}: {name}"
