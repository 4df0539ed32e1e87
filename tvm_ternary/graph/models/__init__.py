"""Architectures of checkpoints: one small file each, found by what ``config.json`` calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tvm_ternary.errors import ModelError
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models import bert, gpt2, llama

Build = Callable[..., ImportedModel]
"""From a configuration and `Tensors`; those of `DECODERS` may be told that there is a ``past``."""

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


DECODERS = frozenset(("bitnet", "gpt2", "llama", "mistral", "qwen2", "qwen3"))
"""Those that write text token by token, and may remember keys and values."""


def find_architecture(config: Mapping[str, Any], where: str, *, past: bool = False) -> Build:
    """The builder for a configuration; ``past`` says that a decoder is to have keys and values of the past.

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
    return partial(ARCHITECTURES[name], past=True) if past and name in DECODERS else ARCHITECTURES[name]
