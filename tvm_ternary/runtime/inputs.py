"""Check what a caller gives a module against what its manifest declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import InputError
from tvm_ternary.runtime.arrays import BFLOAT16, dtype_of
from tvm_ternary.runtime.linear import Linear, read_linear
from tvm_ternary.runtime.manifest import TensorSpec


def check_inputs(
    specs: Sequence[TensorSpec],
    inputs: Mapping[str, npt.ArrayLike],
    bounds: Mapping[str, int] | None = None,
    known: Mapping[str, tuple[int, str]] | None = None,
) -> list[npt.NDArray[Any]]:
    """Give the inputs as arrays in the order of ``specs``.

    Nothing is cast or broadcast: a dtype or shape that does not fit is an error. A named dimension is at least 1, which
    compiled code takes for granted.

    Parameters
    ----------
    specs : sequence of TensorSpec
    inputs : mapping of str to array
    bounds : mapping of str to int, optional
        The largest value of a named dimension, or a sum of some, where the model sets one.
    known : mapping of str to (int, str), optional
        Dimensions that are not the caller's to choose, perhaps 0, and what has them.

    Raises
    ------
    InputError
        If an input is missing or unknown, or has another dtype, rank or shape than declared, or two inputs give one
        named dimension different numbers, or one that is out of bounds, or one that is not the sum or multiple that it
        is declared as.
    """
    names = [spec.name for spec in specs]
    if not isinstance(inputs, Mapping):
        raise InputError(
            "inputs", f"are a {type(inputs).__name__}; expected a mapping of name to array", f"names: {_list(names)}"
        )
    for name in inputs:
        if name not in names:
            raise InputError(f"input {name!r}", f"no such input; expected {_list(names)}")
    for name in names:
        if name not in inputs:
            given = _list(list(inputs)) if inputs else "none"
            raise InputError(f"input {name!r}", f"is missing; given: {given}; expected {_list(names)}")
    bound: dict[str, tuple[int, str]] = dict(known or {})
    arrays = [_check(spec, inputs[spec.name], bound) for spec in specs]
    for dim, (got, source) in bound.items():
        if dim in (known or {}):
            continue
        most = (bounds or {}).get(dim)
        if got < 1 or (most is not None and got > most):
            wanted = "at least 1" if most is None else f"1 to {most}"
            raise InputError(f"input {source!r}", f"has {dim}={got}; expected {wanted}")
    _check_formulas(bound, bounds or {})
    return arrays


def _check_formulas(bound: Mapping[str, tuple[int, str]], bounds: Mapping[str, int]) -> None:
    """Check the dimensions that are arithmetic over others, and find those that others are multiples of."""
    sizes = {dim: got for dim, (got, _) in bound.items()}
    formulas = {dim: formula for dim in bound if (formula := read_linear(dim)) is not None}
    for dim, formula in formulas.items():
        if formula.multiple is not None and formula.multiple[0] not in sizes:
            sizes[formula.multiple[0]] = _solved(dim, formula, *bound[dim], bounds)
    for dim, formula in formulas.items():
        (got, source), expected = bound[dim], formula.value(sizes)
        if expected is not None and got != expected:
            raise InputError(f"input {source!r}", f"has {dim}={got}; expected {expected}")
    for dim, most in bounds.items():
        total = formula.value(sizes) if (formula := read_linear(dim)) is not None else None
        if total is not None and total > most:
            raise InputError("inputs", f"have {dim}={total}; expected at most {most}")


def _solved(dim: str, formula: Linear, got: int, source: str, bounds: Mapping[str, int]) -> int:
    """What the dimension is that ``dim`` is a multiple of."""
    name, factor = formula.multiple or ("", 1)
    most = bounds.get(name)
    size = formula.solve(got)
    if size is not None and (most is None or size <= most):
        return size
    below = min(max(1, (got - formula.offset) // factor), most or got)
    near = [formula.offset + factor * n for n in (below, below + 1) if most is None or n <= most]
    limit = "at least 1" if most is None else f"from 1 to {most}"
    raise InputError(
        f"input {source!r}",
        f"has a dimension of {got}; expected {dim} with a whole number {name} {limit}",
        f"resize or pad it, to {' or '.join(map(str, near))}" if near else None,
    )


def size_of(dim: int | str, specs: Sequence[TensorSpec], shapes: Sequence[Sequence[int]]) -> int | None:
    """The number that a dimension, or arithmetic over some, is in inputs of these shapes, which `check_inputs` allows.

    None where they do not say it.
    """
    if isinstance(dim, int):
        return dim
    pairs = zip(specs, shapes, strict=True)
    sizes = {str(name): size for spec, shape in pairs for name, size in zip(spec.shape, shape, strict=True)}
    formula = Linear({dim: 1}) if dim in sizes else read_linear(dim)
    return None if formula is None else formula.value(sizes)


def check_outputs(specs: Sequence[TensorSpec], names: Sequence[str] | None) -> list[int]:
    """Give the positions of the named outputs, all of them for None.

    Raises
    ------
    InputError
        If there is no output of some name.
    """
    known = [spec.name for spec in specs]
    if names is None:
        return list(range(len(known)))
    if isinstance(names, str):
        raise InputError("output names", f"are the string {names!r}; expected a list of names", f"write [{names!r}]")
    for name in names:
        if name not in known:
            raise InputError(f"output {name!r}", f"no such output; expected {_list(known)}")
    return [known.index(name) for name in names]


def _check(spec: TensorSpec, value: npt.ArrayLike, bound: dict[str, tuple[int, str]]) -> npt.NDArray[Any]:
    subject = f"input {spec.name!r}"
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(subject, f"is no array ({error})", f"expected {spec}") from error
    if array.dtype != dtype_of(spec.dtype):
        raise InputError(
            subject,
            f"has dtype {array.dtype}; expected {spec.dtype}",
            f"cast it with .astype({_spelled(spec.dtype)})",
        )
    shape = f"[{', '.join(map(str, spec.shape))}]"
    if array.ndim != len(spec.shape):
        raise InputError(
            subject, f"has {array.ndim} dimensions {list(array.shape)}; expected {len(spec.shape)}: {shape}"
        )
    for axis, (got, declared) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(declared, int):
            if got != declared:
                raise InputError(
                    subject, f"has shape {list(array.shape)}; expected {shape}: axis {axis} is {got}, not {declared}"
                )
            continue
        expected, source = bound.setdefault(declared, (got, spec.name))
        if got != expected:
            raise InputError(
                subject,
                f"has shape {list(array.shape)}; expected {shape} with {declared}={expected}, as input {source!r} has",
            )
    return array


def _spelled(dtype: str) -> str:
    return {"bool": "numpy.bool_", BFLOAT16: "ml_dtypes.bfloat16"}.get(dtype, f"numpy.{dtype}")


def _list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
