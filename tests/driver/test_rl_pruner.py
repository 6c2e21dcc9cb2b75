"""RL-Pruner on formulas: its steps, its reset on a sharp drop, its warm start, and that it finds what there is to find."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fxprune.driver import Budget, Scored, SearchConfig, run
from fxprune.driver.problem import IntArray
from fxprune.driver.strategies import RLPruner
from fxprune.driver.strategies.magnitude import global_ranking
from fxprune.driver.strategies.rl import rl_pruner
from fxprune.testing.synthetic import SCALE, Chain


def made(**options: Any) -> tuple[RLPruner, Chain]:
    chain = Chain()
    config = SearchConfig(**{"samples": 4, "rounds": 2, "patience": None, **options})
    return RLPruner(Budget(chain.problem().space, config.points[0]), config), chain


def tell(strategy: RLPruner, accuracy: float | None = None, chain: Chain | None = None) -> list[IntArray]:
    """One round, every candidate scored alike, or as ``chain`` says."""
    vectors = strategy.ask()
    strategy.tell([_outcome(v, chain.score(v)["accuracy"] if chain else float(accuracy or 0)) for v in vectors])
    return vectors


def _outcome(vector: IntArray, accuracy: float) -> Scored:
    return Scored(vector, accuracy, {"accuracy": accuracy})


def test_starts_by_scoring_where_it_stands() -> None:
    strategy, _ = made()
    (first,) = tell(strategy, 0.9)
    assert not first.any()
    assert strategy.accuracy == 0.9
    assert strategy.step == 0


def test_first_policy_is_proportional_to_group_sizes() -> None:
    strategy, _ = made()
    np.testing.assert_allclose(strategy.policy, strategy.space.units / strategy.space.units.sum())


def test_a_step_in_units_removes_the_same_number_by_every_candidate() -> None:
    strategy, _ = made(steps=None, step_ratio=0.05, step_by="units")
    tell(strategy, 0.9)
    share = round(0.05 * int(strategy.space.units.sum()))
    assert {int(v.sum()) for v in tell(strategy, 0.9)} == {share}
    tell(strategy, 0.9)
    assert strategy.step == 1
    assert int(strategy.at.sum()) == share
    assert {int(v.sum()) for v in tell(strategy, 0.9)} == {2 * share}


def test_number_of_steps_is_the_target_over_the_ratio() -> None:
    # All channels are prunable, so half of them at 5 % of the units a step takes ten steps.
    strategy, _ = made(targets="sparsity=0.5", steps=None, step_ratio=0.05, step_by="units", rounds=1)
    steps = 0
    tell(strategy, 0.9)
    while tell(strategy, 0.9) if not strategy.budget.fits(strategy.at) else []:
        steps = strategy.step
    assert steps == strategy.planned == 10
    assert strategy.budget.met(strategy.at)


def test_a_step_in_cost_brings_every_candidate_to_the_same_cost() -> None:
    strategy, _ = made(steps=2)
    tell(strategy, 0.9)
    halfway = [strategy.budget.remaining(v, "macs") for v in tell(strategy, 0.9)]
    assert max(abs(share - 0.75) for share in halfway) < 0.015
    tell(strategy, 0.9)
    assert all(strategy.budget.met(v) for v in tell(strategy, 0.9))


def test_the_round_learned_follows_the_update_rule() -> None:
    strategy, chain = made(samples=3, step_length=0.25, rounds=5)
    tell(strategy, 0.9)
    vectors = strategy.ask()
    actions = [node.action for node in strategy.nodes]
    before = strategy.policy.copy()
    strategy.tell([_outcome(v, accuracy) for v, accuracy in zip(vectors, (0.2, 0.7, 0.4), strict=True)])
    np.testing.assert_allclose(strategy.policy, before + 0.25 * (actions[1] - before), rtol=1e-3)
    assert strategy.buffer.best.q == 0.7


def test_the_buffer_is_cleared_when_the_architecture_moves() -> None:
    strategy, chain = made(steps=3, rounds=1, sharp_drop=1.0)
    tell(strategy, chain=chain)
    tell(strategy, chain=chain)
    assert strategy.step == 1
    assert len(strategy.buffer) == 0
    assert strategy.at.any()


def test_sharp_drop_resets_the_policy_and_redoes_the_step_once() -> None:
    strategy, _ = made(steps=4, rounds=2, epsilon=0)
    tell(strategy, 0.9)
    tell(strategy, 0.5)
    assert not np.allclose(strategy.policy, strategy.space.units / strategy.space.units.sum())
    tell(strategy, 0.5)  # 0.5 < 0.9 * 0.9: the step is thrown away
    assert strategy.step == 0
    assert not strategy.at.any()
    assert len(strategy.buffer) == 0
    np.testing.assert_allclose(strategy.policy, strategy.space.units / strategy.space.units.sum())
    tell(strategy, 0.6)
    tell(strategy, 0.6)  # still a sharp drop, but the step was redone already
    assert strategy.step == 1
    assert strategy.accuracy == 0.6


def test_a_redone_step_counts_only_if_it_is_better() -> None:
    strategy, _ = made(steps=4, rounds=1, epsilon=0)
    tell(strategy, 0.9)
    tell(strategy, 0.5)
    tell(strategy, 0.3)
    assert strategy.step == 1
    assert strategy.accuracy == 0.5


@pytest.mark.parametrize("accuracy", [0.9, 0.82])
def test_no_reset_without_a_sharp_drop(accuracy: float) -> None:
    strategy, _ = made(steps=4, rounds=1)
    tell(strategy, 0.9)
    tell(strategy, accuracy)
    assert strategy.step == 1


def test_epsilon_takes_a_random_entry_of_the_buffer() -> None:
    moved = set()
    for seed in range(12):
        strategy, chain = made(steps=4, rounds=1, epsilon=1.0, epsilon_share=1.0, epsilon_decay="constant", seed=seed, sharp_drop=1.0)
        tell(strategy, chain=chain)
        scores = sorted((chain.score(v)["accuracy"] for v in tell(strategy, chain=chain)), reverse=True)
        assert strategy.accuracy is not None
        moved.add(scores.index(strategy.accuracy))
    assert len(moved) > 2


def test_a_step_ends_early_when_nothing_improves() -> None:
    strategy, _ = made(rounds=50, patience=3)
    tell(strategy, 0.9)
    rounds = 0
    while strategy.step == 0:
        tell(strategy, 0.8)
        rounds += 1
    assert rounds == 4  # the first round improves on nothing known, three do not


def test_recovery_makes_it_score_where_it_stands_again() -> None:
    strategy, _ = made(steps=4, rounds=1)
    tell(strategy, 0.9)
    tell(strategy, 0.85)
    strategy.weights_changed()
    (again,) = tell(strategy, 0.95)
    assert np.array_equal(again, strategy.at)
    assert strategy.accuracy == 0.95


def test_look_ahead_prefers_what_comes_after() -> None:
    # Depth 2: the reward of the children decides, where the parents are alike.
    strategy, _ = made(steps=2, samples=2, depth=2, depth_scaling=2, rounds=5, discount=0.9)
    tell(strategy, 0.9)
    vectors = strategy.ask()
    assert [node.parent for node in strategy.nodes] == [-1, 0, -1, 2]
    strategy.tell([_outcome(v, accuracy) for v, accuracy in zip(vectors, (0.8, 0.1, 0.8, 0.7), strict=True)])
    assert np.array_equal(strategy.buffer.best.removed, vectors[2])
    assert strategy.buffer.best.q == pytest.approx(0.8 + 0.9 * 0.7)


def test_warm_start_leans_towards_the_importance_ranking() -> None:
    cold, _ = made()
    warm, _ = made(warm_start=1.0)
    ranked = global_ranking(warm.budget)
    np.testing.assert_allclose(warm.policy, ranked / ranked.sum(), atol=1e-4)
    half, _ = made(warm_start=0.5)
    np.testing.assert_allclose(half.policy, (cold.policy + warm.policy) / 2, atol=1e-4)


def long_chain(seed: int) -> Chain:
    """Sixteen layers, every other one ten times as sensitive: too many for blind draws."""
    sizes = np.random.default_rng(seed).choice([16, 32, 64], 16)
    return Chain(tuple(int(size) for size in sizes), np.where(np.arange(16) % 2, 0.2, 0.02))


@pytest.mark.parametrize("seed", range(3))
def test_beats_random_and_uniform_at_equal_evaluations(seed: int) -> None:
    found = run(long_chain(seed).problem(), SearchConfig(seed=seed, evaluations=150, patience=None))
    blind = run(long_chain(seed).problem(), SearchConfig(seed=seed, evaluations=150, strategy="random", rounds=1000))
    assert found.evaluations <= 150
    assert found.reward > blind.reward + 0.005
    assert found.reward > found.baselines["uniform"].reward + 0.05
    sparsity = found.removed / long_chain(seed).units
    assert sparsity[1::2].mean() < sparsity[::2].mean() / 2  # it found out which layers matter


def test_paper_preset_reaches_the_sparsity_in_unit_steps() -> None:
    config = SearchConfig.preset("paper", targets="sparsity=0.3", step_ratio=0.05, rounds=3, samples=5, recover_every=0)
    found = run(Chain().problem(), config)
    assert found.metrics["sparsity"] == pytest.approx(0.3, rel=0.01)
    assert len(found.history) == 6
    assert math.isclose(found.history[0]["epsilon"], 0.0, abs_tol=0.5)


def test_a_measured_target_is_not_looked_up_for_draws_that_are_not_scored() -> None:
    looked_up: list[int] = []

    class Timed(Chain):
        def cost(self, removed: IntArray) -> dict[str, float]:
            looked_up.append(1)
            return super().cost(removed)

    counts = {}
    for target in ("latency=0.6", "macs=0.5"):
        looked_up.clear()
        run(Timed().problem(), SearchConfig(targets=target, samples=2, rounds=6))
        counts[target] = len(looked_up)
    assert counts["latency=0.6"] < counts["macs=0.5"] / 4


def narrow(**options: Any) -> RLPruner:
    """A search of three groups, the budget of which most actions meet by the same few architectures."""
    chain = Chain((3, 4, 6), SCALE[:3])
    config = SearchConfig(samples=3, evaluations=None, **options)
    return RLPruner(Budget(chain.problem().space, config.points[0]), config)


def test_where_all_draws_come_to_what_is_known_the_noise_grows() -> None:
    strategy, widest = narrow(), 1.0
    known: set[tuple[int, ...]] = set()
    tell(strategy, 0.9)
    while not strategy.budget.fits(strategy.at):
        before, again = strategy.widening, strategy.recall  # a resumed search goes on as widely
        vectors = tell(strategy, 0.5)
        if {tuple(v) for v in vectors} <= known and not strategy.budget.fits(strategy.at):
            assert strategy.widening > before or before == rl_pruner.WIDEST
        known |= {tuple(v) for v in vectors}
        widest = max(widest, strategy.widening)
        memory = strategy.memory()
        again(memory)
        assert strategy.memory() == memory
    assert widest > 1.0


def test_the_papers_noise_never_grows() -> None:
    strategy = narrow(screen=1)
    tell(strategy, 0.9)
    while not strategy.budget.fits(strategy.at):
        tell(strategy, 0.5)
        assert strategy.widening == 1.0
