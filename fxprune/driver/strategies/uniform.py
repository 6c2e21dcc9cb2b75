"""Uniform: the same share of every group, to the unit; the baseline that any search has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.driver.problem import IntArray
from fxprune.driver.strategies.base import Scored, Strategy


class Uniform(Strategy):
    """One candidate: the uniform allocation on the budget."""

    def propose(self) -> list[IntArray]:
        return [self.budget.uniform()] if self.step == 0 else []

    def again(self) -> IntArray:
        return self.budget.uniform()

    def learn(self, outcomes: Sequence[Scored]) -> None:
        """Nothing to learn from a single candidate."""
