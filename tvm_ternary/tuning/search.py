"""Which decisions to try next: every one of a small space, or those that MetaSchedule's evolutionary search picks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule
from tvm.s_tir.meta_schedule import _ffi_api
from tvm.s_tir.meta_schedule.cost_model import CostModel, RandomModel, XGBModel
from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig
from tvm.s_tir.meta_schedule.database import MemoryDatabase, TuningRecord
from tvm.s_tir.meta_schedule.feature_extractor import PyFeatureExtractor
from tvm.s_tir.meta_schedule.logging import get_logger, get_logging_func
from tvm.s_tir.meta_schedule.postproc import PyPostproc
from tvm.s_tir.meta_schedule.runner import RunnerResult
from tvm.s_tir.meta_schedule.search_strategy import MeasureCandidate
from tvm.s_tir.schedule import Schedule, Trace

from tvm_ternary.tuning.task import (
    Decisions,
    Limited,
    Task,
    decided_schedule,
    fits,
    schedule_function,
    space_points,
    space_size,
)

COST_MODELS = ("xgb", "random")
_THREADS = 1
# A model of few decisions has something to say after few samples; TVM's 100 would be a random search of 100 trials.
_WARMUP = 16
# Enough to hold most points of a space of some hundreds. So no mutator is needed either: what a mutation could reach
# is among the samples, and the cost model ranks them.
_POPULATION = 256
_UNMEASURED = 32
_NO_LIMIT = 2**30


class Search(Protocol):
    """Proposes decisions and learns what they cost."""

    def propose(self, count: int) -> list[Decisions]:
        """Give up to ``count`` sets of decisions not proposed or told of before; none: there are no more."""

    def tell(self, costs: Mapping[Decisions, float | None]) -> None:
        """Learn median seconds; None for a candidate that failed."""


def make_search(
    task: Task, module: tvm.IRModule, target: tvm.target.Target, trials: int, cost_model: str, seed: int
) -> Search:
    """Give the search for a task: exhaustive where there are trials for its whole space.

    Parameters
    ----------
    task : Task
    module : tvm.IRModule
        Its workload.
    target : tvm.target.Target
    trials : int
        How many candidates may be tried in all.
    cost_model : str
        One of `COST_MODELS`.
    seed : int
        The same seed and measurements give the same proposals.
    """
    if trials >= space_size(task):
        return ExhaustiveSearch(task, seed)
    return EvolutionarySearch(task, module, target, cost_model, seed)


class ExhaustiveSearch:
    """Every point once: the default, then the others in random order, so that a job cut short has looked everywhere."""

    def __init__(self, task: Task, seed: int) -> None:
        default = tuple(task.default[name] for name in task.space)
        others = [point for point in space_points(task) if point != default]
        random.Random(seed).shuffle(others)
        self._left = [default, *others]

    def propose(self, count: int) -> list[Decisions]:
        """Give the next ones."""
        given, self._left = self._left[:count], self._left[count:]
        return given

    def tell(self, costs: Mapping[Decisions, float | None]) -> None:
        """Strike off what was measured before this run."""
        self._left = [point for point in self._left if point not in costs]


class EvolutionarySearch:
    """MetaSchedule's evolutionary search over a space, with its random or boosted-trees cost model."""

    def __init__(self, task: Task, module: tvm.IRModule, target: tvm.target.Target, cost_model: str, seed: int) -> None:
        self._space = task.space
        self._rejections = [Fitting(task)] if isinstance(task, Limited) else []
        self._module = module
        self._default: Decisions = tuple(task.default[name] for name in task.space)
        self._known: set[Decisions] = set()
        self._asked: dict[Decisions, MeasureCandidate] = {}
        self._database = MemoryDatabase()
        self._workload = self._database.commit_workload(module)
        # Both cost models of MetaSchedule draw from numpy's global generator.
        np.random.seed(seed)
        self._model = _cost_model(cost_model, seed)
        self._context = self._make_context(target, seed)
        self._started = False

    def propose(self, count: int) -> list[Decisions]:
        """Give the default first, then what the search picks."""
        if self._default not in self._known:
            self._known.add(self._default)
            return [self._default]
        if not self._started:
            spaces = self._context.generate_design_space()
            self._context.pre_tuning(_NO_LIMIT, count, spaces, self._database, self._model)
            self._started = True
        while not self._asked:
            candidates = self._context.search_strategy.generate_measure_candidates()
            if candidates is None:
                return []
            points = {decisions_of(candidate.sch.trace): candidate for candidate in candidates}
            self._asked = {point: made for point, made in points.items() if point not in self._known}
            if not self._asked:
                # The search counts rounds without anything new, and gives up after some.
                self._context.search_strategy.notify_runner_results([], [])
        for surplus in list(self._asked)[count:]:
            del self._asked[surplus]
        self._known.update(self._asked)
        return list(self._asked)

    def tell(self, costs: Mapping[Decisions, float | None]) -> None:
        """Train the cost model and fill the database that the search starts its populations from."""
        self._known.update(costs)
        given = {point: self._asked.get(point) or self._candidate(point) for point in costs}
        measured = [RunnerResult([cost], None) if cost else RunnerResult(None, "failed") for cost in costs.values()]
        for (_, candidate), cost in zip(given.items(), costs.values(), strict=True):
            if cost is not None:
                record = TuningRecord(candidate.sch.trace, self._workload, [cost], None, candidate.args_info)
                self._database.commit_tuning_record(record)
        self._model.update(self._context, list(given.values()), measured)
        if self._asked:
            candidates = list(self._asked.values())
            told = dict(zip(given, measured, strict=True))
            results = [told.get(point, RunnerResult(None, "not measured")) for point in self._asked]
            self._context.search_strategy.notify_runner_results(candidates, results)
            self._asked = {}

    def _candidate(self, point: Decisions) -> MeasureCandidate:
        schedule = decided_schedule(self._module, self._space, point)
        return MeasureCandidate(schedule, meta_schedule.arg_info.ArgInfo.from_entry_func(self._module))

    def _make_context(self, target: tvm.target.Target, seed: int) -> Any:
        """As TuneContext's constructor, which first parses all tensor intrinsics of TVM: ten seconds, for none."""
        space = meta_schedule.space_generator.ScheduleFn(
            schedule_function(self._space), sch_rules=[], postprocs=self._rejections, mutator_probs={}
        )
        strategy = meta_schedule.search_strategy.EvolutionarySearch(
            population_size=_POPULATION, init_min_unmeasured=_UNMEASURED
        )
        log = get_logging_func(get_logger(__name__))
        arguments = (self._module, target, space, strategy, "task", _THREADS, seed + 1, log)
        context = _ffi_api.TuneContext(*arguments)
        _ffi_api.TuneContextInitialize(context)
        return context


def _cost_model(kind: str, seed: int) -> CostModel:
    if kind == "random":
        return RandomModel(seed=seed)
    config = XGBConfig(seed=seed, nthread=_THREADS)
    return XGBModel(extractor=DecisionFeatures(), config=config, num_warmup_samples=_WARMUP, adaptive_training=False)


@derived_object
class Fitting(PyPostproc):
    """Makes the search sample anew where decisions cannot go together."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task

    def _initialize_with_tune_context(self, context: Any) -> None:
        """Do nothing: MetaSchedule calls it."""

    def apply(self, schedule: Schedule) -> bool:
        """Whether to keep what was sampled."""
        return fits(self._task, decisions_of(schedule.trace))

    def clone(self) -> Fitting:
        """Another one, for another thread."""
        return Fitting(self._task)


@derived_object
class DecisionFeatures(PyFeatureExtractor):
    """One row a candidate: its decisions. Before it is realized, all of a task's candidates have the same loops."""

    def extract_from(self, context: Any, candidates: Iterable[MeasureCandidate]) -> list[tvm.runtime.Tensor]:
        """Give an array (1, number of decisions) for each candidate."""
        rows = [decisions_of(candidate.sch.trace) for candidate in candidates]
        return [tvm.runtime.tensor(np.array([row], dtype="float32")) for row in rows]


def decisions_of(trace: Trace) -> Decisions:
    """Read the decisions off a trace that `schedule_function` has made, in the space's order."""
    decided = trace.decisions
    return tuple(int(step.attrs[0][int(decided[step])]) for step in trace.insts if step in decided)
