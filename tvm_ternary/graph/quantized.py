"""Read a quantized checkpoint folder: a graph or an architecture, ternary matrices, and what stayed float.

``config.json`` says what became of every matrix (`formats.quantization`), ``model.safetensors`` holds them. Where the
source was ONNX, ``model.onnx`` is its graph: the large float weights lie in the safetensors file, where any reader of
ONNX finds them, and the data of ternary matrices are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.checkpoint_folder import CheckpointFolder
from tvm_ternary.formats.quantization import CONFIG_KEY, QuantizationConfig
from tvm_ternary.formats.quantized_tensors import QuantizedTensors, Ternary
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.graph.models.checkpoint import import_checkpoint
from tvm_ternary.graph.onnx.emitter import MatrixUse
from tvm_ternary.graph.passes.fix_inputs import fix_inputs

CONFIG, GRAPH = "config.json", "model.onnx"


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder is a quantized checkpoint of ours."""
    try:
        document = json.loads((Path(folder) / CONFIG).read_text("utf-8"))[CONFIG_KEY]
        return bool(document["quant_method"] == "tvm-ternary")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_config(folder: str | Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """Read ``config.json``.

    Returns
    -------
    config : dict
        The model's own keys.
    quantization : QuantizationConfig

    Raises
    ------
    ModelError
        If it cannot be read, or is of another version.
    """
    path = Path(folder) / CONFIG
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror})", "check the path") from error
    except ValueError as error:
        raise ModelError(str(path), f"is no JSON: {error}", "quantize again") from error
    if not isinstance(document, dict):
        raise ModelError(str(path), "is no JSON object", "quantize again")
    own = {key: value for key, value in document.items() if key != CONFIG_KEY}
    return own, QuantizationConfig.from_dict(document.get(CONFIG_KEY), str(path))


def import_quantized(
    folder: str | Path,
    dims: Mapping[str, int | str] | None = None,
    constants: Mapping[str, Any] | None = None,
    *,
    past: bool = False,
) -> ImportedModel:
    """Import a quantized checkpoint folder.

    Parameters
    ----------
    folder : path
    dims, constants : mappings, optional
        As `import_onnx`.
    past : bool
        As of `import_checkpoint`; a graph of ONNX has what it has.

    Returns
    -------
    ImportedModel
        ``ternary`` holds the quantized matrices; each is read, and its checksum checked, when it is asked for.

    Raises
    ------
    ModelError
        If a file is missing, damaged, of another version, or they do not belong together.
    OptionError
        If a dimension or an input does not exist.
    """
    folder = Path(folder)
    _, config = read_config(folder)
    tensors = CheckpointFolder(folder)
    missing = [name for name in config.schemes if name not in tensors or not tensors.is_ternary(name)]
    if missing:
        raise ModelError(str(folder), f"holds no ternary {missing[0]}, which {CONFIG} names", "quantize again")
    if config.uses is None:
        built = import_checkpoint(folder, QuantizedTensors(tensors, config.schemes), past=past)
        imported = fix_inputs(built, dims, constants)
    else:
        uses = {node: [MatrixUse(*use) for use in found] for node, found in config.uses.items()}
        imported = import_onnx(folder / GRAPH, dims, constants, uses=uses, ternary=Ternary(tensors, config.schemes))
    # Constants of this import may have cut branches off.
    ternary = Ternary(tensors, [name for name in imported.params if name in config.schemes])
    for name, shape in imported.shapes.items():
        if name not in config.schemes and name not in config.reasons:
            raise ModelError(str(folder), f"{CONFIG} does not know matrix {name} of its graph", "quantize again")
        if name in ternary and tensors.shape(name) != shape:
            raise ModelError(str(folder), f"{name} is {tensors.shape(name)}, its graph has {shape}", "quantize again")
    return replace(imported, ternary=ternary, name=folder.resolve().name)
