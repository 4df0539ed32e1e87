"""How much of attention is left over keys and values of a few ternary planes, and how few planes are enough."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from tvm_ternary.convert.batches import Arrays, Batches
from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.convert.stream import Progress
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.call_attention import AttentionCall, call_attention
from tvm_ternary.graph.passes.cut import cut
from tvm_ternary.kernels.attention import AXES, Attention
from tvm_ternary.kernels.rounded_attention import Rounding, rounded_attention, sight
from tvm_ternary.kernels.ternary_keys import BLOCK, STEPS

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Attend = Callable[[int, Floats, Floats, Floats, Floats | None], Doubles]
"""From an attention's number and one sequence's q, k, v (heads, tokens, elements) and mask to (heads, queries, ...)."""
Errors = dict[str, dict[int, dict[int, float]]]
"""Attention's name -> head of keys -> planes -> relative error."""

PLANES = tuple(STEPS)
_FUNCTION = "tvm_ternary.convert.attention"
_FLOAT = Rounding(0, 0)


class CalledAttention:
    """A float model whose attentions a function of Python computes.

    Parameters
    ----------
    model : ImportedModel
    runner : SegmentRunner, optional

    Attributes
    ----------
    calls : tuple of AttentionCall
        The attentions that were found, by their numbers.
    """

    def __init__(self, model: ImportedModel, runner: SegmentRunner | None = None) -> None:
        self.model, self.calls = call_attention(model, _FUNCTION)
        self._segments = cut(self.model.module)
        self._runner = runner or SegmentRunner()
        tvm_ffi.register_global_func(_FUNCTION, _attend, override=True)

    def run(self, samples: Sequence[Arrays], attend: Attend, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Run the model.

        Parameters
        ----------
        samples : sequence of mappings of str to array
            Inputs by name, each of one sequence.
        attend : callable
        progress : callable, optional
            Told of each segment.

        Returns
        -------
        list of dict of str to array
            The outputs of each sample.

        Raises
        ------
        InputError
            If there is no sample, or one does not fit the model.
        """
        # Samples of one shape run together; with them in a row, what comes out is in the order of what went in.
        shapes = [tuple(np.shape(sample.get(spec.name, ())) for spec in self.model.inputs) for sample in samples]
        order = sorted(range(len(samples)), key=lambda n: shapes.index(shapes[n]))
        batches = Batches(self.model, self._segments, [samples[n] for n in order], self._runner)
        with _computed_by(self.calls, attend):
            for number, segment in enumerate(self._segments.segments):
                batches.advance(segment, {name: self.model.params[name] for name in segment.matrices})
                if progress is not None:
                    progress("attention", number + 1, len(self._segments.segments))
        results = batches.values(self._segments.result)
        outputs = _split([[np.from_dlpack(one) for one in result] for result in results], len(samples))
        names = [spec.name for spec in self.model.outputs]
        found = {n: dict(zip(names, arrays, strict=True)) for n, arrays in zip(order, outputs, strict=True)}
        return [found[n] for n in range(len(samples))]


def attention_errors(
    model: ImportedModel,
    samples: Sequence[Arrays],
    *,
    planes: Collection[int] = PLANES,
    window: int = BLOCK,
    values: bool = True,
    rotated: bool = False,
    runner: SegmentRunner | None = None,
    progress: Progress | None = None,
) -> Errors:
    """Measure how far rounded keys and values move what each head of them gives, everything before it in float.

    Parameters
    ----------
    model : ImportedModel
    samples : sequence of mappings of str to array
        Inputs by name, each of one sequence. They should be as long as what the model will be used for: of a text
        shorter than a window and a block nothing is packed.
    planes : collection of int
    window, rotated
        As of `Rounding`.
    values : bool
        Whether values get as many planes as keys; otherwise they stay float.
    runner : SegmentRunner, optional
    progress : callable, optional
        Told of each segment.

    Returns
    -------
    dict
        Attention's name -> head of keys -> planes -> ``||out - exact|| / ||exact||``, over all samples, the queries
        that see something packed and the heads of queries that share it. NaN where no query sees any.

    Raises
    ------
    InputError
        If there is no sample, or one does not fit the model.
    """
    called = CalledAttention(model, runner)
    # Squares of errors, and of what is exact.
    sums = [{p: np.zeros((2, call.shape.kv_heads)) for p in planes} for call in called.calls]

    def attend(number: int, q: Floats, k: Floats, v: Floats, mask: Floats | None) -> Doubles:
        scale = called.calls[number].shape.scale
        seen = sight(mask, q.shape[1], k.shape[1], window)
        exact = rounded_attention(q, k, v, scale, mask, _FLOAT, seen)
        counted = seen.packed > 0
        for p, total in sums[number].items():
            rounding = Rounding(p, p if values else 0, window, rotated)
            moved = rounded_attention(q, k, v, scale, mask, rounding, seen) - exact
            for row, array in zip(total, (moved, exact), strict=True):
                row += np.square(array[:, counted]).reshape(len(row), -1).sum(axis=1)
        return exact

    called.run(samples, attend, progress)
    return {
        call.name: {
            head: {p: _ratio(*total[:, head]) for p, total in of_planes.items()} for head in range(call.shape.kv_heads)
        }
        for call, of_planes in zip(called.calls, sums, strict=True)
    }


def choose_planes(errors: Errors, budget: float) -> dict[str, int]:
    """The fewest planes of each attention with which none of its heads is above a budget; 0, for float, where none are.

    What was not measured, NaN, is above any.
    """
    chosen = {}
    for name, heads in errors.items():
        known = sorted(set.intersection(*(set(of_planes) for of_planes in heads.values())))
        enough = (p for p in known if all(of_planes[p] <= budget for of_planes in heads.values()))
        chosen[name] = next(enough, 0)
    return chosen


def _ratio(moved: float, exact: float) -> float:
    if np.isnan(moved) or np.isnan(exact):
        return math.nan
    if exact == 0:
        return math.inf if moved else math.nan
    return math.sqrt(moved / exact)


def _split(results: Sequence[Sequence[npt.NDArray[Any]]], count: int) -> list[list[npt.NDArray[Any]]]:
    """The outputs of each sample, of those of batches."""
    if len(results) == count:
        return [list(result) for result in results]
    return [[one[n : n + 1] for one in result] for result in results for n in range(len(result[0]))]


# What computes attention now. One at a time: TVM looks functions up by name, and keeps what it found.
_lock = threading.Lock()
_current: list[tuple[Sequence[AttentionCall], Attend]] = []


@contextmanager
def _computed_by(calls: Sequence[AttentionCall], attend: Attend) -> Iterator[None]:
    with _lock:
        _current.append((calls, attend))
        try:
            yield
        finally:
            _current.pop()


def _attend(number: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
    """What the compiled code calls: ``rest`` is a mask, if there is one, and the output."""
    calls, attend = _current[-1]
    n = int(np.from_dlpack(number)[0])
    shape: Attention = calls[n].shape
    layouts = (shape.query, shape.key, shape.value, shape.out)
    q, k, v, out = (_by_heads(np.from_dlpack(x), axes) for x, axes in zip((q, k, v, rest[-1]), layouts, strict=True))
    mask = np.from_dlpack(rest[0]) if len(rest) > 1 else None
    for b in range(len(q)):
        out[b] = attend(n, q[b], k[b], v[b], None if mask is None else mask[b if len(mask) > 1 else 0])


def _by_heads(x: npt.NDArray[Any], layout: str) -> npt.NDArray[Any]:
    """A view with the axes in the order of `AXES`."""
    view = x.transpose([layout.index(axis) for axis in AXES if axis in layout])
    return view if "h" in layout else view[:, None]
