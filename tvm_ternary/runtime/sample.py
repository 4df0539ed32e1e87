"""Make random inputs that a model accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError
from tvm_ternary.runtime.manifest import TensorSpec
from tvm_ternary.runtime.sums import sum_of, terms

_LEADING_DIM = 1
_OTHER_DIM = 32


def random_inputs(
    specs: Sequence[TensorSpec],
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    bounds: Mapping[str, int] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Make inputs that a model accepts.

    Floats are drawn from the standard normal distribution. Integers and bools are 0 or 1, which every vocabulary and
    mask has, with 1 at the start of the last axis, so that no row of a mask is empty.

    Parameters
    ----------
    specs : sequence of TensorSpec
        Usually ``module.inputs``.
    dims : mapping of str to int, optional
        Numbers for named dimensions. One that is not given is 1 if it leads the shape of some input (a batch) and 32
        otherwise (a length or size; 32 because image models halve theirs up to five times), or its bound if that is
        less. One that is a sum of others is that sum.
    seed : int
        The same seed gives the same inputs.
    bounds : mapping of str to int, optional
        The largest value of a named dimension, where the model sets one: ``module.manifest.bounds``.

    Raises
    ------
    OptionError
        If ``dims`` names a dimension that no input has, or a number is negative.
    """
    dims = dims or {}
    leading = {spec.shape[0] for spec in specs if spec.shape}
    names = sorted({dim for spec in specs for dim in spec.shape if isinstance(dim, str)})
    for name, value in dims.items():
        if name not in names:
            raise OptionError(f"dimension {name!r}", f"no such dimension; expected one of {', '.join(names) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(f"dimension {name!r}", f"is {value!r}; expected a whole number >= 0")
    usual = {name: _LEADING_DIM if name in leading else _OTHER_DIM for name in names}
    limits = dict(bounds or {})
    for text, most in (bounds or {}).items():
        for term in terms(text):
            limits[term] = min(most // len(terms(text)), limits.get(term, most))
    sizes = {name: dims.get(name, min(usual[name], limits.get(name, usual[name]))) for name in names}
    sums = {name: sum_of(name, sizes) for name in names if name not in dims}
    sizes |= {name: total for name, total in sums.items() if total is not None}
    generator = np.random.default_rng(seed)
    return {spec.name: _random(spec, sizes, generator) for spec in specs}


def _random(spec: TensorSpec, sizes: Mapping[str, int], generator: np.random.Generator) -> npt.NDArray[Any]:
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    array = np.asarray(generator.integers(0, 2, shape)).astype(dtype)
    if array.ndim:
        array[..., :1] = 1
    return array
