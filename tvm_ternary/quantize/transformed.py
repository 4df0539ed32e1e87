"""What a transform of an input is chosen by, and what it makes of the statistics of that input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_ternary.formats.scheme import Scheme
from tvm_ternary.formats.transform import InputTransform
from tvm_ternary.quantize.compensate import round_to
from tvm_ternary.quantize.levels import Floats
from tvm_ternary.quantize.observers import Statistics
from tvm_ternary.quantize.recipe import Recipe
from tvm_ternary.quantize.scaling import search_scaling
from tvm_ternary.quantize.start import start_levels


def choose_transform(
    weights: Sequence[Floats], scheme: Scheme, recipe: Recipe, statistics: Statistics | None
) -> InputTransform | None:
    """Choose what is done to an input before the matrices that share it.

    Parameters
    ----------
    weights : sequence of (N_i, K) float32
    scheme : Scheme
        Of the first; the scale is searched for it.
    recipe : Recipe
        ``scaling`` asks for a scale, which takes statistics with a Hessian; ``rotation`` for a rotation.
    statistics : Statistics or None

    Returns
    -------
    InputTransform or None
        The scale is of powers of two, which round nothing. None where nothing is asked for, or gained.
    """
    scale = None
    if recipe.scaling and statistics is not None and statistics.hessian is not None:

        def round_trip(w: Floats) -> Floats:
            levels = start_levels(w, scheme.planes, scheme.granularity)
            return levels.values(round_to(levels, w))

        found = search_scaling(weights, statistics, round_trip).input_scale
        powers = np.exp2(np.rint(np.log2(found))).astype(np.float32)
        scale = powers if (powers != powers[0]).any() else None
    rotation = recipe.rotation if 0 < recipe.rotation <= weights[0].shape[1] else None
    return None if scale is None and rotation is None else InputTransform(scale, rotation)


def transform_statistics(statistics: Statistics, transform: InputTransform) -> Statistics:
    """The statistics of transformed inputs.

    With T the transform, x becomes T x, and so H becomes T H T^T. The largest magnitude of a rotated input is not
    known; what is given is the bound sqrt(count * mean square).
    """

    def both(moment: Floats) -> Floats:
        return np.ascontiguousarray(transform.apply(transform.apply(moment).T).T, dtype=np.float32)

    mean = np.asarray(transform.apply(statistics.mean), dtype=np.float32)
    hessian = None if statistics.hessian is None else both(statistics.hessian)
    drift = None if statistics.drift is None else both(statistics.drift)
    if transform.rotation is None:
        assert transform.scale is not None
        absmax, square = statistics.absmax * transform.scale, statistics.square * transform.scale**2
    else:
        if hessian is not None:
            square = np.maximum(np.diag(hessian), 0.0).astype(np.float32)
        else:
            # A block's mean square is what a rotation spreads evenly over it.
            scaled = statistics.square * (1.0 if transform.scale is None else transform.scale**2)
            square = _spread(np.asarray(scaled, dtype=np.float32), transform.rotation)
        absmax = np.sqrt(square * np.float32(statistics.count))
    return replace(statistics, mean=mean, absmax=absmax, square=square, hessian=hessian, drift=drift, histogram=None)


def _spread(square: Floats, block: int) -> Floats:
    whole = len(square) - len(square) % block
    spread = square.copy()
    spread[:whole] = np.repeat(square[:whole].reshape(-1, block).mean(axis=1), block)
    return spread
