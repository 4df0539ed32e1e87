"""Choose planes and group sizes matrix by matrix, for a number of bits or an error, by the error of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.convert.sensitivity import sensitivities
from tvm_ternary.convert.stream import Progress, calibrate
from tvm_ternary.errors import OptionError
from tvm_ternary.formats import MAX_PLANES, PerChannel, PerGroup, Scheme
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.quantize.fit import fit_matrix, metric_of
from tvm_ternary.quantize.mixed import Candidate, Decision, within_bits, within_error
from tvm_ternary.quantize.observers import Statistics
from tvm_ternary.quantize.plan import LayerPlan, packed_bits
from tvm_ternary.quantize.recipe import Recipe

GROUP_SIZES = (32, 64, 128)
_SENSITIVITY_SAMPLES = 16


@dataclass(frozen=True)
class Budget:
    """What mixed precision is to keep to; one of both.

    Parameters
    ----------
    bits : float, optional
        Bits a weight, scales and padding counted, over all matrices that the plan makes ternary.
    error : float, optional
        Relative output error of each matrix.

    Raises
    ------
    OptionError
        If both or none are given, or one is out of range.
    """

    bits: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.error is None):
            raise OptionError("target_bpw, max_error", "expected one of both", "leave one out")
        if self.bits is not None and not 2.0 < self.bits <= 32.0:
            raise OptionError("target_bpw", f"{self.bits!r}, expected more than 2 and at most 32", "for example 3.5")
        if self.error is not None and not 0.0 < self.error < 1.0:
            raise OptionError("max_error", f"{self.error!r}, expected between 0 and 1", "for example 0.05")


def mixed_plan(
    model: ImportedModel,
    rows: Mapping[str, LayerPlan],
    recipe: Recipe,
    samples: Sequence[Mapping[str, npt.NDArray[Any]]] | None,
    budget: Budget,
    progress: Progress | None = None,
) -> dict[str, LayerPlan]:
    """Replace the schemes of a plan's ternary matrices.

    Every matrix is fitted with one to four planes and scales for 32, 64, 128 weights or a row, activations as planned,
    to its inputs in the float model; the error of a candidate is the relative error of its products, or of the weights
    where there are no samples. Trits are compensated, but without sweeps, which would take four times as long and move
    all candidates alike.

    For a number of bits, what is made small is the sum of the squares of these errors, each times what the model makes
    of it on the way to its outputs (`sensitivities`).

    Parameters
    ----------
    model : ImportedModel
    rows : mapping of str to LayerPlan
        Those without a scheme, and those that are ternary in the model, stay as they are.
    recipe : Recipe
    samples : sequence of mappings of str to array, or None
    budget : Budget
    progress : callable, optional

    Returns
    -------
    dict of str to LayerPlan
        Whose ``rule`` says why.

    Raises
    ------
    OptionError
        If even the smallest candidates take more bits than there are.
    """
    open_rows = {name: row for name, row in rows.items() if row.scheme is not None and name not in model.ternary}
    measure = _Measure(model, open_rows, replace(recipe, sweeps=0, correct_inputs=0.0))
    weights: Mapping[str, float] = {}
    if samples is not None:
        runner = SegmentRunner()
        if budget.bits is not None:
            few = samples[:_SENSITIVITY_SAMPLES]
            weights = sensitivities(model, few, list(open_rows), runner=runner, progress=progress)
        calibrate(model, samples, measure.group, wanted=list(open_rows), runner=runner, progress=progress)
    for name in open_rows:
        if name not in measure.found:
            measure.one(name, None)
    chosen: Mapping[str, Decision | None]
    found = {name: [one.times(weights.get(name, 1.0)) for one in measure.found[name]] for name in open_rows}
    if budget.bits is not None:
        total = sum(n * k for n, k in (row.shape for row in open_rows.values()))
        chosen = within_bits(found, budget.bits * total).decisions
    else:
        assert budget.error is not None
        # Of squares, as candidates have them.
        chosen = within_error(found, budget.error**2)
    return {name: _decided(row, chosen[name], budget) if name in chosen else row for name, row in rows.items()}


class _Measure:
    """Fits candidates."""

    def __init__(self, model: ImportedModel, rows: Mapping[str, LayerPlan], recipe: Recipe) -> None:
        self.model, self.rows, self.recipe = model, rows, recipe
        self.found: dict[str, list[Candidate]] = {}

    def group(self, names: tuple[str, ...], statistics: Statistics) -> dict[str, npt.NDArray[np.float32]]:
        """Measure matrices that share an input, and go on with their float weights."""
        for name in names:
            if name in self.rows:
                self.one(name, statistics)
        return {name: self.model.params[name] for name in names}

    def one(self, name: str, statistics: Statistics | None) -> None:
        """Fit all candidates of a matrix."""
        row = self.rows[name]
        assert row.scheme is not None
        w = self.model.params[name].T
        metric = None
        if statistics is not None and statistics.hessian is not None and self.recipe.compensate:
            metric = metric_of(statistics, self.recipe)
        candidates = []
        for scheme in _schemes(row.scheme, row.shape[1]):
            fit = fit_matrix(w, scheme, self.recipe, statistics, metric=metric, name=name)
            error = fit.error if fit.output_error is None else fit.output_error
            used = replace(scheme, planes=fit.weight.num_planes)
            candidates.append(Candidate(str(used), packed_bits(row.shape, used), error**2))
        self.found[name] = candidates


def _schemes(planned: Scheme, k: int) -> list[Scheme]:
    kinds = [PerChannel(), *(PerGroup(size) for size in GROUP_SIZES if size < k)]
    return [replace(planned, planes=planes, granularity=kind) for planes in range(1, MAX_PLANES + 1) for kind in kinds]


def _decided(row: LayerPlan, decision: Decision | None, budget: Budget) -> LayerPlan:
    if decision is None:
        reason = f"no candidate has an output error of at most {budget.error:g}"
        return replace(row, scheme=None, reason=reason, rule="max_error")
    return replace(row, scheme=Scheme.parse(decision.candidate.label), rule=decision.reason)
