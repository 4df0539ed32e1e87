"""How much an error in the products of one matrix moves the model's outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.convert.batches import Arrays, Batches
from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.convert.stream import Progress
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.cut import Segment, cut

Floats = npt.NDArray[np.float32]

# Noise like that of rounding to two planes, so that what it meets on the way is as curved as for real errors.
_NOISE = 0.2


def sensitivities(
    model: ImportedModel,
    samples: Sequence[Arrays],
    wanted: Collection[str],
    *,
    runner: SegmentRunner | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Measure how errors grow or vanish on their way to the outputs.

    A matrix is disturbed by noise that is 0.2 of each of its columns, all others left as they are; what comes of it is
    the ratio of two squared relative errors, of the model's outputs and of the matrix's products. In a transformer it
    differs a hundredfold between a projection of keys, behind which a softmax stands, and one that writes into the
    residual stream.

    The disturbed models walk side by side, so weights are read once, and of each lives what lies between two segments.
    Time grows with the square of the number of matrices: a few samples are enough.

    Parameters
    ----------
    model : ImportedModel
    samples : sequence of mappings of str to array
        Inputs by name.
    wanted : collection of str
        Matrices to disturb.
    runner : SegmentRunner, optional
    seed : int
        Of the noise.
    progress : callable, optional
        Told of each segment.

    Returns
    -------
    dict of str to float
        For those of ``wanted`` that the outputs depend on; 0 where they do not move, and where the products are all
        zero. Of several outputs each counts by how many numbers it has.

    Raises
    ------
    InputError
        If there is no sample, or one does not fit the model.
    """
    segments = cut(model.module)
    batches = Batches(model, segments, samples, runner or SegmentRunner())
    disturbed: dict[str, Batches] = {}
    products = {name: np.zeros(2) for name in wanted}
    seeds = {name: [seed, number] for number, name in enumerate(model.shapes) if name in wanted}
    for number, segment in enumerate(segments.segments):
        weights = {name: model.params[name] for name in segment.matrices}
        noisy: dict[str, Floats] = {}
        for name in (name for name in segment.matrices if name in seeds):
            # The same noise at every use of a matrix.
            noise = _noise(weights[name], np.random.default_rng(seeds[name]))
            products[name] += _energies(batches, segment, noise, weights[name])
            noisy[name] = weights[name] + noise
            disturbed.setdefault(name, batches.copy())
        for name, variant in disturbed.items():
            variant.advance(segment, {**weights, name: noisy[name]} if name in noisy else weights)
        batches.advance(segment, weights)
        if progress is not None:
            progress("sensitivity", number + 1, len(segments.segments))
    outputs = _outputs(batches.values(segments.result))
    return {
        name: _ratio(_moved(outputs, _outputs(variant.values(segments.result))), products[name])
        for name, variant in disturbed.items()
    }


def _noise(w: Floats, rng: np.random.Generator) -> Floats:
    size = np.sqrt(np.mean(np.square(w, dtype=np.float64), axis=0, keepdims=True))
    return np.asarray(_NOISE * size * rng.standard_normal(w.shape), np.float32)


def _energies(batches: Batches, segment: Segment, noise: Floats, w: Floats) -> npt.NDArray[np.float64]:
    """Sums of squares of the noise in a matrix's products, and of the products."""
    sums = np.zeros(2)
    for x in batches.rows(segment):
        sums += [np.square(x @ matrix, dtype=np.float64).sum() for matrix in (noise, w)]
    return sums


def _outputs(results: Sequence[Any]) -> list[list[npt.NDArray[Any]]]:
    """For each output of floats, its array of each batch."""
    arrays = [[np.from_dlpack(output) for output in result] for result in results]
    return [list(batches) for batches in zip(*arrays, strict=True) if np.issubdtype(batches[0].dtype, np.floating)]


def _moved(before: Sequence[Sequence[npt.NDArray[Any]]], after: Sequence[Sequence[npt.NDArray[Any]]]) -> float:
    """The squared relative error, mean over the numbers that come out."""
    total, elements = 0.0, 0
    for old, new in zip(before, after, strict=True):
        count = sum(one.size for one in old)
        size = sum(float(np.square(one, dtype=np.float64).sum()) for one in old)
        moved = sum(float(np.square(b - a, dtype=np.float64).sum()) for a, b in zip(old, new, strict=True))
        total += count * moved / size if size else 0.0
        elements += count
    return total / elements if elements else 0.0


def _ratio(moved: float, products: npt.NDArray[np.float64]) -> float:
    noise, size = products
    return moved * size / noise if noise else 0.0
