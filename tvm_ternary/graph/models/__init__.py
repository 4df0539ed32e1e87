"""Architectures of checkpoints: one small file each, found by what ``config.json`` calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.tensor_files import Tensors
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models import bert, gpt2, llama

Build = Callable[[Mapping[str, Any], Tensors], ImportedModel]

ARCHITECTURES: dict[str, Build] = {
    "bert": bert.build,
    "bitnet": llama.build_bitnet,
    "camembert": bert.build_roberta,
    "distilbert": bert.build_distilbert,
    "gpt2": gpt2.build,
    "llama": llama.build,
    "mistral": llama.build_mistral,
    "qwen2": llama.build_qwen2,
    "qwen3": llama.build_qwen3,
    "roberta": bert.build_roberta,
    "xlm-roberta": bert.build_roberta,
}
"""What builds the graph of a checkpoint, by its ``model_type``."""


def find_architecture(config: Mapping[str, Any], where: str) -> Build:
    """The builder for a configuration.

    Raises
    ------
    ModelError
        If it names no architecture, or one that no file here builds; lists those that are.
    """
    name = config.get("model_type")
    known = ", ".join(sorted(ARCHITECTURES))
    if not isinstance(name, str):
        raise ModelError(where, "names no model_type", f"expected one of {known}")
    if name not in ARCHITECTURES:
        hint = f"known are {known}; any other model compiles from an ONNX export"
        raise ModelError(where, f"architecture {name!r} is not known", hint)
    return ARCHITECTURES[name]
