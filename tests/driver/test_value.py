"""The value model, and that screening by it is worth having."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from fxprune.driver import SearchConfig, run
from fxprune.driver.problem import FloatArray, IntArray
from fxprune.driver.simplex import proportional
from fxprune.driver.strategies.rl.sampler import trajectories
from fxprune.driver.strategies.rl.value import ValueModel
from fxprune.testing.synthetic import Chain


def taught(count: int, seed: int = 0) -> tuple[ValueModel, Chain, np.random.Generator]:
    chain, rng = Chain(), np.random.default_rng(seed)
    model = ValueModel(chain.units)
    for _ in range(count):
        removed = rng.integers(0, chain.units)
        model.add(removed, chain.score(removed)["accuracy"])
    return model, chain, rng


def test_predicts_what_it_has_not_seen() -> None:
    model, chain, rng = taught(60)
    unseen = [rng.integers(0, chain.units) for _ in range(50)]
    truth = np.array([chain.score(one)["accuracy"] for one in unseen])
    assert np.abs(model.predict(unseen) - truth).max() < 0.02 * np.ptp(truth)


def test_says_the_mean_where_rewards_are_chance() -> None:
    rng = np.random.default_rng(1)
    model = ValueModel(np.full(8, 50))
    rewards = rng.normal(0.5, 0.1, 40)
    for reward in rewards:
        model.add(rng.integers(0, 50, 8), float(reward))
    assert np.ptp(model.predict([rng.integers(0, 50, 8) for _ in range(50)])) < 0.5 * np.ptp(rewards)


def test_state_comes_back_through_json() -> None:
    model, chain, rng = taught(20)
    again = ValueModel(chain.units)
    again.restore(json.loads(json.dumps(model.state())))
    unseen = [rng.integers(0, chain.units) for _ in range(5)]
    np.testing.assert_array_equal(again.predict(unseen), model.predict(unseen))
    assert len(again) == 20
    again.clear()
    assert len(again) == 0


def test_an_architecture_counts_once() -> None:
    model = ValueModel(np.array([9, 9]))
    model.add(np.array([1, 2]), 0.5)
    model.add(np.array([1, 2]), 0.5)
    assert len(model) == 1
    assert np.array([1, 2]) in model
    assert np.array([2, 1]) not in model


def test_a_child_is_the_draw_that_was_chosen() -> None:
    offered: list[list[int]] = []

    def choose(drawn: Sequence[IntArray]) -> int:
        offered.append([int(one[0]) for one in drawn])
        return int(np.argmax(offered[-1]))

    def advance(removed: IntArray, action: FloatArray, level: int) -> IntArray:
        return np.round(1000 * action).astype(np.int64)

    nodes = trajectories(
        np.zeros(3, dtype=np.int64),
        proportional(np.array([10, 10, 10]), 1e-5),
        advance,
        samples=3,
        depth=1,
        scaling=2.0,
        noise=0.3,
        floor=1e-5,
        rng=np.random.default_rng(0),
        draws=8,
        choose=choose,
    )
    assert [len(drawn) for drawn in offered] == [8, 8, 8]
    assert [node.removed[0] for node in nodes] == [max(drawn) for drawn in offered]
    assert all(round(1000 * node.action[0]) == node.removed[0] for node in nodes)


@pytest.mark.parametrize("seed", range(3))
def test_screening_finds_more_at_equal_evaluations(seed: int) -> None:
    sizes = np.random.default_rng(seed).choice([16, 32, 64], 16)
    chain = Chain(tuple(int(size) for size in sizes), np.where(np.arange(16) % 2, 0.2, 0.02))
    options = {"seed": seed, "evaluations": 80, "patience": None}
    with_model = run(chain.problem(), SearchConfig(**options))  # type: ignore[arg-type]
    without = run(chain.problem(), SearchConfig(screen=1, **options))  # type: ignore[arg-type]
    assert with_model.reward > without.reward + 0.004
