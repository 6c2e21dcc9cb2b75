"""A latency that is predicted while the search runs, and measured on what it found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fxprune.driver import Problem, SearchConfig, SearchOutcome, run
from fxprune.driver.budget import Budget
from fxprune.driver.problem import IntArray
from fxprune.errors import PruningWarning, SearchError, TargetError
from fxprune.testing.synthetic import Chain


class Clock:
    """Measures ``fixed + (1 - fixed) * macs ** power``; predicts along the line through what was measured."""

    tolerance = 0.05

    def __init__(self, chain: Chain, fixed: float, power: float = 1.0) -> None:
        self.chain, self.fixed, self.power = chain, fixed, power
        self.line: dict[float, float] = {0.0: 0.0, 1.0: 1.0}
        self.looks: list[IntArray] = []

    def seconds(self) -> float:
        return 0.01

    def true(self, removed: IntArray) -> float:
        return float(self.fixed + (1 - self.fixed) * self.chain.cost(removed)["macs"] ** self.power)

    def share(self, removed: IntArray) -> float:
        self.looks.append(removed)
        return self.true(removed)

    def correct(self, points: Sequence[tuple[IntArray, float]]) -> None:
        self.line = {0.0: 0.0, 1.0: 1.0, **{self.chain.cost(removed)["macs"]: share for removed, share in points}}

    def problem(self) -> Problem:
        def cost(removed: IntArray) -> dict[str, float]:
            costs = self.chain.cost(removed)
            return {**costs, "latency": float(np.interp(costs["macs"], sorted(self.line), [self.line[x] for x in sorted(self.line)]))}

        return dataclasses.replace(self.chain.problem(), cost=cost, clock=self)


@pytest.mark.parametrize("strategy", ["uniform", "rl-pruner", "random", "magnitude"])
@pytest.mark.parametrize(("fixed", "power"), [(0.0, 1.0), (0.3, 1.0), (0.0, 2.0), (0.1, 0.5)])
def test_what_is_found_meets_the_target_as_it_is_measured(strategy: str, fixed: float, power: float) -> None:
    clock = Clock(Chain(), fixed, power)
    found = run(clock.problem(), SearchConfig(targets="latency=0.5", strategy=strategy, rounds=4))
    assert clock.true(found.removed) == pytest.approx(0.5, rel=0.05)
    assert found.metrics["latency"] == clock.true(found.removed)
    assert len(clock.looks) <= 9
    assert np.array_equal(clock.looks[-1], clock.looks[-2])  # what ends the search is measured once more
    assert np.array_equal(clock.looks[0], clock.problem().space.room)  # where predictions begin


class Lucky(Clock):
    """Every first measurement of a vector is 3 % below, and the second one 3 % above what is true."""

    def share(self, removed: IntArray) -> float:
        seen = any(np.array_equal(removed, one) for one in self.looks)
        return super().share(removed) * (1.03 if seen else 0.97)


def test_what_looks_right_is_measured_once_more_and_the_mean_counts() -> None:
    clock = Lucky(Chain(), 0.1)
    found = run(clock.problem(), SearchConfig(targets="latency=0.5", strategy="uniform"))
    assert found.metrics["latency"] == pytest.approx(clock.true(found.removed))
    assert clock.true(found.removed) == pytest.approx(0.5, rel=0.02)


class Stubborn(Clock):
    """Predicts the share of the multiply-accumulates, whatever was measured."""

    def correct(self, points: Sequence[tuple[IntArray, float]]) -> None:
        pass


@pytest.mark.parametrize("strategy", ["uniform", "rl-pruner", "magnitude"])
@pytest.mark.parametrize(("fixed", "power"), [(0.3, 1.0), (0.0, 2.0), (0.1, 0.5), (0.0, 4.0)])
def test_where_predictions_fail_what_lies_between_two_measured_ones_is_halved(strategy: str, fixed: float, power: float) -> None:
    clock = Stubborn(Chain(), fixed, power)
    found = run(clock.problem(), SearchConfig(targets="latency=0.5", strategy=strategy, rounds=4))
    assert clock.true(found.removed) == pytest.approx(0.5, rel=0.05)
    assert found.metrics["latency"] == clock.true(found.removed)


class Stairs(Clock):
    """Half the multiply-accumulates take 0.3 of the time, and a little more takes all of it: nothing is near 0.5."""

    high = 1.0

    def true(self, removed: IntArray) -> float:
        return 0.3 if self.chain.cost(removed)["macs"] < 0.6 else self.high


def test_a_latency_that_only_comes_out_lower_than_asked_is_given_and_said() -> None:
    with pytest.warns(PruningWarning, match=r"target latency=0\.5: the nearest that was measured is faster than asked, latency=0\.3"):
        found = run(Stairs(Chain(), 0.1).problem(), SearchConfig(targets="latency=0.5", strategy="uniform"))
    assert found.metrics["latency"] == 0.3 and "faster than asked" in found.note
    assert SearchOutcome.of(found.state()).note == found.note


def test_a_latency_that_only_comes_out_higher_than_asked_is_an_error() -> None:
    clock = Stairs(Chain(), 0.1)
    clock.high = 0.56
    with pytest.raises(TargetError, match=r"target latency=0\.5 was not met: the nearest that was measured: latency=0\.56"):
        run(clock.problem(), SearchConfig(targets="latency=0.5", strategy="uniform"))


def test_what_lies_between_two_vectors() -> None:
    problem = Clock(Chain(), 0.0).problem()
    budget = Budget(problem.space, SearchConfig(targets="latency=0.5").points[0])
    zeros, room = problem.space.zeros(), problem.space.room
    near, middle = budget.between(zeros, room), budget.between(zeros, room, halfway=True)
    assert near is not None and middle is not None
    assert abs(budget.excess(near)) < 0.1 and (near >= 0).all() and (near <= room).all()
    assert abs(middle.sum() / room.sum() - 0.5) < 0.1
    one = zeros.copy()
    one[2] = 1
    assert budget.between(zeros, one) is None
    one[4] = 1  # two groups by a step each: one of them
    step = budget.between(zeros, one)
    assert step is not None and step.sum() == 1 and budget.between(one, step) is None
    back = zeros.copy()
    back[0] = 5  # groups may move either way
    mixed = budget.between(back, one, halfway=True)
    assert mixed is not None and 0 < mixed[0] < 5


def test_a_time_is_one_of_the_originals(tmp_path: Path) -> None:
    clock = Clock(Chain(), 0.2)
    found = run(clock.problem(), SearchConfig(targets="latency=6ms", strategy="uniform"))
    assert clock.true(found.removed) == pytest.approx(0.6, rel=0.05) and found.targets == ("latency=6ms",)
    with pytest.raises(SearchError, match="latency=10ms: the original takes 10 ms already; ask for less"):
        run(clock.problem(), SearchConfig(targets="latency=10ms", strategy="uniform"))
    with pytest.raises(SearchError, match="does not say what the original takes"):
        run(Chain().problem(), SearchConfig(targets="latency=6ms", strategy="uniform"))


def test_other_targets_hold_as_exactly_as_ever() -> None:
    clock = Clock(Chain(), 0.3)
    found = run(clock.problem(), SearchConfig(targets=("latency=0.9", "params=0.5"), strategy="uniform"))
    assert found.metrics["params"] == pytest.approx(0.5, rel=0.01) and clock.true(found.removed) < 0.9


def test_a_latency_out_of_reach_names_what_was_measured() -> None:
    clock = Clock(Chain(), 0.4)
    with pytest.raises(TargetError, match="latency=0.3 .*latency=0.4") as caught:
        run(clock.problem(), SearchConfig(targets="latency=0.3", strategy="uniform"))
    assert "\n" not in str(caught.value) and "blocks=True" in str(caught.value)
    assert len(clock.looks) == 1  # the smallest network; nothing else can be nearer


def test_a_resumed_search_goes_by_what_was_measured(tmp_path: Path) -> None:
    config = SearchConfig(targets="latency=0.5", strategy="rl-pruner", rounds=4)
    first, again = Clock(Chain(), 0.3), Clock(Chain(), 0.3)
    found = run(first.problem(), config, checkpoint_dir=tmp_path)
    resumed = run(again.problem(), config, checkpoint_dir=tmp_path, resume=True)
    assert np.array_equal(found.removed, resumed.removed) and not again.looks
