"""Calibrate: gather what each matrix multiplies while the matrices before it are quantized one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.convert.batches import Arrays, Batches
from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.cut import Segment, Segments, cut
from tvm_ternary.quantize.observers import Observer, Statistics

Floats = npt.NDArray[np.float32]
Quantize = Callable[[tuple[str, ...], Statistics], Mapping[str, Floats]]
"""Gives the (K, N) float32 weights to go on with, for matrices that share an input and the statistics of it."""
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how many of its steps are done, and of how many."""


def calibrate(
    model: ImportedModel,
    samples: Sequence[Arrays],
    quantize: Quantize,
    *,
    wanted: Collection[str] | None = None,
    hessian: bool = True,
    percentiles: bool = False,
    original: ImportedModel | None = None,
    runner: SegmentRunner | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the model once, quantizing every matrix just before its first use.

    So each is fitted to the inputs it will have in the quantized model, but for the rounding of activations. A matrix
    with several different inputs, as in a recurrent layer, has to be quantized before it has met them: its statistics
    are of all of them in the float model, which is run before, as far as that takes.

    In memory are the weights of one segment and, of all samples, what lives between two segments. Weights are asked for
    when their segment comes and let go behind it; only those of a matrix with several inputs stay until its last.

    Parameters
    ----------
    model : ImportedModel
    samples : sequence of mappings of str to array
        Inputs by name, as `load_samples` gives them.
    quantize : callable
        Called for each group of matrices that share all their inputs, in the order of their first use.
    wanted : collection of str, optional
        Matrices that are of interest; groups without any are not observed and stay as they are. None: all.
    hessian, percentiles : bool
        What to gather beside means and magnitudes, as for `Observer`.
    original : ImportedModel, optional
        The same model in float. It is run beside, for how far inputs have moved away from its; twice the runs and
        what lives.
    runner : SegmentRunner, optional
        One that has compiled some of the segments already.
    progress : callable, optional
        Told of each segment.

    Raises
    ------
    InputError
        If there is no sample, one does not fit the model, or an activation is NaN or infinite.
    """
    segments = cut(model.module)
    groups = [group for group in _groups(segments) if wanted is None or not group.names.isdisjoint(wanted)]
    again = [group for group in groups if len(group.uses) > 1]
    steps = (1 if original is None else 2) * len(segments.segments) + max(
        (group.uses[-1] + 1 for group in again), default=0
    )
    walk = _Walk(model, segments, samples, runner or SegmentRunner(), _Counter(progress, steps))
    observe = _Observe(hessian, percentiles)
    gathered = walk.gather(again, observe) if again else {}
    walk.quantize(groups, gathered, observe, quantize, original)


@dataclass(frozen=True)
class _Group:
    """Matrices that have all their inputs in common, and the numbers of the segments that use them."""

    matrices: tuple[str, ...]
    uses: tuple[int, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.matrices)


def _groups(segments: Segments) -> list[_Group]:
    uses: defaultdict[str, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments.segments):
        for name in segment.matrices:
            uses[name].append(number)
    groups: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, numbers in uses.items():
        groups[tuple(numbers)].append(name)
    return [_Group(tuple(names), numbers) for numbers, names in groups.items()]


@dataclass
class _Counter:
    progress: Progress | None
    total: int
    done: int = 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress("calibrate", self.done, self.total)


@dataclass(frozen=True)
class _Observe:
    """Makes observers that gather the same."""

    hessian: bool
    percentiles: bool

    def start(self, group: _Group, features: int) -> Observer:
        name = f"the input of {group.matrices[0]}"
        return Observer(features, hessian=self.hessian, percentiles=self.percentiles, name=name)

    def all(
        self, group: _Group, features: int, rows: Iterable[Floats], originals: Iterable[Floats] | None
    ) -> Statistics:
        observer = self.start(group, features)
        if originals is None:
            for x in rows:
                observer.update(x)
        else:
            for x, original in zip(rows, originals, strict=True):
                observer.update(x, original)
        return observer.statistics()


class _Walk:
    """Takes the samples through the segments."""

    def __init__(
        self,
        model: ImportedModel,
        segments: Segments,
        samples: Sequence[Arrays],
        runner: SegmentRunner,
        counter: _Counter,
    ) -> None:
        self.model, self.segments, self.samples = model, segments, samples
        self.runner, self.counter = runner, counter

    def gather(self, groups: Sequence[_Group], observe: _Observe) -> dict[_Group, Statistics]:
        """Statistics of all inputs of some groups in the float model."""
        observers = {group: observe.start(group, self._features(group)) for group in groups}
        batches = self._batches()
        for number, segment in enumerate(self.segments.segments[: max(group.uses[-1] for group in groups) + 1]):
            for group, observer in observers.items():
                if number in group.uses:
                    for x in batches.rows(segment):
                        observer.update(x)
            self._advance(batches, segment, {})
        return {group: observer.statistics() for group, observer in observers.items()}

    def quantize(
        self,
        groups: Sequence[_Group],
        gathered: dict[_Group, Statistics],
        observe: _Observe,
        quantize: Quantize,
        original: ImportedModel | None,
    ) -> None:
        """Quantize the groups in order, each with its statistics or what it multiplies by now."""
        by_segment: defaultdict[int, list[_Group]] = defaultdict(list)
        for group in groups:
            for number in group.uses:
                by_segment[number].append(group)
        batches = self._batches()
        twin = self._batches() if original is not None else None
        kept: dict[_Group, Mapping[str, Floats]] = {}
        for number, segment in enumerate(self.segments.segments):
            weights: dict[str, Floats] = {}
            for group in by_segment[number]:
                if number == group.uses[0]:
                    statistics = gathered.pop(group, None)
                    if statistics is None:
                        originals = None if twin is None else twin.rows(segment)
                        statistics = observe.all(group, self._features(group), batches.rows(segment), originals)
                    kept[group] = quantize(group.matrices, statistics)
                weights |= kept[group]
                if number == group.uses[-1]:
                    del kept[group]
            if twin is not None and original is not None:
                self._advance(twin, segment, {name: original.params[name] for name in segment.matrices})
            self._advance(batches, segment, weights)

    def _batches(self) -> Batches:
        return Batches(self.model, self.segments, self.samples, self.runner)

    def _features(self, group: _Group) -> int:
        return self.model.shapes[group.matrices[0]][1]

    def _advance(self, batches: Batches, segment: Segment, weights: Mapping[str, Floats]) -> None:
        rest = {name: self.model.params[name] for name in segment.matrices if name not in weights}
        batches.advance(segment, {**weights, **rest})
        self.counter.step()
