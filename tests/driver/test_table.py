"""The strategy that reads an allocation off an error table, and what begins with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from fxprune.driver import Problem, Scored, SearchConfig, run
from fxprune.driver.budget import Budget
from fxprune.driver.problem import IntArray
from fxprune.driver.strategies.rl.rl_pruner import RLPruner
from fxprune.driver.strategies.table import from_table
from fxprune.errors import SearchError
from fxprune.testing.synthetic import Chain


class Even:
    """A table that bounds MACs and parameters alone: it empties the layers that matter little, all by the same share."""

    metrics = ("macs", "params")

    def __init__(self, chain: Chain) -> None:
        self.chain, self.asked = chain, 0

    def allocate(self, bounds: Mapping[str, float]) -> IntArray:
        self.asked += 1
        removed: IntArray = np.zeros(len(self.chain.units), dtype=np.int64)
        for share in np.linspace(0, 2.5, 501):
            wanted = share * self.chain.units * np.array([1, 0.4, 1, 0.4, 1, 0.4])
            removed = np.minimum(self.chain.units - 1, wanted.astype(np.int64))
            cost = self.chain.cost(removed)
            if all(cost[metric] <= bound for metric, bound in bounds.items()):
                break
        return removed


def tabled(problem: Problem | None = None) -> tuple[Problem, Chain, Even]:
    chain = Chain()
    table = Even(chain)
    return dataclasses.replace(problem or chain.problem(), table=table), chain, table


def budget(problem: Problem, *targets: str) -> Budget:
    return Budget(problem.space, SearchConfig(targets=targets).points[0])


def test_two_baselines_and_the_result_are_all_that_is_scored() -> None:
    problem, chain, table = tabled()
    outcome = run(problem, SearchConfig(strategy="table", targets=("macs=0.5",)))
    assert outcome.evaluations == 3 and table.asked == 1
    assert outcome.metrics["macs"] == pytest.approx(0.5, abs=0.005)
    assert outcome.reward > outcome.baselines["uniform"].reward


def test_every_point_of_a_pareto_run_asks_the_one_table() -> None:
    problem, _, table = tabled()
    outcome = run(problem, SearchConfig(strategy="table", targets=("macs=0.7,0.5,0.3",)))
    assert table.asked == 3 and outcome.evaluations == 7  # the original is scored once
    assert [point.metrics["macs"] for point in outcome.pareto] == pytest.approx([0.7, 0.5, 0.3], abs=0.005)


@pytest.mark.parametrize("targets", [("latency=0.6",), ("latency=0.6", "params=0.8"), ("memory=0.5",), ("sparsity=0.4",)])
def test_a_cost_that_the_table_cannot_bound_is_met_all_the_same(targets: tuple[str, ...]) -> None:
    problem, _, table = tabled()
    one = budget(problem, *targets)
    assert one.met(from_table(one)) and table.asked > 1


def test_rounding_is_respected() -> None:
    chain = Chain()
    problem = dataclasses.replace(chain.coarse(8), table=Even(chain))
    one = budget(problem, "macs=0.5")
    found = from_table(one)
    assert ((chain.units - found) % 8 == 0).all() and one.fits(found)


def test_without_a_table_it_says_what_to_do() -> None:
    with pytest.raises(SearchError, match=r'strategy "table" reads errors off calibration data; pass calibration='):
        run(Chain().problem(), SearchConfig(strategy="table"))


def test_rl_pruner_takes_the_tables_allocation_first() -> None:
    problem, _, _ = tabled()
    config = SearchConfig(targets=("macs=0.5",), evaluations=20)
    strategy = RLPruner(budget(problem, "macs=0.5"), config)
    original = strategy.ask()
    strategy.tell([Scored(original[0], 0.95, {"accuracy": 0.95})])
    first = strategy.ask()
    assert np.array_equal(first[0], from_table(strategy.budget)) and len(first) == config.samples
    assert run(problem, config).reward >= run(problem, dataclasses.replace(config, strategy="table")).reward


def test_rl_pruner_begins_with_the_best_of_what_was_tried() -> None:
    problem, chain, _ = tabled()
    wanted = np.round(0.3 * chain.units).astype(np.int64)
    asked: list[Mapping[str, float]] = []

    def tried(bounds: Mapping[str, float]) -> IntArray:
        asked.append(bounds)
        return wanted

    problem = dataclasses.replace(problem, tried=tried)
    strategy = RLPruner(budget(problem, "macs=0.5"), SearchConfig(targets=("macs=0.5",), evaluations=20))
    original = strategy.ask()
    assert not asked  # it takes its time, which a run that is resumed later does not spend
    strategy.tell([Scored(original[0], 0.95, {"accuracy": 0.95})])
    best, table, *others = strategy.ask()
    assert asked == [{"macs": 0.5}] and strategy.budget.met(best)
    assert np.array_equal(best, strategy.budget.refined(wanted, np.zeros_like(wanted))) and np.abs(best - wanted).max() <= 2
    assert np.array_equal(table, from_table(strategy.budget))
    np.testing.assert_allclose(strategy.policy, best / best.sum(), atol=0.01)
    strategy.tell([Scored(v, 0.5, {"accuracy": 0.5}) for v in (best, table, *others)])
    again = RLPruner(strategy.budget, strategy.config)
    again.restore(strategy.state())
    assert all(np.array_equal(a, b) for a, b in zip(again.ask(), strategy.ask(), strict=True)) and len(asked) == 1


def test_even_is_the_papers_start() -> None:
    problem, _, table = tabled()
    assert SearchConfig.preset("paper").first == "even" and SearchConfig.preset("paper").table == "no"
    run(problem, SearchConfig(targets=("macs=0.5",), evaluations=10, first="even"))
    assert table.asked == 0
    with pytest.raises(SearchError, match="first is 'best'; it must be one of table, even"):
        SearchConfig(first="best")
