"""A profile read: time by operator and by layer, what share of the roofline that is, and a Chrome trace.

What a call moves at least is its tensors once, what it reads of a table only the rows; what it computes is known where
it multiplies by a layer's weights: two operations for each output and each weight that goes into it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tvm_ternary.analysis.report import Table
from tvm_ternary.files import atomic_path
from tvm_ternary.runtime.manifest import LayerInfo, Manifest
from tvm_ternary.runtime.profile import BUILTIN, Argument, Call, Profile

_COLUMNS = ("calls", "ms", "share", "Gop/s", "GB/s", "roofline")
_INDICES = ("int32", "int64")
_FLOAT_BITS = 32


@dataclass(frozen=True)
class Ceiling:
    """What the machine can do at most.

    Parameters
    ----------
    bandwidth : float
        Bytes a second, read from where the model's weights find room.
    peaks : mapping of int to float
        Bits of the activations -> operations a second.
    """

    bandwidth: float
    peaks: Mapping[int, float]


@dataclass(frozen=True)
class Cost:
    """Of calls that belong together.

    Attributes
    ----------
    calls : int
    seconds : float
    bytes : int
        Moved at least.
    operations : int
        Multiplications and additions by weights; 0 where none are known.
    floor : float
        Seconds that the machine needs at least; 0 without a ceiling.
    """

    calls: int
    seconds: float
    bytes: int
    operations: int
    floor: float

    @classmethod
    def of(cls, call: Call, layer: LayerInfo | None, ceiling: Ceiling | None) -> Cost:
        """Count one call."""
        moved, operations = _bytes(call, layer), _operations(call, layer)
        floor = 0.0
        if ceiling is not None:
            peak = ceiling.peaks[activation_bits(layer)] if operations else 1.0
            floor = max(moved / ceiling.bandwidth, operations / peak)
        return cls(1, call.seconds, moved, operations, floor)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.calls + other.calls,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            self.operations + other.operations,
            self.floor + other.floor,
        )


def activation_bits(layer: LayerInfo | None) -> int:
    """Bits of what a layer's weights are multiplied by."""
    if layer is None or layer.kernel is None:
        return _FLOAT_BITS
    return int("".join(filter(str.isdigit, layer.kernel.rpartition("_a")[2])) or _FLOAT_BITS)


def operators_table(profile: Profile, manifest: Manifest, ceiling: Ceiling | None = None) -> Table:
    """A row a function, the slowest first, and one for the virtual machine: what is left of a run that nobody watches.

    Parameters
    ----------
    profile : Profile
    manifest : Manifest
        Of the model.
    ceiling : Ceiling, optional
        Without it the share of the roofline stays empty.
    """
    kernels = {function.name: function.kernel or "" for function in manifest.functions}
    costs = _grouped(profile, manifest, ceiling, lambda call: call.function)
    own = {name: cost for name, cost in costs.items() if not name.startswith(BUILTIN)}
    rows = [(name, kernels.get(name, ""), *_cells(cost, profile)) for name, cost in _slowest_first(own)]
    # Its calls are too short to be timed by a clock that takes as long.
    calls = sum(cost.calls for cost in costs.values()) - sum(cost.calls for cost in own.values())
    left = max(profile.seconds - sum(cost.seconds for cost in own.values()), 0.0)
    rows.append(("virtual machine", "", str(calls), f"{1e3 * left:.3f}", _share(left, profile), "", "", ""))
    return Table(("operator", "kernel", *_COLUMNS), tuple(rows), frozenset(range(2, 8)))


def layers_table(profile: Profile, manifest: Manifest, ceiling: Ceiling | None = None) -> Table:
    """A row a layer whose weights a call reads, in the order of the model; with fused calls all that is in them."""
    costs = _grouped(profile, manifest, ceiling, lambda call: call.layer)
    costs.pop("", None)
    rows = tuple((name, *_cells(cost, profile)) for name, cost in costs.items())
    return Table(("layer", *_COLUMNS), rows, frozenset(range(1, 7)))


def as_document(profile: Profile, manifest: Manifest, ceiling: Ceiling | None = None) -> dict[str, Any]:
    """The profile for machines: the run, and each call with its cost."""
    layers = {layer.name: layer for layer in manifest.layers}
    calls = []
    for call in profile.calls:
        cost = Cost.of(call, layers.get(call.layer), ceiling)
        one = {"function": call.function, "layer": call.layer or None, "seconds": call.seconds, "start": call.start}
        calls.append({**one, "bytes": cost.bytes, "operations": cost.operations, "floor": cost.floor or None})
    return {"seconds": profile.seconds, "runs": profile.runs, "calls": calls}


def write_trace(profile: Profile, path: Path) -> None:
    """Write one run as a Chrome trace, for chrome://tracing or Perfetto; microseconds.

    References
    ----------
    Trace Event Format, complete events ("ph": "X").
    """
    events = [
        {
            "name": call.function,
            "cat": "machine" if call.function.startswith(BUILTIN) else "operator",
            "ph": "X",
            "ts": 1e6 * call.start,
            "dur": 1e6 * call.seconds,
            "pid": 0,
            "tid": 0,
            "args": {"layer": call.layer, "tensors": [_shown(argument) for argument in call.arguments]},
        }
        for call in profile.calls
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _grouped(
    profile: Profile, manifest: Manifest, ceiling: Ceiling | None, key: Callable[[Call], str]
) -> dict[str, Cost]:
    layers = {layer.name: layer for layer in manifest.layers}
    costs: dict[str, Cost] = {}
    for call in profile.calls:
        cost, name = Cost.of(call, layers.get(call.layer), ceiling), key(call)
        costs[name] = costs[name] + cost if name in costs else cost
    return costs


def _slowest_first(costs: Mapping[str, Cost]) -> Iterable[tuple[str, Cost]]:
    return sorted(costs.items(), key=lambda item: -item[1].seconds)


def _cells(cost: Cost, profile: Profile) -> tuple[str, ...]:
    return (
        str(cost.calls),
        f"{1e3 * cost.seconds:.3f}",
        _share(cost.seconds, profile),
        f"{cost.operations / cost.seconds / 1e9:.0f}" if cost.operations and cost.seconds else "",
        f"{cost.bytes / cost.seconds / 1e9:.1f}" if cost.bytes and cost.seconds else "",
        f"{100 * cost.floor / cost.seconds:.0f}%" if cost.floor and cost.seconds else "",
    )


def _share(seconds: float, profile: Profile) -> str:
    return f"{100 * seconds / profile.seconds:.1f}%"


def _operations(call: Call, layer: LayerInfo | None) -> int:
    """Two for each output and weight that goes into it; none where rows of a table are read by their numbers."""
    if layer is None or len(layer.shape) < 2 or not call.arguments or _reads_rows(call, layer):
        return 0
    return 2 * prod(call.arguments[-1].shape) * prod(layer.shape[1:])


def _reads_rows(call: Call, layer: LayerInfo) -> bool:
    return layer.kernel is None and any(argument.dtype in _INDICES for argument in call.arguments)


def _bytes(call: Call, layer: LayerInfo | None) -> int:
    """Every tensor once. Of a table the rows that are read; they are as large as what is written."""
    if call.function.startswith(BUILTIN):
        return 0
    moved = sum(map(_size, call.arguments))
    if layer is not None and _reads_rows(call, layer):
        tables = (argument for argument in call.arguments if argument.shape[:1] == layer.shape[:1])
        moved += _size(call.arguments[-1]) - sum(map(_size, tables))
    return moved


def _size(argument: Argument) -> int:
    return prod(argument.shape) * np.dtype(argument.dtype).itemsize


def _shown(argument: Argument) -> str:
    return f"{argument.dtype}[{', '.join(map(str, argument.shape))}]"
