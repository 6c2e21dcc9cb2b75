"""Candidates that are scored on little data first, and the rule by which a search stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from fxprune.driver import Problem, Scored, SearchConfig, run
from fxprune.driver.budget import Budget
from fxprune.driver.levels import survivors
from fxprune.driver.problem import IntArray
from fxprune.driver.strategies.rl.rl_pruner import SHORTEST, RLPruner
from fxprune.errors import SearchError
from fxprune.testing.synthetic import Chain


class Blurred:
    """The chain's score, seen through noise that depends on the vector alone. Picklable."""

    def __init__(self, chain: Chain, noise: float) -> None:
        self.chain, self.noise = chain, noise

    def __call__(self, removed: IntArray) -> Mapping[str, float]:
        drawn = np.random.default_rng(removed.tolist()).standard_normal()
        return {"accuracy": self.chain.score(removed)["accuracy"] + self.noise * float(drawn)}


def raced(noises: Sequence[float] = (0.02, 0.005)) -> Problem:
    return dataclasses.replace(Chain().problem(), rungs=[Blurred(Chain(), noise) for noise in noises])


def test_each_level_lets_the_same_fraction_pass() -> None:
    seen: list[tuple[int, list[int]]] = []

    def judged(level: int, vectors: Sequence[IntArray]) -> list[float]:
        seen.append((level, [int(v[0]) for v in vectors]))
        return [float(v[0] % 7) for v in vectors]

    vectors = [np.array([i]) for i in range(12)]
    assert survivors(vectors, 3, 2, judged) == [4, 5, 6]
    assert seen == [(0, list(range(12))), (1, [2, 3, 4, 5, 6, 11])] or seen[1][1] == [3, 4, 5, 6, 10, 11]


def test_equal_vectors_count_once_and_few_are_not_judged() -> None:
    def judged(level: int, vectors: Sequence[IntArray]) -> list[float]:
        raise AssertionError("there is nothing to choose")

    vectors = [np.array([1]), np.array([1]), np.array([2])]
    assert survivors(vectors, 2, 2, judged) == [0, 2]


def test_more_candidates_are_drawn_and_as_many_scored_in_full() -> None:
    config = SearchConfig(evaluations=40, samples=3, seed=1)
    problem = raced()
    full, cheap = Chain(), [Blurred(Chain(), 0.02), Blurred(Chain(), 0.005)]
    found = run(dataclasses.replace(problem, score=full.score, rungs=cheap), config)
    assert found.evaluations <= 40 and full.calls == found.evaluations
    assert cheap[0].chain.calls > 2 * full.calls and cheap[1].chain.calls < cheap[0].chain.calls
    plain = run(Chain().problem(), config)
    assert found.reward >= plain.reward - 0.002


def test_rungs_are_left_alone_where_halving_is_1() -> None:
    cheap = Blurred(Chain(), 0.0)
    run(dataclasses.replace(Chain().problem(), rungs=[cheap]), SearchConfig(evaluations=12, halving=1))
    assert cheap.chain.calls == 0
    with pytest.raises(SearchError, match="halving is 0"):
        SearchConfig(halving=0)


def test_workers_change_nothing() -> None:
    config = SearchConfig(evaluations=14, seed=3)
    one, two = (run(raced(), dataclasses.replace(config, jobs=jobs)) for jobs in (1, 2))
    assert np.array_equal(one.removed, two.removed) and one.reward == two.reward and one.evaluations == two.evaluations


def rounds_made(gain: float, until: int = 1000, **options: float | int | None) -> int:
    """Rounds of a step whose best candidate gains ``gain`` a round, up to the round ``until``."""
    config = SearchConfig(samples=2, rounds=60, **options)  # type: ignore[arg-type]
    strategy = RLPruner(Budget(Chain().problem().space, config.points[0]), config)
    (first,) = strategy.ask()
    strategy.tell([Scored(first, 0.9, {"accuracy": 0.9})])
    rounds = 0
    while strategy.step == 0:
        rounds += 1
        best = 0.5 + gain * min(rounds, until)
        strategy.tell([Scored(v, best, {"accuracy": best}) for v in strategy.ask()])
        kept = strategy.state()
        strategy = RLPruner(strategy.budget, config)
        strategy.restore(kept)
    return rounds


def test_a_step_ends_when_more_rounds_no_longer_pay() -> None:
    assert rounds_made(0.0, patience=60) == SHORTEST
    assert rounds_made(0.01, until=9, patience=60) == 17  # what was gained lies in the earlier half
    assert rounds_made(0.001, patience=60) == 60
    assert rounds_made(0.0, patience=None) == 60 and rounds_made(0.0, patience=60, pays=None) == 60
    assert rounds_made(0.0, patience=3) == 4
