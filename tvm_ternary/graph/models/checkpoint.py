"""Import a checkpoint folder: ``config.json`` names the architecture, safetensors hold the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.tensor_files import Tensors, open_tensors
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models import find_architecture
from tvm_ternary.graph.models.settings import FILE

_METHOD = "quantization_config"
_READ = ("tvm-ternary", "bitnet")
"""Ways of quantization whose tensors are read; what each architecture makes of them it says itself."""


def import_checkpoint(folder: str | Path, tensors: Tensors | None = None, *, past: bool = False) -> ImportedModel:
    """Build the graph of a checkpoint over its tensors; matrices are read when they are asked for.

    Parameters
    ----------
    folder : path
        Holds ``config.json`` and, unless ``tensors`` are given, safetensors files.
    tensors : Tensors, optional
        What to read the weights from.
    past : bool
        Whether a decoder gets keys and values of the past as inputs, and gives those of all tokens.

    Raises
    ------
    ModelError
        If a file is missing or damaged, the architecture is not known, or tensors and configuration do not agree.
    """
    folder = Path(folder)
    config = read_config(folder)
    where = str(folder / FILE)
    build = find_architecture(config, where, past=past)
    found = config.get(_METHOD)
    method = found.get("quant_method") if isinstance(found, dict) else None
    if found is not None and method not in _READ:
        hint = "take the checkpoint it was made from, in bfloat16 or float"
        raise ModelError(where, f"its weights are quantized by {method!r}, which is not read", hint)
    model = build(config, open_tensors(folder) if tensors is None else tensors)
    return replace(model, name=folder.resolve().name)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a folder.

    Raises
    ------
    ModelError
        If it is missing or no JSON object.
    """
    path = Path(folder) / FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        problem = f"holds no {FILE}, which names the architecture"
        raise ModelError(str(folder), problem, "name a checkpoint folder, or an .onnx file") from None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ModelError(str(path), f"is not JSON ({error})") from None
    if not isinstance(config, Mapping):
        raise ModelError(str(path), "is no JSON object")
    return dict(config)
