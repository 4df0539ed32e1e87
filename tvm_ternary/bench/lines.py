"""Benchmark results as lines of JSON: written as they come, read back for tables and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_ternary.bench.measurement import Measurement
from tvm_ternary.bench.roofline import Limits
from tvm_ternary.errors import InputError, OutputError

_FACTS = ("cpu", "caches", "load", "system", "python", "versions", "commit")
_HINT = "give a file that 'tvm-ternary bench matmul --json' wrote"


@dataclass(frozen=True)
class Results:
    """What a file of lines holds.

    Attributes
    ----------
    facts : dict
        What `machine_facts` said when the last line was written.
    measurements : tuple of Measurement
        Of several measurements of the same case the last one.
    limits : dict of (str, int) to Limits
        Target and threads -> the roofline measured last.
    """

    facts: dict[str, Any]
    measurements: tuple[Measurement, ...]
    limits: dict[tuple[str, int], Limits]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})", "choose another") from error


def read_lines(path: Path) -> Results:
    """Read a file of lines.

    Raises
    ------
    InputError
        If the file cannot be read, a line is not one of ours, there is no measurement, or several processors were
        measured.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read ({error})", _HINT) from error
    measurements: dict[tuple[Any, ...], Measurement] = {}
    limits: dict[tuple[str, int], Limits] = {}
    facts: dict[str, dict[str, Any]] = {}
    for number, content in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(content)
            if line["benchmark"] == "roofline":
                limits[line["target"], line["threads"]] = Limits.from_json(line)
            else:
                one = Measurement.from_json(line)
                key = (one.n, one.k, one.m, one.scheme, one.cache, one.threads, one.target)
                measurements[key] = one
            facts[line["cpu"]] = {name: line[name] for name in _FACTS}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {number}", f"is not a benchmark's ({error!r})", _HINT) from error
    if not measurements:
        raise InputError(str(path), "holds no measurement", _HINT)
    if len(facts) > 1:
        raise InputError(str(path), f"is about several processors ({', '.join(facts)}); expected one", "divide it")
    return Results(next(iter(facts.values())), tuple(measurements.values()), limits)
