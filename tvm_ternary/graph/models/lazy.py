"""Values by name, each read when it is asked for and not kept: a model larger than memory passes through one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class Lazy(Mapping[str, Value]):
    """A mapping whose values are read anew every time, in the order in which their readers were added."""

    def __init__(self) -> None:
        self._readers: dict[str, Callable[[], Value]] = {}

    def add(self, name: str, read: Callable[[], Value]) -> None:
        """Say how a value is read."""
        self._readers[name] = read

    def __getitem__(self, name: str) -> Value:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
