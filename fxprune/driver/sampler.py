"""Monte Carlo sampler: noisy actions around the policy, and the trajectories that they lead along (Wang 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.driver.problem import FloatArray, IntArray

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


def proportional(sizes: IntArray, floor: float) -> FloatArray:
    """The pruning distribution that spreads removals evenly: entries proportional to ``sizes``, shape ``(groups,)``, sum 1."""
    return on_simplex(sizes / max(int(sizes.sum()), 1), floor)


def on_simplex(values: FloatArray, floor: float) -> FloatArray:
    """Clamp to at least ``floor`` and divide by the sum."""
    clamped: FloatArray = np.maximum(np.asarray(values, dtype=np.float64), floor)
    return clamped / float(clamped.sum())


def perturb(policy: FloatArray, noise: float, floor: float, rng: np.random.Generator) -> FloatArray:
    """An action: the policy plus Gaussian noise whose standard deviation is ``noise`` times one uniform draw."""
    deviation = noise * rng.random()
    return on_simplex(policy + deviation * rng.standard_normal(policy.shape), floor)


def spread(action: FloatArray, count: int, room: IntArray) -> IntArray:
    """Share ``count`` removals out by ``action``, as whole numbers that add up to exactly ``count``, none above its ``room``.

    What a full group cannot take goes to the others in proportion; remainders go to the largest fractions, ties to the first group.
    ``count`` must lie from 0 to the sum of ``room``.
    """
    if not 0 <= count <= int(room.sum()):
        raise ValueError(f"cannot spread {count} removals: the groups have room for 0 to {int(room.sum())}")
    shares = np.zeros(len(room), dtype=np.float64)
    free = room > 0
    left = float(count)
    while left > 0 and free.any():
        wanted = np.where(free, left * action / action[free].sum(), 0.0)
        full = free & (wanted >= room)
        if not full.any():
            shares += wanted
            break
        shares[full] = room[full]
        left -= float(room[full].sum())
        free &= ~full
    counts = np.minimum(np.floor(shares + 1e-9).astype(np.int64), room)
    rest = count - int(counts.sum())
    while rest > 0:  # more than once only when flooring left several units to groups that are nearly full
        order = np.argsort(-np.where(counts < room, shares - counts, -np.inf), kind="stable")
        takers = order[: min(rest, int((counts < room).sum()))]
        counts[takers] += 1
        rest -= len(takers)
    return counts


def trajectories(
    start: IntArray,
    policy: FloatArray,
    advance: Advance,
    *,
    samples: int,
    depth: int,
    scaling: float,
    noise: float,
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
