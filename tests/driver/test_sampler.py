"""The Monte Carlo sampler: actions on the simplex, counts that add up, trajectories of the right shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.driver.problem import FloatArray, IntArray
from fxprune.driver.simplex import on_simplex, proportional, spread
from fxprune.driver.strategies.rl.sampler import perturb, trajectories


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@given(data=st.data(), groups=st.integers(1, 12))
def test_counts_add_up_and_fit(data: st.DataObject, groups: int) -> None:
    room = np.array(data.draw(st.lists(st.integers(0, 70), min_size=groups, max_size=groups)), dtype=np.int64)
    weights = data.draw(st.lists(st.floats(0, 1), min_size=groups, max_size=groups))
    count = data.draw(st.integers(0, int(room.sum())))
    counts = spread(on_simplex(np.array(weights), 1e-5), count, room)
    assert int(counts.sum()) == count
    assert (counts >= 0).all()
    assert (counts <= room).all()


@given(action=st.lists(st.floats(0.01, 1), min_size=2, max_size=8), count=st.integers(0, 500))
def test_counts_are_the_rounded_shares_while_there_is_room(action: list[float], count: int) -> None:
    weights = on_simplex(np.array(action), 1e-5)
    counts = spread(weights, count, np.full(len(action), 1000))
    assert np.abs(counts - weights * count).max() < 1 + 1e-6


def test_spread_by_hand() -> None:
    # Shares 3.5, 2.45, 1.05 of 7: floors 3, 2, 1 leave one unit, which the largest fraction takes.
    action = np.array([0.5, 0.35, 0.15])
    assert spread(action, 7, np.array([9, 9, 9])).tolist() == [4, 2, 1]
    # With room for 2 in the first group its surplus goes to the others as 0.35 to 0.15: 5 * 0.7 = 3.5 and 1.5, the tie to the first.
    assert spread(action, 7, np.array([2, 9, 9])).tolist() == [2, 4, 1]
    assert spread(np.array([0.5, 0.5]), 1, np.array([9, 9])).tolist() == [1, 0]


def test_spread_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="room for 0 to 3"):
        spread(np.array([1.0]), 4, np.array([3]))


@given(seed=st.integers(0, 10_000), noise=st.floats(0, 5))
def test_actions_stay_on_the_simplex(seed: int, noise: float) -> None:
    action = perturb(np.array([0.7, 0.2, 0.1]), noise, 1e-5, generator(seed))
    assert action.sum() == pytest.approx(1)
    assert action.min() > 0


def test_noise_is_one_uniform_draw_times_its_width() -> None:
    policy = np.full(400, 1 / 400)
    rng = generator(3)
    twin = generator(3)
    moved = perturb(policy, 1e-4, 1e-9, rng)
    width = 1e-4 * twin.random()
    np.testing.assert_allclose(moved, on_simplex(policy + width * twin.standard_normal(400), 1e-9))
    assert np.std(moved - policy) == pytest.approx(width, rel=0.1)


def test_first_policy_is_proportional_to_sizes() -> None:
    np.testing.assert_allclose(proportional(np.array([10, 30]), 1e-5), [0.25, 0.75])


def grown(depth: int, limit: int = 100) -> list[int]:
    """Parents of the nodes of trajectories whose action removes one unit, up to ``limit``."""

    def advance(removed: IntArray, action: FloatArray, level: int) -> IntArray:
        return np.minimum(removed + 1, limit)

    policy = np.full(3, 1 / 3)
    nodes = trajectories(
        np.zeros(3, dtype=np.int64),
        policy,
        advance,
        samples=4,
        depth=depth,
        scaling=2,
        noise=0.1,
        floor=1e-5,
        rng=generator(),
    )
    return [node.parent for node in nodes]


def test_trajectories_are_depth_first_with_fewer_children_each_level() -> None:
    assert grown(1) == [-1] * 4
    assert grown(2) == [-1, 0, 0, -1, 3, 3, -1, 6, 6, -1, 9, 9]
    # The third level has 4 / 2^2 = 1 child of each.
    assert grown(3) == [-1, 0, 1, 0, 3, -1, 5, 6, 5, 8, -1, 10, 11, 10, 13, -1, 15, 16, 15, 18]


def test_trajectories_end_where_nothing_more_goes() -> None:
    assert grown(3, limit=1) == [-1] * 4
