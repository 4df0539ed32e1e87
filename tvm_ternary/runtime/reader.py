"""Read a JSON document into dataclasses, strictly: every key, no other one, each value of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from tvm_ternary.errors import ArtifactError, LayoutError

_T = TypeVar("_T")

# The JSON value that a field's annotation admits. Annotations are text here, because of the __future__ import.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "int | str": (int, str),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
    "dict[str, Any]": (dict,),
    "tuple[int, ...]": (list,),
    "tuple[str, ...]": (list,),
    "tuple[int | str, ...]": (list,),
}
_ELEMENTS: dict[str, type] = {"tuple[int, ...]": int, "tuple[str, ...]": str}


@dataclass(frozen=True)
class Reader:
    """Turns JSON objects into the manifest's dataclasses and names the key that is wrong.

    Parameters
    ----------
    subject : str
        What an error names.
    """

    subject: str

    def check_keys(self, kind: type, got: object, where: str) -> dict[str, Any]:
        """Give the object if its keys are exactly the fields of ``kind``."""
        place = f"manifest.{where}" if where else "the manifest"
        if not isinstance(got, dict):
            raise self.error(f"{place} is {type(got).__name__}; expected an object")
        names = {item.name for item in fields(kind)}
        for missing in sorted(names - got.keys()):
            raise self.error(f"{place} lacks {missing!r}")
        for extra in sorted(got.keys() - names):
            raise self.error(f"{place} has the unknown key {extra!r}")
        return got

    def value(self, kind: type[_T], body: Mapping[str, Any], key: str) -> _T:
        """Give a value that is of a Python type."""
        got = body[key]
        if not isinstance(got, kind):
            raise self.error(f"manifest.{key} is {type(got).__name__}; expected {kind.__name__}")
        return got

    def one(self, kind: type[_T], body: Mapping[str, Any], key: str) -> _T:
        """Build a dataclass from the object at ``key``."""
        return self._build(kind, body[key], key)

    def many(self, kind: type[_T], body: Mapping[str, Any], key: str) -> tuple[_T, ...]:
        """Build one from each object of the list at ``key``."""
        return tuple(self._build(kind, item, f"{key}[{i}]") for i, item in enumerate(self.value(list, body, key)))

    def _build(self, kind: type[_T], got: object, where: str) -> _T:
        found = self.check_keys(kind, got, where)
        values: dict[str, Any] = {}
        for item in fields(kind):  # type: ignore[arg-type]
            value = found[item.name]
            allowed = _KINDS[str(item.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise self.error(f"manifest.{where}.{item.name} is {type(value).__name__}; expected {item.type}")
            element = _ELEMENTS.get(str(item.type))
            if element and any(type(part) is not element for part in found[item.name]):
                raise self.error(f"manifest.{where}.{item.name} is {value}; expected {item.type}")
            values[item.name] = tuple(value) if isinstance(value, list) else value
        try:
            return kind(**values)
        except LayoutError as error:
            raise self.error(f"manifest.{where}: {error}") from error

    def error(self, problem: str) -> ArtifactError:
        """Make the error that a wrong document is met with."""
        return ArtifactError(self.subject, problem, "compile the model again with this version of tvm-ternary")
