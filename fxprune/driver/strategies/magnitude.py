"""Magnitude: one ranking of all units of all groups by importance, the least important first, until the budget is met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.driver.budget import Budget
from fxprune.driver.problem import IntArray
from fxprune.driver.strategies.base import Scored, Strategy
from fxprune.errors import SearchError


class Magnitude(Strategy):
    """One candidate: the global ranking's allocation on the budget."""

    def propose(self) -> list[IntArray]:
        return [global_ranking(self.budget)] if self.step == 0 else []

    def learn(self, outcomes: Sequence[Scored]) -> None:
        """Nothing to learn from a single candidate."""


def global_ranking(budget: Budget) -> IntArray:
    """The removal vector that one ranking over all groups comes to; scores are taken relative to their group's mean, so that groups of
    unlike sizes and fan-ins compare. Raises ``SearchError`` where the problem has no unit scores."""
    space = budget.space
    if space.unit_scores is None:
        raise SearchError("ranking by magnitude needs unit scores; give the problem unit_scores, or choose an importance other than none")
    scores = [np.sort(s) / max(float(np.mean(s)), 1e-12) for s in space.unit_scores]
    scores[len(scores) - space.blocks :] = [s[:1] for s in scores[len(scores) - space.blocks :]]  # no block is ranked
    # All but the last unit of each group may go; a stable sort keeps ties in the order of the groups.
    values = np.concatenate([s[:-1] for s in scores])
    owner = np.repeat(np.arange(len(scores)), [len(s) - 1 for s in scores])
    order = owner[np.argsort(values, kind="stable")]

    def first(count: int) -> IntArray:
        return np.bincount(order[:count], minlength=len(scores)).astype(np.int64)

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if budget.excess(first(middle)) <= 0:
            high = middle
        else:
            low = middle
    return budget.refined(first(high), space.zeros())
