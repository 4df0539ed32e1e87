"""Samples on their way through the segments of a model."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.convert.float_model import SegmentRunner, to_tensors
from tvm_ternary.errors import InputError
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.cut import Segment, Segments
from tvm_ternary.graph.passes.index_limits import index_limits
from tvm_ternary.runtime.inputs import check_inputs

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]

# A batch is large enough to keep the cores busy, and small beside what lives of all of them.
_SAMPLES, _POSITIONS, _ELEMENTS = 64, 2048, 1 << 16
_BATCH = re.compile(r"(.*[^a-z])?(batch|n|b)([^a-z].*)?", re.IGNORECASE)


class Batches:
    """What lives between two segments, of all samples.

    Samples of equal shapes run together, where the model's dimensions say that it takes several at once. None is padded
    for that: what a padded position holds would count as if some user had sent it.

    Parameters
    ----------
    model : ImportedModel
    segments : Segments
        Of its module.
    samples : sequence of mappings of str to array
        Inputs by name.
    runner : SegmentRunner

    Raises
    ------
    InputError
        If there is no sample, or one does not fit the model; says which.
    """

    def __init__(
        self, model: ImportedModel, segments: Segments, samples: Sequence[Arrays], runner: SegmentRunner
    ) -> None:
        self._runner = runner
        self._live: list[dict[str, Any]] = []
        self._dimensions: list[list[int]] = []
        for batch in _batches(model, _checked(model, samples)):
            self._live.append(dict(zip(segments.inputs, to_tensors(batch, list(batch)), strict=True)))
            shapes = [array.shape for array in batch.values()]
            self._dimensions.append([place.size(shapes[place.input][place.axis]) for place in segments.dimensions])

    def rows(self, segment: Segment) -> Iterator[Floats]:
        """What the segment's matrices multiply, (M, K) of each batch; views, to be read before `advance`."""
        assert segment.x is not None
        for live in self._live:
            x = np.from_dlpack(live[segment.x])
            yield np.asarray(x.reshape(-1, x.shape[-1]), np.float32)

    def advance(self, segment: Segment, weights: Arrays) -> None:
        """Run the segment, with (K, N) weights, and let go of what nobody needs any more."""
        tensors = to_tensors(weights, segment.matrices)
        for live, dimensions in zip(self._live, self._dimensions, strict=True):
            outputs = self._runner.run(segment, dimensions, [live[name] for name in segment.inputs], tensors)
            for name in segment.dead:
                del live[name]
            live.update(zip(segment.outputs, outputs, strict=True))

    def copy(self) -> Batches:
        """Another walker from here on; what lives is shared, as nobody writes into it."""
        other = copy.copy(self)
        other._live = [dict(live) for live in self._live]
        return other

    def values(self, name: str) -> list[Any]:
        """One value of each batch, such as the model's result."""
        return [live[name] for live in self._live]


def _checked(model: ImportedModel, samples: Sequence[Arrays]) -> list[dict[str, npt.NDArray[Any]]]:
    if not samples:
        raise InputError("calibration data", "has no sample; expected one at least")
    names = [spec.name for spec in model.inputs]
    limits = index_limits(model.module)
    checked = []
    for number, sample in enumerate(samples):
        try:
            arrays = check_inputs(model.inputs, sample, model.bounds)
        except InputError as error:
            raise InputError(f"sample {number}, {error.subject}", error.problem, error.hint) from error
        _require_rows(number, dict(zip(names, arrays, strict=True)), limits)
        checked.append(dict(zip(names, arrays, strict=True)))
    return checked


def _require_rows(number: int, sample: Arrays, limits: Mapping[str, int]) -> None:
    for name, rows in limits.items():
        outside = sample[name][(sample[name] < 0) | (sample[name] >= rows)]
        if outside.size:
            problem = f"holds {outside[0]}; expected 0 to {rows - 1}, as the model's table has {rows} rows"
            raise InputError(f"sample {number}, input {name!r}", problem, "is it the tokenizer of another model?")


def _batches(
    model: ImportedModel, samples: Sequence[dict[str, npt.NDArray[Any]]]
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Samples of equal shapes along the first axis, in the order of the first of each shape."""
    if not _takes_batches(model):
        yield from samples
        return
    groups: dict[Any, list[dict[str, npt.NDArray[Any]]]] = {}
    for sample in samples:
        groups.setdefault(tuple(array.shape for array in sample.values()), []).append(sample)
    for group in groups.values():
        size = _batch_size(model, group[0])
        for start in range(0, len(group), size):
            chosen = group[start : start + size]
            yield {name: np.concatenate([sample[name] for sample in chosen]) for name in chosen[0]}


def _takes_batches(model: ImportedModel) -> bool:
    """Whether every input and output begins with one symbolic dimension that is called a batch; others are lengths."""
    first = {spec.shape[0] if spec.shape else None for spec in (*model.inputs, *model.outputs)}
    name = next(iter(first)) if len(first) == 1 else None
    return isinstance(name, str) and name not in model.bounds and _BATCH.fullmatch(name) is not None


def _batch_size(model: ImportedModel, sample: Arrays) -> int:
    sizes = {
        dim: int(size)
        for spec in model.inputs
        for dim, size in zip(spec.shape, sample[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    elements = max(int(array.size) for array in sample.values())
    batch = int(sample[model.inputs[0].name].shape[0])
    positions = math.prod(sizes.values())
    return max(1, min(_SAMPLES // batch, _POSITIONS // positions, _ELEMENTS // max(1, elements)))
