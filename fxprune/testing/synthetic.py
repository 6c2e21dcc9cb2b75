"""Networks that are formulas: a chain of layers whose cost and sensitivity are known, so that the best allocation is too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from fxprune.driver import Problem
from fxprune.driver.problem import FloatArray, IntArray

SCALE = np.array([0.02, 0.5, 0.05, 0.6, 0.03, 0.4])  # what it costs in accuracy to empty each layer


class Chain:
    """A chain of convolutions: MACs are products of neighbouring widths; accuracy falls with the square of each layer's sparsity.

    Odd layers matter ten times as much as even ones, so a good allocation takes from the even ones. Picklable, so that workers can score.
    """

    def __init__(self, units: tuple[int, ...] = (32, 48, 64, 64, 96, 128), sensitivity: FloatArray = SCALE) -> None:
        self.units = np.array(units, dtype=np.int64)
        self.sensitivity = sensitivity
        self.calls = 0

    def cost(self, removed: IntArray) -> dict[str, float]:
        def macs(widths: IntArray) -> float:
            line = [3, *widths.tolist(), 10]
            return float(sum(a * b for a, b in zip(line, line[1:], strict=False)))

        kept = self.units - removed
        share = macs(kept) / macs(self.units)
        return {"macs": share, "params": 0.1 + 0.9 * share, "memory": float(kept.max() / self.units.max()), "latency": 0.2 + 0.8 * share}

    def score(self, removed: IntArray) -> Mapping[str, float]:
        self.calls += 1
        return {"accuracy": float(0.95 - (self.sensitivity * (removed / self.units) ** 2).sum())}

    def unit_scores(self) -> list[FloatArray]:
        return [np.linspace(0.1, 1.0, n) for n in self.units]

    def rounded(self, removed: IntArray, grain: int) -> IntArray:
        """Kept units are rounded up to a multiple of ``grain``, never above the original."""
        kept = self.units - removed
        rounded: IntArray = self.units - np.minimum(self.units, -(-kept // grain) * grain)
        return rounded

    def coarse(self, grain: int) -> Problem:
        """The problem where channels are kept in multiples of ``grain``."""
        problem = self.problem()

        def cost(removed: IntArray) -> dict[str, float]:
            return self.cost(self.rounded(removed, grain))

        def score(removed: IntArray) -> Mapping[str, float]:
            return self.score(self.rounded(removed, grain))

        return dataclasses.replace(problem, cost=cost, score=score, rounding=lambda one: self.rounded(one, grain), grain=grain)

    def problem(self) -> Problem:
        names = tuple(f"layer{i}" for i in range(len(self.units)))
        return Problem(names, self.units, np.ones_like(self.units), self.cost, self.score, unit_scores=self.unit_scores())
