"""Options that several verbs have."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from tvm_ternary.cli.text import write_out
from tvm_ternary.errors import InputError, OptionError

MAX_DIMENSION = 2**31 - 1


def add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add the parser of a verb whose help ends with examples."""
    return verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def parse_pairs(option: str, items: Sequence[str], example: str) -> dict[str, str]:
    """Read ``NAME=VALUE`` items; the first ``=`` divides.

    Raises
    ------
    OptionError
        If an item is no such pair or a name is given twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise OptionError(option, f"got {item!r}; expected NAME=VALUE", f"for example {option} {example}")
        if name in pairs:
            raise OptionError(option, f"{name!r} is given twice: {pairs[name]} and {value}", "give it once")
        pairs[name] = value
    return pairs


def whole_number(option: str, name: str, text: str) -> int:
    """Read a whole number that a dimension can be.

    Raises
    ------
    OptionError
        If it is none.
    """
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > MAX_DIMENSION:
        raise OptionError(option, f"{name} is {text!r}; expected a whole number from 0 to {MAX_DIMENSION}")
    return int(text)


def size_or_name(option: str, name: str, text: str) -> int | str:
    """Read what a dimension is to be: a whole number, or else the name of another one, or arithmetic."""
    return whole_number(option, name, text) if re.fullmatch(r"[+-]?[0-9.]+", text) else text


def parse_value(text: str) -> Any:
    """Read a number, true or false; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def constant(name: str, text: str) -> Any:
    """Read the value of ``--constant``: a number, a bool or a list of them, as an array.

    Raises
    ------
    InputError
        If it is none.
    """
    import numpy as np

    try:
        array = np.asarray(json.loads(text))
    except ValueError:
        array = np.asarray(text)
    if array.dtype.kind not in "bif":
        problem = f"{name} is {text!r}; expected a number, true, false, or a list of them with equal rows"
        raise InputError("--constant", problem, "for example sr=16000")
    return array


def print_json(document: object) -> None:
    """Print a document for machines, keys in a fixed order."""
    write_out(json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")
