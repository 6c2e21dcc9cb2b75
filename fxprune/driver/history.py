"""The history: one JSON record for each step of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.driver.budget import Budget
from fxprune.driver.strategies.base import Scored, Strategy


class History:
    """Collects rounds into the record of the step that they belong to.

    A record holds "targets", "strategy", "step"; "accuracy", "reward", the costs and "removed" of the architecture that the step ends on
    (of its best candidate, where the strategy stands on none); "evaluations" and "seconds" since the start; "rounds", each with the figures
    of its best candidate; and "candidates", each with its "reward", "accuracy", remaining shares and whether it is on target. Where a
    recovery followed, "recover_seconds" is what it took.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.candidates: list[dict[str, Any]] = []
        self.best: float | None = None  # the highest reward on target so far

    def add_round(self, outcomes: Sequence[Scored], budget: Budget, evaluations: int) -> Scored:
        """Enter the outcomes of one round; returns the best of them."""
        best = max(outcomes, key=lambda outcome: outcome.reward)
        self.rounds.append({**best.metrics, "reward": best.reward, "accuracy": best.accuracy, "evaluations": evaluations})
        for outcome in outcomes:
            on_target = budget.met(outcome.removed)
            self.candidates.append({"reward": outcome.reward, **outcome.metrics, "on_target": on_target})
            if on_target and (self.best is None or outcome.reward > self.best):
                self.best = outcome.reward
        return best

    def close_step(self, strategy: Strategy, name: str, best: Scored, evaluations: int, seconds: float) -> dict[str, Any]:
        """Turn the rounds entered since the last step into a record."""
        record = {
            "targets": [str(target) for target in strategy.budget.targets],
            "strategy": name,
            "step": strategy.step,
            "reward": best.reward,
            **best.metrics,
            "removed": best.removed.tolist(),
            "evaluations": evaluations,
            "seconds": round(seconds, 3),
            **strategy.notes(),
            "rounds": self.rounds,
            "candidates": self.candidates,
        }
        self.records.append(record)
        self.rounds, self.candidates = [], []
        return record

    def recovered(self, seconds: float) -> None:
        """Enter the time of the recovery after the last step."""
        self.records[-1]["recover_seconds"] = round(seconds, 3)

    @property
    def total(self) -> int:
        """Rounds entered so far."""
        return sum(len(record["rounds"]) for record in self.records) + len(self.rounds)

    def state(self) -> dict[str, Any]:
        """The history as JSON."""
        return {"records": self.records, "rounds": self.rounds, "candidates": self.candidates, "best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what ``state`` returned."""
        self.records, self.rounds, self.candidates = state["records"], state["rounds"], state["candidates"]
        self.best = state["best"]
