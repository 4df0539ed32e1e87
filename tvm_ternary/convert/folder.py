"""Write a quantized checkpoint folder; `graph.quantized` reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tvm_ternary.files import atomic_path
from tvm_ternary.formats import TernaryTensor
from tvm_ternary.formats.bitnet_tensors import BitnetTensors
from tvm_ternary.formats.checkpoint_folder import CheckpointFolder, Tensor, save_folder
from tvm_ternary.formats.quantization import CONFIG_KEY, QuantizationConfig
from tvm_ternary.formats.quantized_tensors import FLOAT, QuantizedTensors
from tvm_ternary.formats.tensor_files import Tensors, open_tensors
from tvm_ternary.graph.importer import ImportedModel, OnnxGraph
from tvm_ternary.graph.models.gguf import GGUF, open_gguf
from tvm_ternary.graph.onnx.strip import locate_weights, only_ternary, strip_weights
from tvm_ternary.graph.quantized import CONFIG, GRAPH, is_quantized, read_config

BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
"""Files of a model that are copied as they are."""


def write_folder(
    folder: Path,
    model: ImportedModel,
    weights: Mapping[str, TernaryTensor],
    config: QuantizationConfig,
    source: Path,
) -> None:
    """Write a quantized checkpoint.

    Parameters
    ----------
    folder : path
        Exists and is empty.
    model : ImportedModel
        What was quantized. Its float weights are taken from where it was imported from.
    weights : mapping of str to TernaryTensor
        The ternary matrices; may read each when it is asked for.
    config : QuantizationConfig
        What became of every matrix.
    source : path
        The file or folder that the model was imported from: its tokenizer and ``config.json`` come along.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    home = source if source.is_dir() else source.parent
    if model.onnx is not None:
        config = _write_graph(folder, model.onnx, weights, config)
    else:
        save_folder(folder, _Merged(weights, _Rest(_float_tensors(source), model, weights)))
    for name in BESIDE:
        if (home / name).is_file():
            with atomic_path(folder / name) as path:
                shutil.copyfile(home / name, path)
    document = {**_own_config(source), CONFIG_KEY: config.to_dict()}
    with atomic_path(folder / CONFIG) as path:
        path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def resave(model: ImportedModel, source: Path, folder: Path) -> None:
    """Write a quantized checkpoint that was imported from ``source`` again; equal content gives equal bytes."""
    write_folder(folder, model, model.ternary, read_config(source)[1], source)


def _write_graph(
    folder: Path, graph: OnnxGraph, weights: Mapping[str, TernaryTensor], config: QuantizationConfig
) -> QuantizationConfig:
    stripped, arrays = strip_weights(graph.model, only_ternary(graph.model.graph, graph.uses, weights))
    save_folder(folder, _Merged(weights, {FLOAT + name: array for name, array in arrays.items()}))
    tensors = CheckpointFolder(folder)
    locate_weights(stripped, lambda name: tensors.extent(FLOAT + name), arrays)
    with atomic_path(folder / GRAPH) as path:
        path.write_bytes(stripped.SerializeToString(deterministic=True))
    return replace(config, uses={node: list(uses) for node, uses in graph.uses.items()})


def _float_tensors(source: Path) -> Tensors:
    """The tensors of the checkpoint a model came from, without what belongs to matrices that are ternary in it."""
    if source.suffix == GGUF:
        return open_gguf(source)[1]
    if is_quantized(source):
        return QuantizedTensors(CheckpointFolder(source), read_config(source)[1].schemes)
    tensors, quantization = open_tensors(source), _config_of(source).get(CONFIG_KEY)
    return BitnetTensors(tensors, quantization) if quantization is not None else tensors


class _Rest(Mapping[str, "np.ndarray[Any, Any]"]):
    """Float tensors by the names they are stored under, each read when it is asked for."""

    def __init__(self, tensors: Tensors, model: ImportedModel, weights: Mapping[str, TernaryTensor]) -> None:
        self._tensors = tensors
        self._sources = {name: name for name in tensors.names() if name not in weights}
        # Rows are gathered from the float table, also where a product uses its ternary twin.
        self._sources |= {FLOAT + name: name for name in weights if name in model.tables}

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return self._tensors.load(self._sources[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class _Merged(Mapping[str, Tensor]):
    """Ternary and float tensors as one mapping that reads none of them."""

    def __init__(self, ternary: Mapping[str, TernaryTensor], arrays: Mapping[str, np.ndarray]) -> None:
        self._parts: tuple[Mapping[str, Any], Mapping[str, Any]] = (ternary, arrays)

    def __getitem__(self, name: str) -> Tensor:
        ternary, arrays = self._parts
        tensor: Tensor = ternary[name] if name in ternary else arrays[name]
        return tensor

    def __iter__(self) -> Iterator[str]:
        ternary, arrays = self._parts
        yield from ternary
        yield from arrays

    def __len__(self) -> int:
        return sum(map(len, self._parts))


def _own_config(source: Path) -> dict[str, Any]:
    """The keys of the model's own ``config.json``; a model of ONNX need not have one, a GGUF file says the same."""
    if source.suffix == GGUF:
        return open_gguf(source)[0]
    return {key: value for key, value in _config_of(source).items() if key != CONFIG_KEY}


def _config_of(source: Path) -> dict[str, Any]:
    path = (source if source.is_dir() else source.parent) / CONFIG
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError:
        return {}  # of something else that lies beside an ONNX file
    return document if isinstance(document, dict) else {}
