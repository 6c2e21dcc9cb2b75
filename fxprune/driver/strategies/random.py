"""Random: allocations drawn without memory, each projected onto the budget; what a learning search has to beat at equal evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.driver.problem import IntArray
from fxprune.driver.simplex import on_simplex
from fxprune.driver.strategies.base import Scored, Strategy

BLOCKS = 0.1  # share of the blocks that may go in a draw


class Random(Strategy):
    """As many candidates as RL-Pruner may take: steps x rounds rounds of ``samples``."""

    def propose(self) -> list[IntArray]:
        if self.step >= self.steps():
            return []
        return [self._draw() for _ in range(self.config.samples)]

    def learn(self, outcomes: Sequence[Scored]) -> None:
        """Nothing: that is the point."""

    def steps(self) -> int:
        return self.config.rounds * (self.config.steps or 1)

    def _draw(self) -> IntArray:
        sparsity = self.rng.random(len(self.space.names))  # independent shares a group, whatever its size
        if self.space.blocks:
            blocks = slice(len(sparsity) - self.space.blocks, None)
            sparsity[blocks] *= self.rng.random(self.space.blocks) < BLOCKS
        return self.budget.project(self.space.zeros(), on_simplex(sparsity * self.space.units, self.config.floor))
