"""How near one array is to another, and a model's predictions to what they should be. Pure functions over numpy.

All of them sum in float64. Where both arrays are the same, an error is 0 and a cosine 1; NaN in, NaN out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Closeness:
    """How near an array is to a reference of the same shape.

    Parameters
    ----------
    sqnr_db : float
        Signal to quantization noise, see `sqnr_db`.
    cosine : float
        Of the angle between them, as one vector each.
    relative_error : float
        ||array - reference|| / ||reference|| in the Frobenius norm.
    max_error, mean_error : float
        Of the absolute differences.
    """

    sqnr_db: float
    cosine: float
    relative_error: float
    max_error: float
    mean_error: float


def closeness(reference: Array, array: Array) -> Closeness:
    """Compute all of `Closeness`.

    Raises
    ------
    InputError
        If the shapes differ or there is no element.
    """
    a, b = _pair(reference, array)
    difference = np.abs(b - a)
    return Closeness(
        sqnr_db(a, b), cosine(a, b), relative_error(a, b), float(difference.max()), float(difference.mean())
    )


def sqnr_db(reference: Array, array: Array) -> float:
    """Compute 10 log10(||reference||^2 / ||array - reference||^2), in decibels.

    Infinite where they are equal, minus infinity where only the reference is zero.
    """
    return error_db(relative_error(reference, array))


def error_db(relative_error: float) -> float:
    """Compute the SQNR in decibels that a relative error is: -20 log10 of it, infinite for 0."""
    if relative_error == 0:
        return math.inf
    return -20 * math.log10(relative_error) if relative_error != math.inf else -math.inf


def relative_error(reference: Array, array: Array) -> float:
    """Compute ||array - reference|| / ||reference||; infinite where only the reference is zero."""
    a, b = _pair(reference, array)
    error, norm = float(np.linalg.norm(b - a)), float(np.linalg.norm(a))
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def cosine(reference: Array, array: Array) -> float:
    """Compute the cosine of the angle between two arrays, each taken as one vector.

    1 where they are equal, 0 where one of them alone is zero.
    """
    a, b = _pair(reference, array)
    return float(row_cosines(a.reshape(1, -1), b.reshape(1, -1))[0])


def row_cosines(reference: Array, array: Array) -> npt.NDArray[np.float64]:
    """Compute the cosine for each vector along the last axis: (..., d) twice to (...)."""
    a, b = _pair(reference, array)
    product = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots = (a * b).sum(axis=-1)
    same = (a == b).all(axis=-1)
    cosines: npt.NDArray[np.float64] = np.where(same, 1.0, dots / np.where(product > 0, product, 1.0))
    return cosines.clip(-1, 1)


def kl_divergence(reference: Array, logits: Array) -> float:
    """Compute the mean over rows of KL(p || q), in nats, p and q the softmax of two arrays of logits (..., classes).

    References
    ----------
    Kullback and Leibler, "On Information and Sufficiency", 1951, equation 2.2: sum of p log(p / q).
    """
    p, q = (_log_softmax(array) for array in _pair(reference, logits))
    # Where p is 0 the term is 0, whatever q is.
    terms = np.exp(p) * np.subtract(p, q, out=np.zeros_like(p), where=p > -np.inf)
    # Rounding alone can bring it below 0.
    return float(np.maximum(terms.sum(axis=-1).mean(), 0.0))


def top1_agreement(reference: Array, logits: Array) -> float:
    """Compute the share of rows (..., classes) whose largest logit is at the same place; of equal ones the first."""
    a, b = _pair(reference, logits)
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())


def perplexity(logits: Array, labels: Array) -> float:
    """Compute exp of the mean negative log likelihood.

    Parameters
    ----------
    logits : (..., classes) float
    labels : (...) int
        The right class of each row; a negative one is left out.

    Raises
    ------
    InputError
        If the shapes do not fit, a label is no class, or no label is left.
    """
    return exp_loss(mean_negative_log_likelihood(logits, labels))


def exp_loss(loss: float) -> float:
    """Compute the perplexity that a mean negative log likelihood is; infinite where float64 ends."""
    return math.exp(loss) if not loss > math.log(np.finfo(np.float64).max) else math.inf


def mean_negative_log_likelihood(logits: Array, labels: Array) -> float:
    """Compute the mean of -log softmax(logits)[label], in nats, over rows whose label is not negative.

    Raises
    ------
    InputError
        As `perplexity`.
    """
    if logits.shape[:-1] != labels.shape:
        raise InputError("labels", f"shape {labels.shape}; expected {logits.shape[:-1]} for logits {logits.shape}")
    counted = labels >= 0
    if not counted.any():
        raise InputError("labels", "none is left to predict; expected one at least", "give longer sequences")
    rows, classes = _log_softmax(logits[counted].astype(np.float64)), labels[counted]
    if classes.max() >= logits.shape[-1]:
        raise InputError("labels", f"one is {classes.max()}; expected less than {logits.shape[-1]}")
    return -float(np.take_along_axis(rows, classes[:, None], axis=-1).mean())


def next_token_labels(input_ids: Array, attention_mask: Array | None = None) -> Array:
    """Give what a decoder shall predict at each position: the next token.

    Parameters
    ----------
    input_ids : (batch, sequence) int
    attention_mask : (batch, sequence) int, optional
        0 where a token is padding, which is neither predicted nor predicted from.

    Returns
    -------
    labels : (batch, sequence) int64
        -1 where there is nothing to predict.
    """
    labels = np.full(input_ids.shape, -1, np.int64)
    labels[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        real = np.asarray(attention_mask) != 0
        labels[:, :-1][~(real[:, 1:] & real[:, :-1])] = -1
    return labels


def pearson(x: Array, y: Array) -> float:
    """Compute Pearson's correlation of two arrays; NaN where one of them is constant."""
    a, b = (array.ravel() - array.mean() for array in _pair(x, y))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / norm, -1, 1)) if norm else math.nan


def spearman(x: Array, y: Array) -> float:
    """Compute Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank."""
    a, b = _pair(x, y)
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _pair(reference: Array, array: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if reference.shape != array.shape:
        raise InputError("arrays to compare", f"shapes {reference.shape} and {array.shape}; expected the same")
    if not array.size:
        raise InputError("arrays to compare", f"shape {array.shape} has no element; expected one at least")
    return reference.astype(np.float64), array.astype(np.float64)
