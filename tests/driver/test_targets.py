"""Targets, the budget, and the projection onto it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.driver.budget import Budget
from fxprune.driver.problem import IntArray
from fxprune.driver.targets import Target, parse
from fxprune.errors import SearchError
from fxprune.testing.synthetic import Chain


def budget(*targets: str, chain: Chain | None = None) -> Budget:
    (point,) = parse(targets)
    return Budget((chain or Chain()).problem().space, point)


def test_parse() -> None:
    assert parse("macs=0.5") == ((Target("macs", 0.5),),)
    assert parse({"macs": 0.5, "params": 0.4}) == ((Target("macs", 0.5), Target("params", 0.4)),)
    assert [point[0].value for point in parse(["macs=0.3,0.7,0.5"])] == [0.7, 0.5, 0.3]
    assert [point[0].value for point in parse("sparsity=0.3,0.6")] == [0.3, 0.6]
    assert parse(["macs=0.7,0.5", "params=0.6"])[1] == (Target("macs", 0.5), Target("params", 0.6))


def test_a_latency_may_be_a_time() -> None:
    ((target,),) = parse("latency=12ms")
    assert target.seconds == pytest.approx(0.012) and str(target) == "latency=12ms"
    assert [str(point[0]) for point in parse({"latency": "8ms,0.5s,9us"})] == ["latency=0.5s", "latency=8ms", "latency=9us"]
    assert target.of(0.048).value == pytest.approx(0.25)
    assert parse(str(target.of(0.048))) == ((target,),)
    with pytest.raises(SearchError, match="latency=12ms: the original takes 11 ms already"):
        target.of(0.011)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("macs=12ms", "only latency is one"),
        ("latency=12ms,0.5", "mixes times and shares"),
        ("latency=0ms", "time above 0"),
        ("latency=12h", "or a time, latency=12ms"),
        ("macs", "METRIC=SHARE"),
        ("macs=half", "must be a number"),
        ("flops=0.5", "unknown target 'flops'"),
        ("macs=0", "out of range"),
        ("macs=1", "out of range"),
        ("macs=1.5", "out of range"),
        ("macs=nan", "out of range"),
        ("macs=0.5,0.5", "twice"),
        (["macs=0.5", "macs=0.4"], "twice"),
        (["macs=0.5,0.4", "params=0.5,0.4"], "only one"),
        ([], "no target"),
        (0.5, 'targets is 0.5; write METRIC=SHARE, as in targets="macs=0.5"'),
        ([0.5], "targets holds 0.5; write each as METRIC=SHARE"),
        ("flops=0.5", r"costs=\{'flops': f\}, on the command line --cost flops=module:function"),
    ],
)
def test_malformed_targets_say_what_to_write(given: str | list[str], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        parse(given)


def test_sparsity_counts_channels_of_all_groups() -> None:
    chain = Chain((10, 10, 20, 20, 30, 30))
    space = chain.problem().space
    removed = np.array([5, 0, 10, 0, 15, 0])
    assert space.sparsity(removed) == pytest.approx(30 / 120)
    assert Target("sparsity", 0.6).remaining == pytest.approx(0.4)
    assert Target("sparsity", 0.6).shown(0.25) == pytest.approx(0.75)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1), min_size=6, max_size=6),
    target=st.sampled_from(["macs=0.8", "macs=0.5", "macs=0.2", "params=0.4", "sparsity=0.3", "sparsity=0.7", "latency=0.6"]),
)
def test_projection_meets_the_target(weights: list[float], target: str) -> None:
    goal = budget(target)
    removed = goal.project(goal.space.zeros(), np.array(weights) / sum(weights))
    assert goal.met(removed)
    wanted = goal.targets[0]
    assert goal.remaining(removed, wanted.metric) <= wanted.remaining + 1e-12
    assert wanted.shown(goal.remaining(removed, wanted.metric)) == pytest.approx(wanted.value, rel=0.01)
    assert (removed >= 0).all()
    assert (removed <= goal.space.room).all()


def test_projection_goes_from_its_base_and_keeps_the_proportions() -> None:
    goal = budget("macs=0.5")
    base = np.array([1, 2, 3, 4, 5, 6])
    removed = goal.project(base, np.full(6, 1 / 6))
    assert (removed >= base).all()
    assert np.ptp(removed - base) <= 2  # equal shares, but for rounding and the last units given back


def test_several_targets_are_met_at_once() -> None:
    goal = budget("macs=0.5", "params=0.4", "sparsity=0.2")
    removed = goal.uniform()
    costs = goal.costs(removed)
    assert costs["macs"] <= 0.5
    assert costs["params"] <= 0.4
    assert costs["sparsity"] >= 0.2
    assert goal.met(removed)  # parameters bind, and they are met exactly enough
    assert costs["params"] == pytest.approx(0.4, rel=0.01)


def test_coarse_units_are_exchanged_to_come_within_the_tolerance() -> None:
    # Equal steps overshoot in networks this small; no single unit given back mends it, exchanging two does.
    chain = Chain((5, 7, 8, 6, 9, 7))
    goal = budget("macs=0.55", chain=chain)
    for action in (np.full(6, 1 / 6), np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])):
        assert goal.met(goal.project(goal.space.zeros(), action))


@pytest.mark.parametrize("target", ["macs=0.5", "macs=0.3", "params=0.4", "sparsity=0.25"])
def test_channels_in_multiples_meet_the_target_where_some_of_them_do(target: str) -> None:
    chain = Chain((24, 32, 48, 48, 40, 30))
    (point,) = parse(target)
    goal = Budget(chain.coarse(8).space, point)
    drawn = np.random.default_rng(0)
    for _ in range(10):
        action = drawn.random(6)
        removed = goal.project(goal.space.zeros(), action / action.sum())
        assert goal.met(removed) and removed.tolist() == chain.rounded(removed, 8).tolist()


def test_sparsity_counts_what_rounding_leaves_of_a_removal() -> None:
    chain = Chain((16, 16, 16, 16, 16, 16))
    assert chain.coarse(8).space.sparsity(np.full(6, 7)) == 0
    assert chain.coarse(8).space.sparsity(np.full(6, 9)) == pytest.approx(0.5)


def test_a_projection_fits_even_where_no_vector_is_on_target() -> None:
    chain = Chain((16, 16, 16, 16, 16, 16))
    (point,) = parse("macs=0.95")
    goal = Budget(chain.coarse(8).space, point)
    removed = goal.project(goal.space.zeros(), np.full(6, 1 / 6))
    assert goal.fits(removed) and not goal.met(removed)


def test_uniform_takes_the_same_share_everywhere() -> None:
    goal = budget("macs=0.5")
    removed = goal.uniform()
    share = removed.sum() / goal.space.units.sum()
    assert np.abs(removed - share * goal.space.units).max() <= 2


def test_intermediate_bounds_are_shares_of_the_way() -> None:
    goal = budget("macs=0.5")
    halfway = goal.project(goal.space.zeros(), np.full(6, 1 / 6), 0.5)
    assert goal.remaining(halfway, "macs") == pytest.approx(0.75, rel=0.01)
    assert goal.progress(halfway) == pytest.approx(0.5, abs=0.02)
    assert goal.excess(halfway, 0.5) <= 0 < goal.excess(halfway, 1.0)


def test_fitted_brings_a_vector_onto_the_budget() -> None:
    goal = budget("macs=0.5")
    lean = np.array([30, 1, 1, 1, 1, 1])
    assert goal.met(goal.fitted(lean))
    assert goal.fitted(lean).argmax() == 0
    assert goal.met(goal.fitted(goal.space.zeros()))


def test_a_measured_cost_is_looked_up_once_for_a_vector() -> None:
    chain, looked = Chain(), []

    def cost(removed: IntArray) -> dict[str, float]:
        looked.append(removed)
        return chain.cost(removed)

    space = chain.problem().space
    (point,) = parse("latency=0.5")
    goal = Budget(type(space)(space.names, space.units, space.channels, cost), point)
    looked.clear()
    for _ in range(3):
        goal.remaining(space.room, "latency")
        goal.remaining(space.room, "macs")
    assert len(looked) == 1


def test_an_unknown_cost_is_named() -> None:
    space = Chain().problem().space
    (point,) = parse("latency=0.5")
    with pytest.raises(SearchError, match="no cost named 'latency'; it has macs"):
        Budget(type(space)(space.names, space.units, space.channels, lambda removed: {"macs": 1.0}), point)
