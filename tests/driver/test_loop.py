"""The loop: its outcome, baselines, limits, recovery, Pareto runs, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fxprune.driver import Problem, Progress, SearchConfig, run
from fxprune.driver.outcome import SearchOutcome
from fxprune.driver.problem import IntArray
from fxprune.errors import EvaluationError, SearchError, TargetError
from fxprune.testing.synthetic import Chain

SMALL: dict[str, Any] = {"samples": 4, "rounds": 4}


def changed(problem: Problem, **fields: Any) -> Problem:
    return dataclasses.replace(problem, **fields)


@pytest.mark.parametrize("strategy", ["rl-pruner", "uniform", "random", "magnitude"])
@pytest.mark.parametrize("target", ["macs=0.5", "params=0.4", "sparsity=0.4", "latency=0.6"])
def test_every_strategy_meets_the_target_within_one_percent(strategy: str, target: str) -> None:
    metric, _, value = target.partition("=")
    found = run(Chain().problem(), SearchConfig(strategy=strategy, targets=target, **SMALL))
    assert found.metrics[metric] == pytest.approx(float(value), rel=0.01)
    assert found.targets == (target,)
    assert found.baselines["original"].metrics["macs"] == 1
    assert found.baselines["uniform"].metrics[metric] == pytest.approx(float(value), rel=0.01)


def test_outcome_is_the_best_on_target_and_counts_scorings() -> None:
    chain = Chain()
    found = run(chain.problem(), SearchConfig(**SMALL))
    assert found.evaluations == chain.calls
    on_target = [c["reward"] for record in found.history for c in record["candidates"] if c["on_target"]]
    assert found.reward == max([*on_target, found.baselines["uniform"].reward])
    assert found.metrics["accuracy"] == Chain().score(found.removed)["accuracy"]


@pytest.mark.parametrize("target", ["macs=0.5", "params=0.3", "sparsity=0.4"])
def test_what_lies_halfway_to_uniform_is_on_the_budget_and_not_scored(target: str) -> None:
    chain, metric = Chain(), target.partition("=")[0]
    found = run(chain.problem(), SearchConfig(targets=target, **SMALL))
    assert found.halfway is not None and found.evaluations == chain.calls
    even = found.baselines["uniform"].removed
    shares = {"sparsity": found.halfway.sum() / chain.problem().space.widths.sum(), **chain.problem().cost(found.halfway)}
    assert shares[metric] == pytest.approx(float(target.partition("=")[2]), rel=0.011)
    for end in (found.removed, even):
        assert np.abs(found.halfway - end).sum() < np.abs(found.removed - even).sum()
    assert SearchOutcome.of(json.loads(json.dumps(found.state()))).halfway.tolist() == found.halfway.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(("target", "strategy"), [("latency=0.6", "rl-pruner"), ("macs=0.5", "uniform")])
def test_nothing_lies_halfway_to_itself_and_times_are_not_guessed(target: str, strategy: str) -> None:
    assert run(Chain().problem(), SearchConfig(targets=target, strategy=strategy, **SMALL)).halfway is None


def test_history_is_json_with_one_record_a_step() -> None:
    found = run(Chain().problem(), SearchConfig(steps=3, **SMALL))
    records = json.loads(json.dumps(found.history))
    assert [record["step"] for record in records] == [1, 2, 3]
    shares = [record["macs"] for record in records]
    assert shares == sorted(shares, reverse=True)
    for record in records:
        assert len(record["rounds"]) <= 5
        assert {"reward", "accuracy", "macs", "params", "sparsity", "on_target"} <= record["candidates"][0].keys()
    assert records[-1]["evaluations"] <= found.evaluations


def test_reward_flops_prefers_fewer_macs_where_the_target_leaves_them_open() -> None:
    plain = run(Chain().problem(), SearchConfig(targets="sparsity=0.3"))
    flops = run(Chain().problem(), SearchConfig(targets="sparsity=0.3", reward="flops", alpha=2.0))
    assert flops.metrics["macs"] < plain.metrics["macs"]
    assert flops.reward == pytest.approx(flops.metrics["accuracy"] + 2.0 * (1 - flops.metrics["macs"]))


def test_own_reward_function_may_ask_for_any_cost() -> None:
    def reward(metrics: Mapping[str, float]) -> float:
        return metrics["accuracy"] - metrics["memory"]

    found = run(Chain().problem(), SearchConfig(reward=reward, **SMALL))
    assert found.reward == pytest.approx(found.metrics["accuracy"] - found.metrics["memory"])
    with pytest.raises(SearchError, match="'joules'"):
        run(Chain().problem(), SearchConfig(reward=lambda metrics: metrics["joules"]))


def test_what_is_wrong_with_a_reward_function_is_said_in_a_line() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda metrics: metrics["accuracy"] / 0, r"raised ZeroDivisionError: .* \(test_loop.py:\d+\)"),
        (lambda metrics: None, "returned None; it must return a number"),
        (lambda metrics: float("nan"), "the reward of the original network is nan; check the reward function"),
    ]
    for reward, message in wrong:
        with pytest.raises((EvaluationError, SearchError), match=message):
            run(Chain().problem(), SearchConfig(reward=reward, **SMALL))


def test_evaluations_are_bounded() -> None:
    for limit in (5, 23, 60):
        chain = Chain()
        found = run(chain.problem(), SearchConfig(evaluations=limit, rounds=100, steps=2))
        assert chain.calls == found.evaluations <= limit
        assert found.metrics["macs"] == pytest.approx(0.5, rel=0.01)


def test_unreachable_target_names_and_keeps_the_nearest() -> None:
    floor = 0.1 + 0.9 * Chain().cost(Chain().units - 1)["macs"]
    with pytest.raises(TargetError, match=r"target params=0\.05 cannot be met.*params=0\.1") as caught:
        run(Chain().problem(), SearchConfig(targets="params=0.05"))
    nearest = caught.value.nearest
    assert nearest.removed.tolist() == (Chain().units - 1).tolist()
    assert nearest.metrics["params"] == pytest.approx(floor)


def test_units_too_coarse_for_the_target() -> None:
    chain = Chain((2, 2, 2, 2, 2, 2))
    with pytest.raises(TargetError, match="too coarse") as caught:
        run(chain.problem(), SearchConfig(targets="macs=0.55", **SMALL))
    assert abs(caught.value.nearest.metrics["macs"] - 0.55) < 0.1


@pytest.mark.parametrize("strategy", ["rl-pruner", "uniform", "random", "magnitude"])
def test_channels_in_multiples_that_never_meet_the_target_end_and_say_so(strategy: str) -> None:
    chain = Chain((16, 16, 16, 16, 16, 16))
    with pytest.raises(TargetError, match="channels in multiples of 8 are too coarse") as caught:
        run(chain.coarse(8), SearchConfig(targets="macs=0.94", strategy=strategy, **SMALL))
    assert caught.value.nearest.metrics["macs"] == pytest.approx(0.898, abs=0.001)


@pytest.mark.parametrize("strategy", ["rl-pruner", "uniform", "random", "magnitude"])
def test_the_nearest_is_a_pruned_network_even_where_the_original_is_nearer(strategy: str) -> None:
    chain = Chain((16, 16, 16, 16, 16, 16))
    with pytest.raises(TargetError, match=r"nearest found: macs=0\.8978") as caught:
        run(chain.coarse(8), SearchConfig(targets="macs=0.97", strategy=strategy, **SMALL))
    assert caught.value.nearest.removed.any()


def test_a_point_of_a_pareto_run_that_cannot_be_met_leaves_the_others_and_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"target macs=0\.0001 cannot be met") as caught:
        run(Chain().problem(), SearchConfig(targets="macs=0.7,0.0001", **SMALL))
    nearest = caught.value.nearest
    assert [point.targets for point in nearest.pareto] == [("macs=0.7",), ("macs=0.0001",)]
    assert nearest.removed.tolist() == nearest.pareto[-1].removed.tolist() == (Chain().units - 1).tolist()
    assert nearest.pareto[0].metrics["macs"] == pytest.approx(0.7, rel=0.01)
    assert len(nearest.history) == len(nearest.pareto[0].history) > 0


def test_progress_is_told() -> None:
    seen: list[Progress] = []
    run(Chain().problem(), SearchConfig(steps=2, **SMALL), on_event=seen.append)
    assert seen[0].kind == "start"
    assert seen[-1].kind == "end"
    assert sum(event.kind == "step" for event in seen) == 2
    counts = [event.evaluations for event in seen]
    assert counts == sorted(counts)
    assert seen[-1].share == pytest.approx(1, abs=0.02)
    assert seen[-1].best is not None


def test_pareto_run_gives_a_point_each_and_reuses_evaluations() -> None:
    chain = Chain()
    found = run(chain.problem(), SearchConfig(targets="macs=0.7,0.5,0.3", **SMALL))
    assert [round(point.metrics["macs"], 2) for point in found.pareto] == [0.7, 0.5, 0.3]
    assert found.removed.tolist() == found.pareto[-1].removed.tolist()
    assert found.evaluations == chain.calls
    assert len(found.history) == 3
    for mild, harsh in zip(found.pareto, found.pareto[1:], strict=False):
        assert (harsh.removed >= 0).all()
        assert mild.reward >= harsh.reward


def test_the_points_of_a_pareto_run_share_the_evaluations() -> None:
    seen: list[Progress] = []
    config = SearchConfig(targets="macs=0.7,0.5,0.3", evaluations=31, rounds=100, patience=None, steps=1)
    first, second, third = run(Chain().problem(), config, on_event=seen.append).pareto
    assert 8 <= first.evaluations <= 11 and 18 <= second.evaluations <= 21 and 28 <= third.evaluations <= 31
    done = [event.done for event in seen]
    assert done == sorted(done) and done[-1] == 1
    assert [event.done for event in seen if event.kind == "end"][0] == pytest.approx(1 / 3, abs=0.05)


def test_recovery_between_steps() -> None:
    trained: list[list[int]] = []
    chain = Chain()
    boost = {"by": 0.0}

    def score(removed: IntArray) -> Mapping[str, float]:
        return {"accuracy": chain.score(removed)["accuracy"] + boost["by"]}

    def recover(removed: IntArray) -> None:
        trained.append(removed.tolist())
        boost["by"] += 0.01

    problem = changed(chain.problem(), score=score, recover=recover)
    found = run(problem, SearchConfig(steps=4, recover_every=1, **SMALL))
    assert len(trained) == 3  # not after the last step: what comes then is the final training
    assert trained[0] == found.history[0]["removed"]
    assert [step.get("recover_seconds", -1.0) >= 0 for step in found.history] == [True, True, True, False]
    assert found.metrics["accuracy"] == pytest.approx(chain.score(found.removed)["accuracy"] + 0.03)


def test_recovery_needs_something_that_trains() -> None:
    with pytest.raises(SearchError, match="recover_every"):
        run(Chain().problem(), SearchConfig(recover_every=1))


@pytest.mark.parametrize(
    ("scored", "message"),
    [({"accuracy": float("nan")}, "'accuracy'.*is nan"), ({"loss": 1.0}, "no 'accuracy'"), ({"accuracy": 1, "x": float("inf")}, "'x'")],
)
def test_scores_that_are_no_numbers_are_refused(scored: dict[str, float], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        run(changed(Chain().problem(), score=lambda removed: scored), SearchConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"noise": float("nan")}, "noise"),
        ({"floor": 0.0}, "floor"),
        ({"clip": 1.0}, "clip"),
        ({"step_by": "channels"}, "one of cost, units"),
        ({"epsilon_decay": "steep"}, "one of constant"),
        ({"targets": "macs=2"}, "out of range"),
        ({"evaluations": 0}, "evaluations"),
        ({"seed": -1}, "seed"),
        ({"jobs": "2"}, "jobs is '2'; it must be a whole number"),
        ({"rounds": 1.5}, "rounds is 1.5; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number, or none"),
        ({"clip": "0.5"}, "clip is '0.5'; it must be a number, or none"),
        ({"blocks": 1}, "blocks is 1; it must be True or False"),
        ({"norms": None}, "norms is None; it must be a text"),
        ({"costs": 3}, "costs is 3; it must be a mapping"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        SearchConfig(**options)


def test_numbers_of_numpy_are_options_too() -> None:
    options: dict[str, Any] = {"rounds": np.int64(3), "noise": np.float32(0.5)}
    config = SearchConfig(**options)
    assert json.loads(json.dumps(config.described()))["rounds"] == 3 and config.noise == 0.5


def test_presets() -> None:
    paper = SearchConfig.preset("paper", targets="macs=0.4")
    assert (paper.samples, paper.rounds, paper.noise, paper.step_length, paper.clip, paper.epsilon) == (10, 10, 0.04, 0.1, 0.25, 0.4)
    assert (paper.discount, paper.floor, paper.step_ratio, paper.epsilon_decay, paper.importance) == (0.9, 1e-5, 0.01, "cosine", "taylor")
    assert paper.points[0][0].value == 0.4
    with pytest.raises(SearchError, match="unknown preset 'late'"):
        SearchConfig.preset("late")
    with pytest.raises(SearchError, match="unknown search option 'sample'"):
        SearchConfig.preset("paper", sample=3)


@pytest.mark.parametrize(
    ("reward", "message"), [("speed", "unknown reward"), ("math:nothing", "has no 'nothing'"), ("math:pi", "no function")]
)
def test_unknown_rewards_are_refused(reward: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        run(Chain().problem(), SearchConfig(reward=reward))


def test_magnitude_needs_scores() -> None:
    with pytest.raises(SearchError, match="unit_scores"):
        run(changed(Chain().problem(), unit_scores=None), SearchConfig(strategy="magnitude"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ()}, "no prunable group"),
        ({"names": ("a",) * 6}, "unique"),
        ({"units": np.array([3, 4])}, "6 names"),
        ({"unit_scores": [np.ones(3)] * 6}, "unit_scores"),
    ],
)
def test_problems_that_do_not_add_up_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        changed(Chain().problem(), **fields)


class Rough:
    """A score that is off by a fixed amount for each architecture; remembers what it was asked for."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.calls = 0

    def __call__(self, removed: IntArray) -> Mapping[str, float]:
        self.calls += 1
        off = 0.05 * np.random.default_rng(removed).random()
        return {"accuracy": 0.95 - float((self.chain.sensitivity * (removed / self.chain.units) ** 2).sum()) - off}


@pytest.mark.parametrize("evaluations", [None, 40])
def test_finalists_are_scored_in_full_and_nothing_else(evaluations: int | None) -> None:
    chain = Chain()
    rough = Rough(chain)
    problem = changed(chain.problem(), rough=rough)
    found = run(problem, SearchConfig(finalists=3, evaluations=evaluations, **SMALL))
    assert chain.calls == 5  # and the two baselines
    assert found.evaluations == chain.calls + rough.calls
    assert evaluations is None or found.evaluations <= evaluations
    assert found.reward == Chain().score(found.removed)["accuracy"]
    assert found.baselines["original"].reward == pytest.approx(0.95)
    roughly = sorted((c["reward"] for record in found.history for c in record["candidates"] if c["on_target"]), reverse=True)
    assert rough(found.removed)["accuracy"] in roughly[:3]


def test_without_finalists_the_rough_score_is_not_asked() -> None:
    chain = Chain()
    rough = Rough(chain)
    run(changed(chain.problem(), rough=rough), SearchConfig(**SMALL))
    assert rough.calls == 0


def test_likeness_stands_for_accuracy_where_it_is_scored() -> None:
    chain = Chain()

    def score(removed: IntArray) -> Mapping[str, float]:
        return {**chain.score(removed), "likeness": 0.5}

    found = run(changed(chain.problem(), score=score), SearchConfig(likeness=0.25, **SMALL))
    assert found.reward == pytest.approx(0.75 * found.metrics["accuracy"] + 0.25 * 0.5)
    plain = run(chain.problem(), SearchConfig(likeness=0.25, **SMALL))
    assert plain.reward == plain.metrics["accuracy"]
