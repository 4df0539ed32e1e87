"""What an evaluation found: how a model with ternary weights differs from the float model it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.analysis.accuracy import Closeness, error_db


@dataclass(frozen=True)
class LayerQuality:
    """What became of one matrix, and how near it is to the float one.

    Parameters
    ----------
    name : str
    shape : (N, K)
        out_features, in_features.
    became : str
        ``ternary``, ``int8`` (a table) or ``float32``.
    scheme : str or None
        None where it is not ternary.
    bits_per_weight : float
        As stored, scales and padding counted.
    reason : str or None
        Why it stayed float.
    weight_error : float or None
        ||new - float|| / ||float||, Frobenius. None where it stayed float.
    weight_cosine : float or None
        Of the two matrices as vectors. None where the ternary matrix is not at hand, only the compiled library.
    output_error, output_cosine : float or None
        The same of x W^T for the inputs x that the matrix has in the float model; rounding of activations is not in it.
        None where the inputs were not observed.
    """

    name: str
    shape: tuple[int, ...]
    became: str
    scheme: str | None
    bits_per_weight: float
    reason: str | None
    weight_error: float | None
    weight_cosine: float | None = None
    output_error: float | None = None
    output_cosine: float | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise of the matrix's output in decibels; of its weights where the output was not observed."""
        error = self.weight_error if self.output_error is None else self.output_error
        return None if error is None else error_db(error)


@dataclass(frozen=True)
class LogitsQuality:
    """How predictions differ.

    Parameters
    ----------
    kl_divergence : float
        Mean of KL(float || ternary) over predictions, in nats.
    top1_agreement : float
        Share of predictions with the same most likely class.
    perplexity_float, perplexity : float or None
        Of the float and the ternary model, for a decoder: exp of the mean of -log p(next token).
    """

    kl_divergence: float
    top1_agreement: float
    perplexity_float: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class OutputQuality:
    """How near one output of the model is to the float model's, over all samples; padded positions are left out.

    Parameters
    ----------
    name, dtype : str
    equal : float
        Share of elements that are the same.
    closeness : Closeness or None
        None for an output that is no float.
    logits : LogitsQuality or None
        None for an output that is no logits.
    points : (2, n) float32
        Some elements, of the float and of the ternary model, for a picture.
    """

    name: str
    dtype: str
    equal: float
    closeness: Closeness | None
    logits: LogitsQuality | None
    points: npt.NDArray[np.float32] = field(compare=False, repr=False)


@dataclass(frozen=True)
class MetricValue:
    """What a user's metric gave.

    Parameters
    ----------
    name : str
    reference : float
        Of the float model.
    value : float
        Of the ternary model.
    """

    name: str
    reference: float
    value: float

    @property
    def change(self) -> float:
        """Ternary minus float."""
        return self.value - self.reference


@dataclass(frozen=True)
class Candidate:
    """One model with ternary weights.

    Parameters
    ----------
    name : str
        The folder, the library or the scheme.
    bits_per_weight : float or None
        Mean over the ternary weights, scales and padding counted; None if there is none.
    weight_bytes : int
        All weights, the float ones too.
    layers : tuple of LayerQuality
    outputs : tuple of OutputQuality
    metrics : tuple of MetricValue
    """

    name: str
    bits_per_weight: float | None
    weight_bytes: int
    layers: tuple[LayerQuality, ...]
    outputs: tuple[OutputQuality, ...]
    metrics: tuple[MetricValue, ...]

    @property
    def ternary(self) -> tuple[LayerQuality, ...]:
        """The matrices that became ternary."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)


@dataclass(frozen=True)
class Evaluation:
    """Float against ternary.

    Parameters
    ----------
    model : str
        The float model's file or folder.
    data : str
        What the models were run on.
    samples : int
    target : str
        What both were compiled for.
    device : str
        Where they ran.
    threads : int
    weight_bytes : int
        All weights of the float model.
    candidates : tuple of Candidate
    seconds : dict of str to float
        Time by stage.
    """

    model: str
    data: str
    samples: int
    target: str
    device: str
    threads: int
    weight_bytes: int
    candidates: tuple[Candidate, ...]
    seconds: Mapping[str, float] = field(hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain dictionaries, lists and scalars; None stands for what is not finite. Points are left out."""
        document: dict[str, Any] = _plain(asdict(self))
        for candidate, plain in zip(self.candidates, document["candidates"], strict=True):
            for layer, row in zip(candidate.layers, plain["layers"], strict=True):
                row["sqnr_db"] = _plain(layer.sqnr_db)
        return document


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if key != "points"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
