"""Compare what two models give, sample by sample, without keeping any output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.analysis import accuracy
from tvm_ternary.analysis.accuracy import Closeness
from tvm_ternary.analysis.quality import LogitsQuality, OutputQuality
from tvm_ternary.evaluation.logits import IDS, MASK, LogitsRule
from tvm_ternary.evaluation.models import Arrays
from tvm_ternary.runtime.manifest import TensorSpec

Floats = npt.NDArray[np.float64]


class OutputComparison:
    """One output of a ternary model against the float model's, gathered over samples.

    Parameters
    ----------
    spec : TensorSpec
        The output.
    rule : LogitsRule
        Whether it is logits, and predicts the next token.
    points : int
        How many elements of each sample to keep for a picture.
    seed : int
        Of the choice of these.
    """

    def __init__(self, spec: TensorSpec, rule: LogitsRule, points: int, seed: int) -> None:
        self._spec = spec
        self._logits = _LogitsSum() if spec.name in rule.names else None
        self._causal = spec.name in rule.causal
        self._closeness = _ClosenessSum() if spec.dtype.startswith("float") else None
        self._points = points
        self._random = np.random.default_rng(seed)
        self._chosen: list[npt.NDArray[np.float32]] = []
        self._count = self._equal = 0

    def update(self, reference: npt.NDArray[Any], array: npt.NDArray[Any], inputs: Arrays) -> None:
        """Take in one sample's output of both models, and the inputs that they come from."""
        if self._causal and self._logits is not None:
            labels = accuracy.next_token_labels(inputs[IDS], inputs.get(MASK))
            self._logits.predict(reference, array, labels)
        mask = inputs.get(MASK)
        if mask is not None and reference.ndim > mask.ndim and reference.shape[: mask.ndim] == mask.shape:
            reference, array = reference[mask != 0], array[mask != 0]
        if not reference.size:
            return
        self._count += reference.size
        self._equal += int((reference == array).sum())
        if self._closeness is None:
            return
        a, b = reference.astype(np.float64), array.astype(np.float64)
        self._closeness.add(a, b)
        if self._logits is not None:
            self._logits.add(a, b)
        places = self._random.choice(a.size, min(self._points, a.size), replace=False)
        self._chosen.append(np.stack([a.ravel()[places], b.ravel()[places]]).astype(np.float32))

    def result(self) -> OutputQuality:
        """Give what was gathered."""
        return OutputQuality(
            self._spec.name,
            self._spec.dtype,
            self._equal / self._count if self._count else 1.0,
            self._closeness.result() if self._closeness is not None and self._count else None,
            self._logits.result() if self._logits is not None and self._count else None,
            np.concatenate(self._chosen, axis=1) if self._chosen else np.empty((2, 0), np.float32),
        )


@dataclass
class _ClosenessSum:
    """Sums from which `Closeness` of all samples, as one vector, follows."""

    reference: float = 0.0
    array: float = 0.0
    product: float = 0.0
    error: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0
    count: int = 0

    def add(self, a: Floats, b: Floats) -> None:
        difference = np.abs(b - a)
        self.reference += float(np.vdot(a, a))
        self.array += float(np.vdot(b, b))
        self.product += float(np.vdot(a, b))
        self.error += float(np.vdot(difference, difference))
        self.absolute += float(difference.sum())
        # NaN stays.
        self.largest = float(np.maximum(self.largest, difference.max()))
        self.count += a.size

    def result(self) -> Closeness:
        norms = math.sqrt(self.reference) * math.sqrt(self.array)
        if self.error == 0:
            relative, cosine = 0.0, 1.0
        else:
            relative = math.sqrt(self.error / self.reference) if self.reference else math.inf
            cosine = self.product / norms if norms else 0.0
        return Closeness(accuracy.error_db(relative), cosine, relative, self.largest, self.absolute / self.count)


@dataclass
class _LogitsSum:
    """Sums from which `LogitsQuality` of all samples follows."""

    rows: int = 0
    divergence: float = 0.0
    agreement: float = 0.0
    labels: int = 0
    likelihoods: Floats = field(default_factory=lambda: np.zeros(2))

    def add(self, a: Floats, b: Floats) -> None:
        rows = a.size // a.shape[-1]
        self.rows += rows
        self.divergence += rows * accuracy.kl_divergence(a, b)
        self.agreement += rows * accuracy.top1_agreement(a, b)

    def predict(self, a: npt.NDArray[Any], b: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        count = int((labels >= 0).sum())
        if count:
            self.labels += count
            losses = [accuracy.mean_negative_log_likelihood(array, labels) for array in (a, b)]
            self.likelihoods += count * np.array(losses)

    def result(self) -> LogitsQuality:
        perplexities = [accuracy.exp_loss(total / self.labels) for total in self.likelihoods] if self.labels else []
        return LogitsQuality(self.divergence / self.rows, self.agreement / self.rows, *perplexities)
