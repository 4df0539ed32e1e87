"""GGUF files as checkpoints: their metadata and the names of their tensors said as transformers says them.

So one graph serves both, and a matrix has one name wherever it was read from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import ModelError
from tvm_ternary.formats import PerTensor, TernaryTensor
from tvm_ternary.formats.gguf import GgufFile
from tvm_ternary.formats.tensor_files import TernaryTensors
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models import find_architecture

GGUF = ".gguf"
"""How the names of such files end."""

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "bitnet": {"model_type": "bitnet", "hidden_act": "silu"},
    "bitnet-25": {"model_type": "bitnet", "hidden_act": "relu2"},
    "bitnet-b1.58": {"model_type": "bitnet", "hidden_act": "relu2"},
}
"""What ``general.architecture`` stands for."""

_PAIRED = frozenset({"llama"})
"""Architectures whose queries and keys are rotated by neighbours: their rows are in that order, not halves apart."""

_SETTINGS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_FACTORS = "rope_freqs.weight"


def import_gguf(path: str | Path, *, past: bool = False) -> ImportedModel:
    """Build the graph of a GGUF file; matrices are read when they are asked for; ``past`` as of `import_checkpoint`.

    Raises
    ------
    ModelError
        If the file is missing or damaged, the architecture is not known, or metadata and tensors do not agree.
    HostError
        If the package ``gguf`` is not installed.
    """
    config, tensors = open_gguf(path)
    model = find_architecture(config, str(path), past=past)(config, tensors)
    return replace(model, name=Path(path).stem)


def open_gguf(path: str | Path) -> tuple[dict[str, Any], TernaryTensors]:
    """Open a GGUF file as a checkpoint.

    Returns
    -------
    config : dict
        What ``config.json`` would hold.
    tensors : TernaryTensors
        Under the names that such a checkpoint gives them.

    Raises
    ------
    ModelError, HostError
        As `import_gguf`.
    """
    file = GgufFile(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        hint = "any other model compiles from an ONNX export"
        raise ModelError(str(path), f"architecture {architecture!r} is not known, expected one of {known}", hint)
    config = _config(file, architecture)
    heads = {"q_proj": config.get("num_attention_heads"), "k_proj": config.get("num_key_value_heads")}
    return config, _Renamed(file, {part: count for part, count in heads.items() if architecture in _PAIRED})


def _config(file: GgufFile, architecture: str) -> dict[str, Any]:
    """The metadata as settings; what changes the graph in a way that no code builds is refused."""

    def found(key: str) -> Any:
        return file.metadata.get(f"{architecture}.{key}")

    config = dict(_ARCHITECTURES[architecture])
    config |= {name: value for key, name in _SETTINGS.items() if (value := found(key)) is not None}
    if found("expert_count"):
        raise ModelError(file.path, f"has {found('expert_count')} experts; models of experts are not supported")
    for key in ("rope.dimension_count", "attention.value_length"):
        size = config.get("head_dim", config.get("hidden_size", 0) // config.get("num_attention_heads", 1))
        if found(key) not in (None, size):
            raise ModelError(file.path, f"{key} is {found(key)}, expected {size}, as heads are wide")
    names = frozenset(file.names())
    if "token_embd.weight" in names:
        config["vocab_size"] = file.shape("token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in names
    config["attention_bias"] = "blk.0.attn_output.bias" in names
    if (scaling := _scaling(file, found)) is not None:
        config["rope_scaling"] = scaling
    return config


def _scaling(file: GgufFile, found: Any) -> dict[str, Any] | None:
    """``rope_scaling``; factors for each frequency, which is what Llama 3 becomes in GGUF, are a kind of longrope."""
    if _FACTORS in file.names():
        factors = file.load(_FACTORS).tolist()
        return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    kind, factor = found("rope.scaling.type"), found("rope.scaling.factor")
    if kind in (None, "none") or (kind == "linear" and factor in (None, 1.0)):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if (original := found("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    if (gain := found("rope.scaling.attn_factor")) is not None:
        scaling["attention_factor"] = gain
    return scaling


class _Renamed:
    """The tensors of a GGUF file under other names, rows of queries and keys in the order of halves.

    Parameters
    ----------
    file : GgufFile
    heads : mapping of str to int
        How many heads the rows of ``q_proj`` and ``k_proj`` belong to, where they are in the order of neighbours.
    """

    def __init__(self, file: GgufFile, heads: Mapping[str, Any]) -> None:
        self._file, self._heads = file, heads
        self._stored = {_renamed(name): name for name in file.names() if name != _FACTORS}
        self.ternary: Mapping[str, TernaryTensor] = _RenamedTernary(self, file, self._stored)

    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._file.shape(self._stored[name])

    def dtype(self, name: str) -> str:
        """Element type of a tensor."""
        return self._file.dtype(self._stored[name])

    def where(self, name: str) -> str:
        """What an error calls a tensor: by the name that the file has."""
        return self._file.where(self._stored[name])

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor."""
        array, order = self._file.load(self._stored[name]), self.order(name)
        return array if order is None else array[order]

    def order(self, name: str) -> npt.NDArray[np.int64] | None:
        """Which stored row each row is; None where they are the same.

        Row (2 i + h) of a stored head is row h * size / 2 + i of a head whose halves are turned into each other.
        """
        heads = next((count for part, count in self._heads.items() if f".{part}." in name), None)
        if heads is None:
            return None
        rows = self.shape(name)[0]
        if type(heads) is not int or heads < 1 or rows % (2 * heads):
            raise ModelError(self.where(name), f"has {rows} rows, expected halves of {heads} heads")
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


class _RenamedTernary(Mapping[str, TernaryTensor]):
    def __init__(self, owner: _Renamed, file: GgufFile, stored: Mapping[str, str]) -> None:
        self._owner, self._file = owner, file
        self._stored = {name: own for name, own in stored.items() if own in file.ternary}

    def __getitem__(self, name: str) -> TernaryTensor:
        tensor, order = self._file.ternary[self._stored[name]], self._owner.order(name)
        if order is None:
            return tensor
        scale = tensor.scale if tensor.granularity == PerTensor() else tensor.scale[:, order]
        return replace(tensor, planes=tensor.planes[:, :, order], scale=scale)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _renamed(name: str) -> str:
    """What transformers calls a tensor; one that is not known keeps its name, and the graph refuses it."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _NAMES:
        return name
    block, part, kind = match.groups()
    return f"{_NAMES[part]}.{kind}" if block is None else f"model.layers.{block}.{_NAMES[part]}.{kind}"
