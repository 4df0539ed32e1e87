"""Dimensions that are sums of others: ``past + length``, the keys that a step of a decoder sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_PLUS = " + "


def terms(text: str) -> Sequence[str]:
    """What a dimension is the sum of, names and numbers; nothing for one that stands for itself."""
    parts = text.split(_PLUS)
    return parts if len(parts) > 1 else ()


def sum_of(text: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a sum, None where the text is none or a term has no size."""
    total = 0
    for term in terms(text):
        size = int(term) if term.isdecimal() else sizes.get(term)
        if size is None:
            return None
        total += size
    return total if terms(text) else None
