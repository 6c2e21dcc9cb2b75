"""Shares that add up to one, and whole numbers spread by them."""

from __future__ import annotations

import numpy as np

from fxprune.driver.problem import FloatArray, IntArray


def proportional(sizes: IntArray, floor: float) -> FloatArray:
    """The pruning distribution that spreads removals evenly: entries proportional to ``sizes``, shape ``(groups,)``, sum 1."""
    return on_simplex(sizes / max(int(sizes.sum()), 1), floor)


def on_simplex(values: FloatArray, floor: float) -> FloatArray:
    """Clamp to at least ``floor`` and divide by the sum."""
    clamped: FloatArray = np.maximum(np.asarray(values, dtype=np.float64), floor)
    return clamped / float(clamped.sum())


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
