"""What is proposed: a small space once and whole, a large one as the cost model sees it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import tvm

from tvm_ternary.tuning.search import COST_MODELS, EvolutionarySearch, ExhaustiveSearch, Search, make_search
from tvm_ternary.tuning.task import Decisions, space_size

from .toy import Toy

TARGET = tvm.target.Target({"kind": "llvm", "num-cores": 1})
LARGE = Toy(
    space={"rows": (1, 2, 3, 4, 6, 8, 16, 32), "columns": (1, 2, 4, 8, 16, 32), "a": (0, 1, 2, 3), "b": (0, 1, 2)},
    default={"rows": 1, "columns": 8, "a": 1, "b": 0},
)
BEST = (6, 16, 0, 2)


def cost(point: Decisions) -> float | None:
    """Best at `BEST`, worse with the distance; the widest tiles fail."""
    if point[:2] == (32, 32):
        return None
    weights = (1.0, 0.25, 1.0, 1.0)
    return 1e-3 * (1 + sum(w * abs(x - y) for w, x, y in zip(weights, point, BEST, strict=False)))


def run(search: Search, trials: int, count: int = 16) -> list[Decisions]:
    """Every point proposed, in order."""
    told: list[Decisions] = []
    while len(told) < trials:
        points = search.propose(min(count, trials - len(told)))
        if not points:
            break
        search.tell({point: cost(point) for point in points})
        told += points
    return told


def evolutionary(model: str, seed: int = 0) -> Search:
    return make_search(LARGE, LARGE.workload(), TARGET, 64, model, seed)


def test_a_space_that_fits_the_trials_is_tried_whole() -> None:
    toy = Toy()
    search = make_search(toy, toy.workload(), TARGET, 6, "xgb", 0)
    assert isinstance(search, ExhaustiveSearch)
    points = run(search, 99, count=4)
    assert points[0] == (1, 8)
    assert sorted(points) == sorted(product(*toy.space.values()))
    assert isinstance(make_search(toy, toy.workload(), TARGET, 5, "random", 0), EvolutionarySearch)


def test_an_exhaustive_search_goes_on_where_it_was() -> None:
    toy = Toy()
    first = run(ExhaustiveSearch(toy, 0), 3)
    search = ExhaustiveSearch(toy, 0)
    search.tell(dict.fromkeys(first))
    assert first + run(search, 99) == run(ExhaustiveSearch(toy, 0), 99)


@pytest.mark.parametrize("model", COST_MODELS)
def test_an_evolutionary_search_begins_with_the_default_and_repeats_nothing(model: str) -> None:
    points = run(evolutionary(model), 64)
    assert points[0] == tuple(LARGE.default.values())
    assert len(set(points)) == len(points) == 64
    assert all(x in candidates for point in points for x, candidates in zip(point, LARGE.space.values(), strict=True))


def middle(points: Sequence[Decisions]) -> float:
    """The median cost of those that do not fail."""
    return statistics.median(found for point in points if (found := cost(point)) is not None)


def test_a_trained_model_proposes_better_ones() -> None:
    trained, drawn = run(evolutionary("xgb"), 48), run(evolutionary("random"), 48)
    assert middle(trained[32:]) < 0.7 * middle(drawn[32:])


def test_an_evolutionary_search_goes_on_with_what_was_measured() -> None:
    known = run(evolutionary("random"), 48)
    search = evolutionary("xgb", 1)
    search.tell({point: cost(point) for point in known})
    points = run(search, 16)
    assert len(points) == 16
    assert not set(points) & set(known)
    # Trained on the 48, the very first batch is better than one by chance.
    assert middle(points) < middle(known)


def test_a_search_ends_when_the_space_is_spent() -> None:
    toy = Toy()
    search = EvolutionarySearch(toy, toy.workload(), TARGET, "random", 0)
    seen: list[Decisions] = []
    while points := search.propose(4):
        search.tell(dict.fromkeys(points, 1e-3))
        seen += points
    assert sorted(seen) == sorted(product(*toy.space.values()))


def test_what_was_proposed_and_not_measured_does_no_harm() -> None:
    search = evolutionary("random")
    search.tell({point: cost(point) for point in search.propose(1)})
    first = search.propose(8)
    search.tell({first[0]: 1e-3})
    assert len(search.propose(8)) == 8


@pytest.mark.parametrize("model", COST_MODELS)
def test_the_same_seed_proposes_the_same(model: str) -> None:
    # Of the second batch, which a trained model proposes, a few are enough.
    first, again, other = (run(evolutionary(model, seed), 20) for seed in (3, 3, 4))
    assert first == again != other


@dataclass(frozen=True)
class Narrow(Toy):
    """Tiles of which some are too large."""

    def fits(self, decisions: Mapping[str, int]) -> bool:
        return decisions["rows"] * decisions["columns"] <= 64


NARROW = Narrow(space=LARGE.space, default=LARGE.default)


@pytest.mark.parametrize("trials", [64, 999], ids=["sampled", "all"])
def test_what_cannot_be_is_never_proposed(trials: int) -> None:
    fitting = [p for p in product(*NARROW.space.values()) if p[0] * p[1] <= 64]
    assert space_size(NARROW) == len(fitting) < space_size(LARGE)
    points = run(make_search(NARROW, NARROW.workload(), TARGET, trials, "random", 0), trials)
    assert set(points) <= set(fitting)
    assert len(set(points)) == len(points) >= min(trials, len(fitting))
