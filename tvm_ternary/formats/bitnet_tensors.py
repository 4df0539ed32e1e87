"""A checkpoint whose ``quantization_config`` is BitNet's, as tensors some of which are ternary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError, ModelError
from tvm_ternary.formats.bitnet import PER_BYTE, Scaling, read_scale, ternarize_online, unpack_bitnet
from tvm_ternary.formats.granularity import PerTensor
from tvm_ternary.formats.tensor_files import Tensors
from tvm_ternary.formats.ternary import TernaryTensor

METHOD = "bitnet"
"""The ``quant_method`` of such a checkpoint."""

_KEPT = ("lm_head",)
_LINEAR = "_proj.weight"
_SCALE = "_scale"


class BitnetTensors:
    """Tensors in BitNet's layouts, given as the matrices that they stand for.

    A ``NAME.weight`` of uint8 is packed trits, one beside a ``NAME.weight_scale`` is trits in floats, and with
    ``quantization_mode`` ``online`` every other weight of a linear layer is made ternary when it is read. The scales
    are no tensors of their own here.

    Parameters
    ----------
    tensors : Tensors
        The checkpoint as it is stored.
    quantization : mapping
        The ``quantization_config`` of ``config.json``: ``linear_class``, ``quantization_mode``,
        ``modules_to_not_convert`` and ``use_rms_norm``, with the defaults of transformers.

    Attributes
    ----------
    ternary : mapping of str to TernaryTensor
        The (N, K) matrices with one plane and one scale, read when they are asked for.

    Raises
    ------
    ModelError
        If the configuration asks for what is not known, or a scale is missing.
    """

    def __init__(self, tensors: Tensors, quantization: Mapping[str, Any]) -> None:
        self._tensors = tensors
        scaling, online, kept = _read_settings(quantization)
        stored = frozenset(tensors.names())
        readers: dict[str, Callable[[], TernaryTensor]] = {}
        self._packed = set()
        for name in tensors.names():
            if tensors.dtype(name) == "uint8":
                if f"{name}{_SCALE}" not in stored:
                    raise ModelError(tensors.where(name), f"is packed, but there is no {name}{_SCALE}")
                self._packed.add(name)
                readers[name] = partial(_read_packed, tensors, name, scaling)
            elif f"{name}{_SCALE}" in stored:
                readers[name] = partial(_read_floats, tensors, name, scaling)
            elif online and name.endswith(_LINEAR) and not any(part in name for part in kept):
                readers[name] = partial(_read_online, tensors, name)
        scales = {f"{name}{_SCALE}" for name in readers}
        self._names = tuple(name for name in tensors.names() if name not in scales)
        self.ternary: Mapping[str, TernaryTensor] = _Ternary(readers)

    def names(self) -> tuple[str, ...]:
        """Names of the tensors, without the scales of ternary matrices."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a packed matrix (N, K)."""
        shape = self._tensors.shape(name)
        return (PER_BYTE * shape[0], *shape[1:]) if name in self._packed else shape

    def dtype(self, name: str) -> str:
        """Element type of a tensor as it is stored."""
        return "float32" if name in self.ternary else self._tensors.dtype(name)

    def where(self, name: str) -> str:
        """What an error calls a tensor."""
        return self._tensors.where(name)

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor; a ternary matrix dequantized."""
        return self.ternary[name].dequantize() if name in self.ternary else self._tensors.load(name)


class _Ternary(Mapping[str, TernaryTensor]):
    def __init__(self, readers: Mapping[str, Callable[[], TernaryTensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> TernaryTensor:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _read_settings(quantization: Mapping[str, Any]) -> tuple[Scaling, bool, tuple[str, ...]]:
    """What scales mean, whether float weights are made ternary, and which parts of names tell those that are not."""
    linear_class = quantization.get("linear_class", Scaling.DIVIDE.value)
    mode = quantization.get("quantization_mode", "offline")
    known = [scaling.value for scaling in Scaling]
    subject = "config.json: quantization_config"
    if linear_class not in known:
        raise ModelError(subject, f"linear_class is {linear_class!r}, expected one of {', '.join(known)}")
    if mode not in ("online", "offline"):
        raise ModelError(subject, f"quantization_mode is {mode!r}, expected online or offline")
    if quantization.get("use_rms_norm"):
        raise ModelError(subject, "use_rms_norm is true, a norm before every linear layer, which is not supported")
    kept = (*_KEPT, *(quantization.get("modules_to_not_convert") or ()))
    return Scaling(linear_class), mode == "online", kept


def _read_packed(tensors: Tensors, name: str, scaling: Scaling) -> TernaryTensor:
    return unpack_bitnet(tensors.load(name), tensors.load(f"{name}{_SCALE}"), scaling, name=tensors.where(name))


def _read_floats(tensors: Tensors, name: str, scaling: Scaling) -> TernaryTensor:
    """Trits stored as the floats -1, 0 and 1, and their scale."""
    values = tensors.load(name)
    trits = values.astype(np.int8)
    if not np.array_equal(trits, values) or np.abs(trits).max(initial=0) > 1:
        raise LayoutError(tensors.where(name), f"has a {name}{_SCALE}, but values other than -1, 0 and 1")
    scale = read_scale(tensors.load(f"{name}{_SCALE}"), scaling, name=tensors.where(name))
    return TernaryTensor.from_trits(trits[None], scale, PerTensor())


def _read_online(tensors: Tensors, name: str) -> TernaryTensor:
    return ternarize_online(tensors.load(name), tensors.dtype(name), name=tensors.where(name))
