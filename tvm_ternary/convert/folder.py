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
from tvm_ternary.formats.checkpoint_folder import CheckpointFolder, Tensor, save_folder
from tvm_ternary.formats.quantization import CONFIG_KEY, QuantizationConfig
from tvm_ternary.graph.importer import ImportedModel, OnnxGraph
from tvm_ternary.graph.onnx.strip import locate_weights, only_ternary, strip_weights
from tvm_ternary.graph.quantized import CONFIG, GRAPH, read_config

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

_FLOAT = "float."
"""What the stored names of float weights of a graph begin with, which may also be those of ternary matrices."""


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
    assert model.onnx is not None
    config = _write_graph(folder, model.onnx, weights, config)
    for name in BESIDE:
        if (home / name).is_file():
            with atomic_path(folder / name) as path:
                shutil.copyfile(home / name, path)
    document = {**_own_config(home), CONFIG_KEY: config.to_dict()}
    with atomic_path(folder / CONFIG) as path:
        path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def resave(model: ImportedModel, source: Path, folder: Path) -> None:
    """Write a quantized checkpoint that was imported from ``source`` again; equal content gives equal bytes."""
    write_folder(folder, model, model.ternary, read_config(source)[1], source)


def _write_graph(
    folder: Path, graph: OnnxGraph, weights: Mapping[str, TernaryTensor], config: QuantizationConfig
) -> QuantizationConfig:
    stripped, arrays = strip_weights(graph.model, only_ternary(graph.model.graph, graph.uses, weights))
    save_folder(folder, _Merged(weights, {_FLOAT + name: array for name, array in arrays.items()}))
    tensors = CheckpointFolder(folder)
    locate_weights(stripped, lambda name: tensors.extent(_FLOAT + name), arrays)
    with atomic_path(folder / GRAPH) as path:
        path.write_bytes(stripped.SerializeToString(deterministic=True))
    return replace(config, uses={node: list(uses) for node, uses in graph.uses.items()})


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


def _own_config(home: Path) -> dict[str, Any]:
    """The keys of the model's own ``config.json``; a model of ONNX need not have one."""
    path = home / CONFIG
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError:
        return {}  # of something else that lies beside an ONNX file
    return {key: value for key, value in document.items() if key != CONFIG_KEY} if isinstance(document, dict) else {}
