"""How near each ternary matrix is to the float one: its weights, and its outputs for the inputs it really has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.analysis.accuracy import cosine, relative_error
from tvm_ternary.convert.stream import calibrate
from tvm_ternary.evaluation.models import Arrays
from tvm_ternary.formats import TernaryTensor
from tvm_ternary.graph.importer import ImportedModel

Progress = Callable[[str, int, int], None]
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


def observe_matrices(
    model: ImportedModel,
    samples: Sequence[Arrays],
    rivals: Sequence[Mapping[str, TernaryTensor]],
    progress: Progress | None = None,
) -> list[dict[str, MatrixErrors]]:
    """Run the float model once and compare each matrix, for the inputs that it has there.

    Parameters
    ----------
    model : ImportedModel
        The float model.
    samples : sequence of mappings of str to array
    rivals : sequence of mappings of str to TernaryTensor
        The ternary matrices of each model that is compared, by the names that the float model has for them.
    progress : callable, optional
        Told of each segment.

    Returns
    -------
    list of dict of str to MatrixErrors
        For each of ``rivals``. A matrix that no sample reaches is compared by its weights alone.
    """
    found: list[dict[str, MatrixErrors]] = [{} for _ in rivals]

    def compare(names: Sequence[str], hessian: Floats | None) -> dict[str, npt.NDArray[np.float32]]:
        weights = {name: model.params[name] for name in names}
        for errors, ternary in zip(found, rivals, strict=True):
            for name, weight in weights.items():
                if name in ternary:
                    errors[name] = matrix_errors(weight.T, ternary[name], hessian)
        return weights

    wanted = [name for name in model.shapes if any(name in ternary for ternary in rivals)]
    if not wanted:
        return found
    calibrate(model, samples, lambda names, seen: compare(names, seen.hessian), wanted=wanted, progress=progress)
    compare([name for name in wanted if not any(name in errors for errors in found)], None)
    return found


def _dot(a: Floats, b: Floats) -> float:
    """Sum of products in float64."""
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
