"""What ``config.json`` of a quantized checkpoint says of its matrices, in the style of compressed-tensors.

``config_groups`` holds a group a scheme: its targets, what their weights are and what they are multiplied with.
``ignore`` lists the matrices that stayed float, ``reasons`` why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm_ternary.errors import ModelError, OptionError
from tvm_ternary.formats.granularity import Granularity, PerGroup, PerTensor
from tvm_ternary.formats.scheme import Scheme

QUANTIZATION_VERSION = 1
QUANT_METHOD = "tvm-ternary"
CONFIG_KEY = "quantization_config"

_ACTIVATIONS = {32: "float", 16: "float", 8: "int", 1: "ternary"}


@dataclass(frozen=True)
class QuantizationConfig:
    """What became of each matrix of a model.

    Parameters
    ----------
    schemes : mapping of str to Scheme
        Of the ternary matrices.
    reasons : mapping of str to str
        Why each other one stayed float.
    embeddings : str
        What tables of embeddings are compiled to, ``int8`` or ``float``.
    results : mapping of str to mapping
        What was measured while each ternary matrix was made.
    options : mapping
        What the user chose.
    uses : mapping of str to sequence of (value, matrix), optional
        For an ONNX graph: which matrices each node multiplies by.
    """

    schemes: Mapping[str, Scheme]
    reasons: Mapping[str, str]
    embeddings: str = "float"
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    uses: Mapping[str, Sequence[tuple[str, str]]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; equal configurations give equal documents."""
        targets: dict[Scheme, list[str]] = {}
        for name, scheme in self.schemes.items():
            targets.setdefault(scheme, []).append(name)
        document: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "version": QUANTIZATION_VERSION,
            "format": "trit-planes",
            "config_groups": {
                f"group_{number}": {"targets": names, "scheme": str(scheme), **_arguments(scheme)}
                for number, (scheme, names) in enumerate(sorted(targets.items(), key=lambda item: str(item[0])))
            },
            "ignore": list(self.reasons),
            "reasons": dict(self.reasons),
            "embeddings": self.embeddings,
            "results": {name: dict(values) for name, values in self.results.items()},
            "options": dict(self.options),
        }
        if self.uses is not None:
            document["graph"] = {node: [list(use) for use in uses] for node, uses in self.uses.items()}
        return document

    @classmethod
    def from_dict(cls, document: Any, where: str) -> QuantizationConfig:
        """Read what `to_dict` gave.

        Parameters
        ----------
        document : object
            Parsed JSON.
        where : str
            What errors call it.

        Raises
        ------
        ModelError
            If it was written by something else, in another version, or is incomplete.
        """
        method = document.get("quant_method") if isinstance(document, Mapping) else None
        if method != QUANT_METHOD:
            raise ModelError(where, f"{CONFIG_KEY} is by {method!r}, expected {QUANT_METHOD!r}")
        if document.get("version") != QUANTIZATION_VERSION:
            problem = f"{CONFIG_KEY} has version {document.get('version')!r}, expected {QUANTIZATION_VERSION}"
            raise ModelError(where, problem, "read it with the tvm-ternary that wrote it, or quantize again")
        try:
            groups = document["config_groups"].values()
            graph = document.get("graph")
            return cls(
                schemes={str(name): Scheme.parse(group["scheme"]) for group in groups for name in group["targets"]},
                reasons={str(name): str(document["reasons"][name]) for name in document["ignore"]},
                embeddings=str(document["embeddings"]),
                results={str(name): dict(values) for name, values in document["results"].items()},
                options=dict(document["options"]),
                uses=None if graph is None else {n: [(str(v), str(m)) for v, m in uses] for n, uses in graph.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OptionError) as error:
            problem = f"{CONFIG_KEY} is damaged ({type(error).__name__}: {error})"
            raise ModelError(where, problem, "quantize again") from error


def _arguments(scheme: Scheme) -> dict[str, Any]:
    granularity = scheme.granularity
    return {
        "weights": {
            "type": "ternary",
            "num_planes": scheme.planes,
            **_strategy(granularity),
            "symmetric": True,
            "dynamic": False,
        },
        "input_activations": {
            "type": "bfloat" if scheme.bfloat else _ACTIVATIONS[scheme.activation_bits],
            "num_bits": scheme.activation_bits,
            "dynamic": True,
        },
    }


def _strategy(granularity: Granularity) -> dict[str, Any]:
    if isinstance(granularity, PerGroup):
        return {"strategy": "group", "group_size": granularity.size}
    return {"strategy": "tensor" if isinstance(granularity, PerTensor) else "channel", "group_size": None}
