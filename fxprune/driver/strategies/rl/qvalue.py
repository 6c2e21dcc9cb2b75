"""Q-value evaluator: rewards looked ahead along the sampled trajectories (Wang 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.driver.strategies.rl.sampler import Node


def q_values(nodes: Sequence[Node], rewards: Sequence[float], discount: float, depth: int) -> list[float]:
    """Q of every node: ``Q(s, a) = R(s') + discount * max over a' of Q(s', a')``.

    ``nodes`` in depth-first order, each after its parent. A node above the last level without children has reached the target: it stays
    where it is, so its look-ahead repeats its own reward. That keeps it comparable with trajectories that go on.
    """
    level = [0] * len(nodes)
    for i, node in enumerate(nodes):
        level[i] = 0 if node.parent < 0 else level[node.parent] + 1
    best_child: dict[int, float] = {}
    values = [0.0] * len(nodes)
    for i in reversed(range(len(nodes))):
        ahead = best_child.get(i)
        if ahead is None:
            ahead = rewards[i] * sum(discount**k for k in range(depth - 1 - level[i]))
        values[i] = rewards[i] + discount * ahead
        parent = nodes[i].parent
        best_child[parent] = max(values[i], best_child.get(parent, -np.inf))
    return values
