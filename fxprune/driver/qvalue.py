"""Q-value evaluator: rewards looked ahead along the sampled trajectories, and the memo of what was scored (Wang 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fxprune.driver.problem import IntArray
from fxprune.driver.sampler import Node


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


class Memo:
    """Metrics of the architectures scored so far, by their unit counts; in the order of scoring."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], dict[str, float]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, removed: IntArray) -> bool:
        return tuple(removed.tolist()) in self._known

    def __getitem__(self, removed: IntArray) -> dict[str, float]:
        return self._known[tuple(removed.tolist())]

    def __setitem__(self, removed: IntArray, metrics: dict[str, float]) -> None:
        self._known[tuple(removed.tolist())] = metrics

    def __iter__(self) -> Iterator[IntArray]:
        return (np.array(key, dtype=np.int64) for key in self._known)

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        self._known.clear()

    def state(self) -> list[Any]:
        """The memo as JSON."""
        return [[list(key), metrics] for key, metrics in self._known.items()]

    def restore(self, state: list[Any]) -> None:
        """Take up what ``state`` returned."""
        self._known = {tuple(key): dict(metrics) for key, metrics in state}
