"""How near each ternary matrix is to the float one: its weights, and its outputs for the inputs it really has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.analysis.accuracy import cosine, relative_error
from tvm_ternary.formats import TernaryTensor

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class MatrixErrors:
    """How near a matrix is to the float one; see `LayerQuality`."""

    weight_error: float
    weight_cosine: float
    output_error: float | None = None
    output_cosine: float | None = None


def matrix_errors(weight: Floats, ternary: TernaryTensor, hessian: Floats | None) -> MatrixErrors:
    """Compare a ternary matrix with the float one.

    With H the mean of x x^T over the inputs x, ||W X||^2 is tr(W H W^T) times their number, so that no output has to
    be computed.

    Parameters
    ----------
    weight : (N, K) float
    ternary : TernaryTensor
    hessian : (K, K) float, optional
        Of the inputs in the float model. None: outputs are not compared.
    """
    given = ternary.dequantize()
    errors = MatrixErrors(relative_error(weight, given), cosine(weight, given))
    if hessian is None:
        return errors
    difference = given - weight
    products = weight @ hessian
    norm = _dot(products, weight)
    error = max(_dot(difference @ hessian, difference), 0.0)
    if error == 0:
        return MatrixErrors(errors.weight_error, errors.weight_cosine, 0.0, 1.0)
    across = _dot(products, difference)
    # ||W X||^2, ||T X||^2 and their product, T = W + difference.
    other = max(norm + 2 * across + error, 0.0)
    length = math.sqrt(norm * other) if norm > 0 else 0.0
    output_error = math.sqrt(error / norm) if norm > 0 else math.inf
    output_cosine = min(max((norm + across) / length, -1.0), 1.0) if length else 0.0
    return MatrixErrors(errors.weight_error, errors.weight_cosine, output_error, output_cosine)


def _dot(a: Floats, b: Floats) -> float:
    """Sum of products in float64."""
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
