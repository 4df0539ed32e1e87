"""Text that every Python brings along: the topics of `help` and the docstrings of the standard library.

Another version of Python has other text, so figures of models trained on it hold for one version.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests, and what may or may not be installed.
SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})
# Shorter ones say little ("Return self."), and say it in many places.
SHORTEST = 80
# One document in so many is held out.
HELD_OUT = 20


def documents() -> list[str]:
    """All texts, each once, in an order that depends on the version of Python only."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(library).parts):
            texts.extend(_docstrings(path))
    # Methods inherit and copy docstrings: one that is held out must not be trained on under another name.
    return [text for text in dict.fromkeys(map(_plain, texts)) if len(text) >= SHORTEST]


def split(texts: list[str]) -> tuple[str, str]:
    """Text to train on and text held out, whole documents each, an empty line between two."""
    held_out = texts[::HELD_OUT]
    rest = [text for i, text in enumerate(texts) if i % HELD_OUT]
    return "\n\n".join(rest), "\n\n".join(held_out)


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        # Some modules hold escapes that a later Python will refuse.
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.expandtabs().strip().splitlines())
