"""The contract that every search strategy keeps, as a test class to inherit from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fxprune.driver import Scored, SearchConfig, Strategy
from fxprune.driver.budget import Budget
from fxprune.driver.problem import IntArray
from fxprune.driver.strategies import find
from fxprune.errors import SearchError
from fxprune.testing.synthetic import Chain


def made(strategy: Any, **options: Any) -> tuple[Strategy, Chain]:
    """A fresh strategy, by name, path or class, on half the multiply-accumulates of a chain of six layers."""
    chain = Chain()
    config = SearchConfig(**{"strategy": strategy, "samples": 4, "rounds": 3, "steps": 2, "seed": 7, **options})
    return find(strategy)(Budget(chain.problem().space, config.points[0]), config), chain


def scored(vectors: list[IntArray], chain: Chain) -> list[Scored]:
    """What the chain scores on each vector."""
    outcomes = []
    for vector in vectors:
        metrics = {**chain.score(vector), "macs": chain.cost(vector)["macs"]}
        outcomes.append(Scored(vector, metrics["accuracy"], metrics))
    return outcomes


def trials(strategy: Strategy, chain: Chain, rounds: int = 100) -> list[list[int]]:
    """The removal vectors asked for in up to ``rounds`` rounds."""
    asked: list[list[int]] = []
    for _ in range(rounds):
        vectors = strategy.ask()
        if not vectors:
            break
        asked += [vector.tolist() for vector in vectors]
        strategy.tell(scored(vectors, chain))
    return asked


class StrategyContract:
    """Inherit from it in a test module and set ``strategy`` to your class, or to its name or path; pytest runs the rest.

    ``seeded``: whether another seed gives other trials; False for a strategy that draws nothing.
    """

    strategy: Any = None
    seeded = True

    def test_asks_for_vectors_in_bounds_and_ends(self) -> None:
        strategy, chain = made(self.strategy)
        asked = trials(strategy, chain)
        _require(len(asked) > 0, "it asks for nothing")
        _require(strategy.ask() == [], "it does not end within a hundred rounds")
        room = strategy.space.room
        _require(all((np.array(v) >= 0).all() and (np.array(v) <= room).all() for v in asked), "a vector is out of bounds")
        _require(any(strategy.budget.met(np.array(v)) for v in asked), "no vector is on target; use self.budget.fitted or project")

    def test_misuse_raises(self) -> None:
        strategy, chain = made(self.strategy)
        _refused(lambda: strategy.tell([]), "without ask")
        outcomes = scored(strategy.ask(), chain)
        _refused(strategy.ask, "again before tell")
        _refused(strategy.state, "between ask and tell")
        _refused(lambda: strategy.tell([*outcomes, outcomes[0]]), "outcomes for")
        _refused(lambda: strategy.tell([Scored(o.removed + 1, o.reward, o.metrics) for o in outcomes]), "keep the order")
        _refused(lambda: strategy.tell([Scored(o.removed, float("nan"), o.metrics) for o in outcomes]), "must be finite")
        strategy.tell(outcomes)
        _refused(lambda: strategy.tell(outcomes), "without ask")

    def test_goes_on_from_its_state(self) -> None:
        for after in (0, 1, 3):
            strategy, chain = made(self.strategy)
            trials(strategy, chain, rounds=after)
            state = json.loads(json.dumps(strategy.state()))
            rest = trials(strategy, chain)
            other, _ = made(self.strategy)
            other.restore(state)
            _require(trials(other, chain) == rest, f"restored after {after} rounds it goes on otherwise; see memory() and recall()")

    def test_the_seed_decides(self) -> None:
        first, again, other = (trials(*made(self.strategy, seed=seed)) for seed in (1, 1, 2))
        _require(first == again, "one seed gives two runs; draw from self.rng")
        _require(not self.seeded or first != other, "two seeds give the same trials")


def _refused(act: Callable[[], Any], words: str) -> None:
    try:
        act()
    except SearchError as error:
        _require(words in str(error), f"the error says {error}, and not {words!r}")
    else:
        raise AssertionError(f"misuse was not refused ({words}); do not override ask, tell or state")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
