"""Dimensions that are arithmetic over others: ``past + length``, the keys that a decoder's step sees; ``rows * 32``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBER = re.compile("-?[0-9]{1,18}")
_SIGNS = {"+": 1, "-": -1}


@dataclass(frozen=True)
class Linear:
    """A sum of multiples of dimensions and a number.

    Attributes
    ----------
    factors : mapping of str to int
        What each dimension, by name, is multiplied by; never 0.
    offset : int
    """

    factors: Mapping[str, int]
    offset: int = 0

    def value(self, sizes: Mapping[str, int]) -> int | None:
        """What it is for given sizes, None where a dimension has none."""
        if not self.factors.keys() <= sizes.keys():
            return None
        return self.offset + sum(factor * sizes[name] for name, factor in self.factors.items())

    @property
    def name(self) -> str | None:
        """The dimension that it is equal to; None for anything else."""
        (name, *others) = self.factors
        return name if not others and self == Linear({name: 1}) else None

    @property
    def multiple(self) -> tuple[str, int] | None:
        """The name and the factor of a multiple of one dimension, perhaps with an offset; None for anything else.

        The dimension is told from the value then. ``length + 1`` is none: files call so what is a dimension of its own.
        """
        if len(self.factors) != 1:
            return None
        ((name, factor),) = self.factors.items()
        return (name, factor) if factor > 1 else None

    def put(self, values: Mapping[str, int | Linear]) -> int | Linear:
        """Put numbers and arithmetic in the place of names."""
        total = Linear({}, self.offset)
        for name, factor in self.factors.items():
            total += factor * values.get(name, Linear({name: 1}))
        return total if total.factors else total.offset

    def solve(self, value: int) -> int | None:
        """What the only dimension is where the whole is ``value``.

        None where there are several, or that is no whole number of at least 1.
        """
        ((_, factor), *others) = self.factors.items()
        size, rest = divmod(value - self.offset, factor)
        return None if others or rest or size < 1 else size

    def __str__(self) -> str:
        parts = [name if factor == 1 else f"{factor} * {name}" for name, factor in self.factors.items()]
        return " + ".join(parts + ([str(self.offset)] if self.offset else [])).replace("+ -", "- ")

    def __add__(self, other: Linear | int) -> Linear:
        if isinstance(other, int):
            return Linear(self.factors, self.offset + other)
        names = [*self.factors, *(name for name in other.factors if name not in self.factors)]
        total = {name: self.factors.get(name, 0) + other.factors.get(name, 0) for name in names}
        return Linear({name: factor for name, factor in total.items() if factor}, self.offset + other.offset)

    __radd__ = __add__

    def __sub__(self, other: Linear | int) -> Linear:
        return self + -1 * other

    def __rsub__(self, other: int) -> Linear:
        return -1 * self + other

    def __mul__(self, number: int) -> Linear:
        if not isinstance(number, int):
            return NotImplemented
        if number == 0:
            return Linear({})
        return Linear({name: factor * number for name, factor in self.factors.items()}, self.offset * number)

    __rmul__ = __mul__


def read_linear(text: str) -> Linear | None:
    """Read a dimension as a manifest has it: ``rows * 32 - 4``, with blanks around every operator.

    Returns
    -------
    Linear or None
        None where the text is a name, or arithmetic of another kind.
    """
    operands, operators = text.split(" ")[::2], text.split(" ")[1::2]
    if not operators or len(operands) != len(operators) + 1 or not {"+", "-", "*"}.issuperset(operators):
        return None
    total, term = Linear({}), _operand(operands[0])
    for sign, operand in zip(operators, map(_operand, operands[1:]), strict=True):
        if sign != "*":
            total, term = total + term, operand * _SIGNS[sign]
        elif not term.factors:
            term = operand * term.offset
        elif not operand.factors:
            term = term * operand.offset
        else:
            return None
    result = total + term
    return result if result.factors else None


def _operand(text: str) -> Linear:
    return Linear({}, int(text)) if _NUMBER.fullmatch(text) else Linear({text: 1})
