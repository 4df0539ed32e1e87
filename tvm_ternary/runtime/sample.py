"""Make random inputs that a model accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError
from tvm_ternary.runtime.arrays import dtype_of
from tvm_ternary.runtime.linear import read_linear
from tvm_ternary.runtime.manifest import TensorSpec

_LEADING_DIM = 1
_OTHER_DIM = 32
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def random_inputs(
    specs: Sequence[TensorSpec],
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    bounds: Mapping[str, int] | None = None,
    known: Mapping[str, int] | None = None,
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
        less. One that is arithmetic over others (``past + length``, ``rows * 32``) is what they make it.
    seed : int
        The same seed gives the same inputs.
    bounds : mapping of str to int, optional
        The largest value of a named dimension, where the model sets one: ``module.manifest.bounds``.
    known : mapping of str to int, optional
        Dimensions that are not for the inputs to say: ``module.known_dims``.

    Raises
    ------
    OptionError
        If ``dims`` names a dimension that no input has, or a number is negative.
    """
    dims = dims or {}
    leading = {spec.shape[0] for spec in specs if spec.shape}
    texts = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)}
    formulas = {text: formula for text in texts if (formula := read_linear(text)) is not None}
    multiples = dict(found for formula in formulas.values() if (found := formula.multiple) is not None)
    names = sorted(texts | multiples.keys())
    for name, value in dims.items():
        if name not in names:
            raise OptionError(f"dimension {name!r}", f"no such dimension; expected one of {', '.join(names) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(f"dimension {name!r}", f"is {value!r}; expected a whole number >= 0")
    usual = {name: _LEADING_DIM if name in leading else _OTHER_DIM for name in names}
    usual |= {name: -(-_OTHER_DIM // factor) for name, factor in multiples.items() if name not in texts}
    limits = dict(bounds or {})
    for text, most in (bounds or {}).items():
        terms = formula.factors if (formula := read_linear(text)) is not None else {}
        for term in terms:
            limits[term] = min(most // len(terms), limits.get(term, most))
    sizes = {name: dims.get(name, min(usual[name], limits.get(name, usual[name]))) for name in names}
    sizes |= known or {}
    totals = {text: formula.value(sizes) for text, formula in formulas.items() if text not in dims}
    sizes |= {text: total for text, total in totals.items() if total is not None}
    generator = np.random.default_rng(seed)
    return {spec.name: _random(spec, sizes, generator) for spec in specs}


def _random(spec: TensorSpec, sizes: Mapping[str, int], generator: np.random.Generator) -> npt.NDArray[Any]:
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
    dtype = dtype_of(spec.dtype)
    if spec.dtype in _FLOATS:
        return generator.standard_normal(shape).astype(dtype)
    array = np.asarray(generator.integers(0, 2, shape)).astype(dtype)
    if array.ndim:
        array[..., :1] = 1
    return array
