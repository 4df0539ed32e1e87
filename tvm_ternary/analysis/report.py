"""What an artifact says about itself, as tables of text. The command line prints them; nothing here does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.runtime.manifest import LayerInfo, Manifest, TensorSpec
from tvm_ternary.runtime.model_cache import ModuleCacheStats
from tvm_ternary.runtime.module import Timing

_KIB = 1024
_FLOAT_BYTES = 4
_LAYER_COLUMNS = (
    "matrix",
    "N x K",
    "became",
    "bits/weight",
    "kernel",
    "layout",
    "epilogue",
    "schedule",
    "error",
    "why float",
)
_LAYER_NUMBERS = ("bits/weight", "error")


@dataclass(frozen=True)
class Table:
    """A table of text.

    Parameters
    ----------
    columns : tuple of str
        Headings; all empty for a table of facts, a name and a value a row.
    rows : tuple of tuple of str
        As many cells a row as there are columns.
    numeric : frozenset of int
        Positions of the columns that are aligned to the right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()


def layers_table(layers: Sequence[LayerInfo]) -> Table:
    """A row for every matrix: what it became, and by which kernel, layout and schedule; or why it stayed float.

    The error is relative: the Frobenius norm of (what it became - float) over that of float. A column in which every
    cell would be empty is left out.
    """
    rows = [_layer_row(layer) for layer in layers]
    used = [i for i in range(len(_LAYER_COLUMNS)) if any(row[i] for row in rows) or not rows]
    return Table(
        tuple(_LAYER_COLUMNS[i] for i in used),
        tuple(tuple(row[i] for i in used) for row in rows),
        frozenset(position for position, i in enumerate(used) if _LAYER_COLUMNS[i] in _LAYER_NUMBERS),
    )


def _layer_row(layer: LayerInfo) -> tuple[str, ...]:
    return (
        layer.name,
        " x ".join(map(str, layer.shape)),
        layer.scheme or layer.became,
        f"{layer.bits_per_weight:.2f}",
        layer.kernel or "",
        layer.layout or "",
        layer.epilogue or "",
        layer.schedule,
        "" if layer.error is None else f"{layer.error:.4f}",
        layer.reason or "",
    )


def summary_table(manifest: Manifest, file_bytes: int, seconds: Mapping[str, float]) -> Table:
    """What compiling came to: matrices, sizes before and after, time.

    Parameters
    ----------
    manifest : Manifest
    file_bytes : int
        Size of the ``.so``.
    seconds : mapping of str to float
        Time by stage.
    """
    stages = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return _facts(
        ("matrices", _counts(manifest.layers)),
        *_sizes(manifest),
        ("file", format_bytes(file_bytes)),
        ("time", f"{sum(seconds.values()):.1f} s ({stages})"),
    )


def facts_table(manifest: Manifest, file_bytes: int, missing_features: Sequence[str] | None) -> Table:
    """What an artifact is: model, target and what it asks of the host, versions, sizes, checksum.

    Parameters
    ----------
    manifest : Manifest
    file_bytes : int
        Size of the ``.so``.
    missing_features : sequence of str, optional
        CPU features needed that this host lacks. None: it is not known what the host has.
    """
    model, target, weights = manifest.model, manifest.target, manifest.weights
    return _facts(
        ("model", model.name),
        ("made from", model.file),
        ("its SHA-256", model.sha256),
        ("scheme", manifest.scheme),
        ("matrices", _counts(manifest.layers)),
        *_sizes(manifest),
        ("weights lie", "inside the file" if weights.file is None else f"beside it, in {weights.file}"),
        ("their SHA-256", weights.sha256),
        ("file", format_bytes(file_bytes)),
        *((f"largest {name}", str(most)) for name, most in sorted(manifest.bounds.items())),
        ("target", target.name),
        ("needs", " ".join(target.features) or "no particular CPU feature"),
        ("this host", _host(missing_features)),
        ("made by", ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))),
    )


def specs_table(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Table:
    """The inputs, then the outputs, as declared: a name among the dimensions is one that the caller chooses."""
    rows = [("input", spec) for spec in inputs] + [("output", spec) for spec in outputs]
    return Table(
        ("", "name", "dtype", "shape"), tuple((kind, spec.name, spec.dtype, _shape(spec.shape)) for kind, spec in rows)
    )


def functions_table(manifest: Manifest) -> Table:
    """A row for every compiled function: the kernel it is, if it is one of ours, and who scheduled it."""
    rows = tuple((item.name, item.kernel or "", item.schedule) for item in manifest.functions)
    return Table(("function", "kernel", "schedule"), rows)


@dataclass(frozen=True)
class ArrayStats:
    """What is seen of an array at a glance.

    Parameters
    ----------
    name, dtype : str
    shape : tuple of int
    minimum, mean, maximum : float or None
        Over the finite elements, in float64; None if there are none.
    finite : int
        How many elements are finite.
    size : int
        How many elements there are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    minimum: float | None
    mean: float | None
    maximum: float | None
    finite: int
    size: int


def array_stats(name: str, array: npt.NDArray[Any]) -> ArrayStats:
    """Summarise an array of floats, integers or bools."""
    values = array[np.isfinite(array)]
    low, mean, high = (
        (float(values.min()), float(values.mean(dtype=np.float64)), float(values.max()))
        if values.size
        else (None, None, None)
    )
    return ArrayStats(name, array.dtype.name, array.shape, low, mean, high, int(values.size), int(array.size))


def outputs_table(stats: Sequence[ArrayStats]) -> Table:
    """A row for every output of a run."""
    rows = tuple(
        (
            item.name,
            item.dtype,
            _shape(item.shape),
            *("" if value is None else f"{value:.6g}" for value in (item.minimum, item.mean, item.maximum)),
            "yes" if item.finite == item.size else f"no: {item.size - item.finite} of {item.size} are not",
        )
        for item in stats
    )
    return Table(("output", "dtype", "shape", "min", "mean", "max", "finite"), rows, frozenset({3, 4, 5}))


def timing_table(timing: Timing, threads: int) -> Table:
    """How long a run takes."""
    columns = ("runs", "threads", "median ms", "p20 ms", "p80 ms")
    row = (str(len(timing.runs)), str(threads), *(f"{1e3 * s:.3f}" for s in (timing.median, timing.p20, timing.p80)))
    return Table(columns, (row,), frozenset(range(len(columns))))


def attentions_tables(manifest: Manifest) -> list[Table]:
    """A row for every attention with a mode of its own: how keys and values are kept, and why; none where none has."""
    rows = [
        (c.name, c.mode, _planes(c.window, c.key_planes, c.value_planes), _window(c.window), c.reason or "as asked for")
        for c in manifest.caches
    ] + [
        (a.name, a.mode, _planes(a.window, a.key_planes, 0), _window(a.window), a.reason or "as asked for")
        for a in manifest.attentions
    ]
    columns = ("attention", "mode", "planes of k, v", "float window", "why")
    return [Table(columns, tuple(rows))] if rows else []


def cache_tables(stats: ModuleCacheStats) -> list[Table]:
    """What a module keeps now: all together, and a row for every attention."""
    used = stats.bytes / max(stats.float_bytes, 1)
    facts = _facts(
        ("cached", f"{stats.tokens} of {stats.capacity} tokens, batch {stats.batch}"),
        ("cache", f"{format_bytes(stats.bytes)}, {used:.2f} of float32's {format_bytes(stats.float_bytes)}"),
    )
    rows = [
        (
            layer.name,
            layer.mode,
            _planes(layer.window if layer.window < stats.capacity else None, layer.key_planes, layer.value_planes),
            str(layer.window),
            str(layer.float_tokens),
            str(layer.packed_tokens),
            format_bytes(layer.bytes),
            layer.reason,
        )
        for layer in stats.layers
    ]
    columns = ("attention", "mode", "planes of k, v", "window", "float", "packed", "memory", "why")
    return [Table(columns, tuple(rows), frozenset({3, 4, 5, 6})), facts]


def _planes(window: int | None, keys: int, values: int) -> str:
    return "float" if window is None else f"{keys}, {values or 'float'}"


def _window(window: int | None) -> str:
    return "all" if window is None else str(window)


def format_bytes(count: int) -> str:
    """Write a size for a reader: ``917 B``, ``65.9 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < _KIB or unit == "GiB":
            break
        size /= _KIB
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _facts(*rows: tuple[str, str]) -> Table:
    return Table(("", ""), rows)


def _counts(layers: Sequence[LayerInfo]) -> str:
    ternary, int8 = (sum(layer.became == kind for layer in layers) for kind in ("ternary", "int8"))
    tables = f"{int8} int8, " if int8 else ""
    return f"{ternary} ternary, {tables}{len(layers) - ternary - int8} left in float"


def _sizes(manifest: Manifest) -> list[tuple[str, str]]:
    ternary = [layer for layer in manifest.layers if layer.became == "ternary"]
    count = [math.prod(layer.shape) for layer in ternary]
    packed = sum(n * layer.bits_per_weight / 8 for n, layer in zip(count, ternary, strict=True))
    sizes = manifest.sizes
    return [
        ("all weights", _shrunk(sizes.weights_before, sizes.weights_after)),
        ("ternary ones", _shrunk(_FLOAT_BYTES * sum(count), round(packed))),
    ]


def _shrunk(before: int, after: int) -> str:
    ratio = f", {before / after:.1f} times smaller" if after else ""
    return f"{format_bytes(before)} before, {format_bytes(after)} after{ratio}"


def _host(missing: Sequence[str] | None) -> str:
    if missing is None:
        return "its CPU features are not known"
    return f"lacks {' '.join(missing)}" if missing else "has all of them"


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
