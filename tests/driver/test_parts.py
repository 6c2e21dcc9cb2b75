"""Update rule, epsilon, look-ahead and replay buffer against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fxprune.driver.memo import Memo
from fxprune.driver.strategies.rl.buffer import Entry, ReplayBuffer
from fxprune.driver.strategies.rl.epsilon import epsilon_at
from fxprune.driver.strategies.rl.qvalue import q_values
from fxprune.driver.strategies.rl.sampler import Node
from fxprune.driver.strategies.rl.update import updated

HALF = np.array([0.5, 0.5])
ZERO = np.zeros(2, dtype=np.int64)


def test_update_moves_by_step_length() -> None:
    # 0.5 + 0.1 * (0.8 - 0.5) = 0.53 and 0.47; the sum is 1 already.
    moved = updated(HALF, np.array([0.8, 0.2]), step_length=0.1, clip=None, floor=1e-5)
    np.testing.assert_allclose(moved, [0.53, 0.47], rtol=1e-12)


def test_update_clips_each_ratio_then_renormalises() -> None:
    # Unclipped: 0.1 + 0.5 * (0.7 - 0.1) = 0.4 and 0.9 + 0.5 * (0.3 - 0.9) = 0.6; ratios 4 and 0.667 are clipped to 1.25 and 0.75,
    # so 0.125 and 0.675, and over their sum 0.8: 0.15625 and 0.84375.
    moved = updated(np.array([0.1, 0.9]), np.array([0.7, 0.3]), step_length=0.5, clip=0.25, floor=1e-5)
    np.testing.assert_allclose(moved, [0.15625, 0.84375], rtol=1e-12)


def test_update_keeps_every_entry_above_the_floor() -> None:
    moved = updated(HALF, np.array([1.0, 0.0]), step_length=1.0, clip=None, floor=0.001)
    np.testing.assert_allclose(moved, [1 / 1.001, 0.001 / 1.001], rtol=1e-12)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        # 40 steps, decay over the first 4: progress 0, 1/4, 1/2, 3/4, then done.
        ("constant", [0.4, 0.4, 0.4, 0.4, 0.0]),
        ("linear", [0.4, 0.3, 0.2, 0.1, 0.0]),
        ("cosine", [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5)), 0.0]),
    ],
)
def test_epsilon_decays_over_the_first_tenth(decay: str, expected: list[float]) -> None:
    values = [epsilon_at(step, 40, start=0.4, decay=decay) for step in range(5)]
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_look_ahead_by_hand() -> None:
    # Two children of the present architecture with rewards 1.0 and 0.8. The first has children of 0.5 and 0.7, the second of 2.0.
    # Q = 1.0 + 0.9 * 0.7 = 1.63 and 0.8 + 0.9 * 2.0 = 2.6; leaves are worth their rewards.
    parents, rewards = [-1, 0, 0, -1, 3], [1.0, 0.5, 0.7, 0.8, 2.0]
    nodes = [Node(parent, HALF, ZERO) for parent in parents]
    np.testing.assert_allclose(q_values(nodes, rewards, 0.9, 2), [1.63, 0.5, 0.7, 2.6, 2.0])


def test_look_ahead_repeats_the_reward_of_a_trajectory_that_ended() -> None:
    # Depth 3: the first node reached the target at once, Q = 1 + 0.9 * (1 + 0.9 * 1) = 2.71; the second went on for one more level,
    # Q = 0.5 + 0.9 * (1 + 0.9 * 1) = 2.21, where its child's own Q is 1.9.
    nodes = [Node(-1, HALF, ZERO), Node(-1, HALF, ZERO), Node(1, HALF, ZERO)]
    np.testing.assert_allclose(q_values(nodes, [1.0, 0.5, 1.0], 0.9, 3), [2.71, 2.21, 1.9])


def test_depth_one_is_the_reward() -> None:
    assert q_values([Node(-1, HALF, ZERO)], [0.3], 0.9, 1) == [0.3]


def entry(q: float, *removed: int) -> Entry:
    return Entry(q, HALF, np.array(removed, dtype=np.int64), accuracy=q)


def test_buffer_keeps_the_best_in_order() -> None:
    buffer = ReplayBuffer(2)
    for q, unit in ((0.2, 1), (0.9, 2), (0.1, 3), (0.5, 4)):
        buffer.add(entry(q, unit, 0))
    assert [e.q for e in buffer] == [0.9, 0.5]
    assert buffer.best.removed.tolist() == [2, 0]


def test_buffer_holds_an_architecture_once() -> None:
    buffer = ReplayBuffer(3)
    for q in (0.2, 0.9, 0.5):
        buffer.add(entry(q, 1, 1))
    assert [e.q for e in buffer] == [0.9]


def test_buffer_prefers_the_first_of_equals() -> None:
    buffer = ReplayBuffer(1)
    buffer.add(entry(0.5, 1, 0))
    buffer.add(entry(0.5, 2, 0))
    assert buffer.best.removed.tolist() == [1, 0]


def test_buffer_state_round_trip() -> None:
    buffer, other = ReplayBuffer(3), ReplayBuffer(3)
    buffer.add(entry(0.5, 1, 0))
    buffer.add(entry(0.1 + 0.2, 2, 0))
    other.restore(buffer.state())
    assert other.state() == buffer.state()


def test_memo_is_keyed_by_unit_counts() -> None:
    memo = Memo()
    memo[np.array([1, 2])] = {"accuracy": 0.5}
    assert np.array([1, 2]) in memo
    assert np.array([2, 1]) not in memo
    other = Memo()
    other.restore(memo.state())
    assert other[np.array([1, 2], dtype=np.int32)] == {"accuracy": 0.5}
