"""Values of ``config.json``, checked where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm_ternary.errors import ModelError

FILE = "config.json"


class Settings:
    """A configuration whose values have the kinds that an architecture expects.

    Parameters
    ----------
    values : mapping
        What ``config.json`` holds.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``, under the first of several names that is there.

        Raises
        ------
        ModelError
            If there is none and no default, or it is something else.
        """
        name, value = self._find(names, default)
        if type(value) is not int or value < least:
            raise ModelError(FILE, f"{name} is {value!r}, expected a whole number of at least {least}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A positive number."""
        name, value = self._find(names, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ModelError(FILE, f"{name} is {value!r}, expected a positive number")
        return float(value)

    def text(self, *names: str, default: str | None = None) -> str:
        """A word."""
        name, value = self._find(names, default)
        if not isinstance(value, str):
            raise ModelError(FILE, f"{name} is {value!r}, expected a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(FILE, f"{name} is {value!r}, expected true or false")
        return value

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse a setting whose value changes the graph in a way that no code here builds; absent is allowed.

        Raises
        ------
        ModelError
            If it is none of ``allowed``.
        """
        if name in self.values and self.values[name] not in allowed:
            expected = " or ".join(map(repr, allowed))
            hint = "export the model to ONNX and compile that"
            raise ModelError(FILE, f"{name} is {self.values[name]!r}, only {expected} is supported", hint)

    def divided(self, name: str, whole: int, parts: int) -> int:
        """``whole / parts``, which has to be a whole number; ``name`` says what it is."""
        if whole % parts:
            raise ModelError(FILE, f"{name}: {whole} features cannot be divided by {parts} heads")
        return whole // parts

    def _find(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        # A null counts as absent: transformers writes it for "the default".
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        if default is None:
            raise ModelError(FILE, f"lacks {' or '.join(names)}", "is it the configuration of this checkpoint?")
        return names[0], default
