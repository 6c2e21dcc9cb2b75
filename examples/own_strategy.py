"""A search strategy of one's own: hill climbing that moves single units between groups, in twenty lines.

From the command line: fxprune-search --strategy own_strategy:HillClimbing (run in the folder that holds this file).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import fxprune
from fxprune.driver import Scored, SearchConfig, Strategy


class HillClimbing(Strategy):
    """Start from the uniform allocation; let some groups lose more and some less; go where it is better."""

    def start(self) -> None:
        self.at, self.best = self.budget.uniform(), -np.inf

    def propose(self) -> list[Any]:
        if self.step >= self.config.rounds:
            return []
        pushes = self.rng.normal(0, 0.3, (self.config.samples, len(self.at)))
        return [self.budget.fitted(np.clip(self.at * np.exp(push), 1, self.space.room).astype(np.int64)) for push in pushes]

    def learn(self, outcomes: Sequence[Scored]) -> None:
        best = max(outcomes, key=lambda outcome: outcome.reward)
        if best.reward > self.best:
            self.at, self.best = best.removed, best.reward

    def memory(self) -> dict[str, Any]:
        return {"at": self.at.tolist(), "best": self.best if np.isfinite(self.best) else None}

    def recall(self, memory: dict[str, Any]) -> None:
        self.at, self.best = np.array(memory["at"]), -np.inf if memory["best"] is None else memory["best"]


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    inputs = torch.randn(256, 8)
    with torch.no_grad():
        wanted = model(inputs)

    def nearness(slim: nn.Module) -> float:
        return -float((slim(inputs) - wanted).square().mean())

    config = SearchConfig(targets=("macs=0.4",), strategy=HillClimbing, rounds=6, samples=4)
    found = fxprune.search(model, inputs[:1], nearness, config=config, calibration=[inputs])
    uniform = found.outcome.baselines["uniform"]
    print(f"uniform {uniform.reward:.4f}, found {found.reward:.4f} in {found.evaluations} evaluations: {dict(found.policy.sparsity)}")
