"""What a user says of dimensions: followed to its end, and refused where it is nonsense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm_ternary.errors import OptionError
from tvm_ternary.graph.onnx.dimension_text import linear_dimension
from tvm_ternary.runtime.linear import Linear

LARGEST_SIZE = 2**31 - 1

# Characters of arithmetic that is read.
_LONGEST = 200
_EXAMPLES = "expected a size, the name of another dimension, or arithmetic such as 32*rows or past + length"


def resolve_dimensions(dims: Mapping[str, int | str], known: Sequence[str]) -> dict[str, int | Linear]:
    """Follow what is said of dimensions to numbers and to dimensions of which nothing is said.

    Parameters
    ----------
    dims : mapping of str to int or str
        By name, a size of at least 1, the name of the dimension that it is equal to, or a sum of multiples of
        dimensions and a number. A multiple of one name, perhaps with a number added, as ``32*rows``, makes that name a
        new dimension where it is none.
    known : sequence of str
        The model's dimensions.

    Returns
    -------
    dict of str to int or Linear
        Over names that are no keys. Of dimensions that are said to be equal in a circle, the first by name is left out.

    Raises
    ------
    OptionError
        If a name is no dimension, a size no number from 1 to 2**31 - 1, a dimension arithmetic over itself, or the text
        is no such arithmetic.
    """
    for name in dims:
        if name not in known:
            raise _unknown(name, known)
    formulas = {name: _formula(name, text, known) for name, text in dims.items() if isinstance(text, str)}
    new = {formula.multiple[0] for formula in formulas.values() if formula.multiple} - {*known}
    for name, formula in formulas.items():
        _check_names(name, formula, known, new)
    given = {**dims, **formulas}
    free = [name for name in dims if _starts_circle(name, formulas)]
    return {name: _resolved(name, given, free, ()) for name in dims if name not in free}


def _unknown(name: str, known: Sequence[str]) -> OptionError:
    hint = f"it has {', '.join(known) or 'none'}"
    return OptionError(f"dimension {name}", "the model has no such symbolic dimension", hint)


def _formula(name: str, text: str, known: Sequence[str]) -> Linear:
    """A name alone is arithmetic, too."""
    if text in known or text.isidentifier():
        return Linear({text: 1})
    formula = linear_dimension(text) if len(text) <= _LONGEST else None
    if formula is None:
        start = text[:20]
        shown = repr(text) if len(text) <= _LONGEST else f"{start + '...'!r} of {len(text)} characters"
        raise OptionError(f"dimension {name}", f"got {shown}", _EXAMPLES)
    largest = max(map(abs, (formula.offset, *formula.factors.values())))
    if largest > LARGEST_SIZE:
        raise OptionError(f"dimension {name}", f"got {text!r}, expected numbers up to {LARGEST_SIZE}")
    return formula


def _check_names(name: str, formula: Linear, known: Sequence[str], new: set[str]) -> None:
    unknown = [part for part in formula.factors if part not in known and part not in new]
    if unknown and formula == Linear({unknown[0]: 1}):
        raise _unknown(unknown[0], known)
    if unknown:
        problem = f"is {formula}, from which {' and '.join(unknown)} cannot be told"
        hint = f"name dimensions of the model ({', '.join(known)}), or a multiple of one new name, such as 32*rows"
        raise OptionError(f"dimension {name}", problem, hint)


def _starts_circle(name: str, formulas: Mapping[str, Linear]) -> bool:
    """Whether a dimension is the first by name of some that are said to be equal to each other."""
    circle, following = [name], formulas[name].name if name in formulas else None
    while following is not None and following in formulas and following not in circle:
        circle.append(following)
        following = formulas[following].name
    return following == name == min(circle)


def _resolved(
    name: str, given: Mapping[str, int | str | Linear], free: Sequence[str], path: Sequence[str]
) -> int | Linear:
    value = given[name]
    if name in path:
        raise OptionError(f"dimension {name}", "is given as arithmetic over itself", "use a new name, such as 32*rows")
    if isinstance(value, Linear):
        given_parts = [part for part in value.factors if part in given and part not in free]
        value = value.put({part: _resolved(part, given, free, (*path, name)) for part in given_parts})
    if isinstance(value, int) and not 1 <= value <= LARGEST_SIZE:
        wanted = "a size of at least 1" if value < 1 else f"at most {LARGEST_SIZE}"
        raise OptionError(f"dimension {name}", f"got {value}, expected {wanted}")
    assert not isinstance(value, str)
    return value
