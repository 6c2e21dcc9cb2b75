"""Monte Carlo sampler: noisy actions around the policy, and the trajectories that they lead along (Wang 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.driver.problem import FloatArray, IntArray
from fxprune.driver.simplex import on_simplex

Advance = Callable[[IntArray, FloatArray, int], IntArray]
"""(architecture, action, level of the trajectory) -> the architecture that the action leads to."""
Choose = Callable[[Sequence[IntArray]], int]
"""Architectures that drawn actions lead to -> the number of the one that is taken."""


@dataclass(frozen=True)
class Node:
    """One sampled architecture. ``parent``: position of its parent in the list of nodes, -1 for a child of the current one."""

    parent: int
    action: FloatArray
    removed: IntArray


def perturb(policy: FloatArray, noise: float | FloatArray, floor: float, rng: np.random.Generator) -> FloatArray:
    """An action: the policy plus Gaussian noise whose standard deviation is ``noise`` times one uniform draw."""
    deviation = noise * rng.random()
    return on_simplex(policy + deviation * rng.standard_normal(policy.shape), floor)


def trajectories(
    start: IntArray,
    policy: FloatArray,
    advance: Advance,
    *,
    samples: int,
    depth: int,
    scaling: float,
    noise: float | FloatArray,
    floor: float,
    rng: np.random.Generator,
    draws: int = 1,
    choose: Choose = lambda _: 0,
) -> list[Node]:
    """Sample trajectories from ``start`` depth first; level k draws ``samples / scaling^k`` children of each node, one at least.

    Each child is the one of ``draws`` drawn that ``choose`` takes.
    A child equal to its parent (the target was reached already) ends its branch and is not listed again below the first level.
    """
    nodes: list[Node] = []

    def grow(parent: int, removed: IntArray, level: int) -> None:
        for _ in range(max(1, int(samples / scaling**level))):
            actions = [perturb(policy, noise, floor, rng) for _ in range(draws)]
            children = [advance(removed, action, level) for action in actions]
            taken = choose(children)
            action, child = actions[taken], children[taken]
            if level > 0 and np.array_equal(child, removed):
                return
            nodes.append(Node(parent, action, child))
            if level + 1 < depth:
                grow(len(nodes) - 1, child, level + 1)

    grow(-1, start, 0)
    return nodes
